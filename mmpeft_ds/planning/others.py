"""Collectives of a count that runs alone: this process is rank 0 of so many, and the others hold what it holds.

Nothing is sent. Results have the shapes that real ranks would see, and integers the values that equal ranks would
give; `distributed.counters` counts the calls and their bytes as it does in a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor, nn

from mmpeft_ds.distributed import batch_graph, graph_conv
from mmpeft_ds.methods.ga_net import head as ga_net
from mmpeft_ds.methods.hegraph import head as hegraph
from mmpeft_ds.ops import similarity_graph
from mmpeft_ds.planning import graphs


@contextlib.contextmanager
def simulated(ranks: int, neighbours: float) -> Iterator[None]:
    """Inside, collectives behave as on so many ranks with equal samples.

    Args:
        neighbours: of each sample in a graph by threshold, which only real features decide.
    """
    known = {
        "is_initialized": lambda: True,
        "get_world_size": lambda group=None: ranks,
        "get_rank": lambda group=None: 0,
        "get_backend": lambda group=None: "nccl",
        "all_reduce": _nothing,
        "P2POp": _nothing,
        "batch_isend_irecv": lambda operations: [],
        **dict.fromkeys(("all_gather_single", "all_gather_into_tensor"), _repeat),
        **dict.fromkeys(("reduce_scatter_single", "reduce_scatter_tensor", "all_to_all_single"), _nothing),
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in known.items():
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, stand_in))
        stack.enter_context(mock.patch.object(ga_net, "threshold_graph", graphs.of_threshold(neighbours)))
        stack.enter_context(mock.patch.object(ga_net, "knn_graph", graphs.of_neighbours))
        stack.enter_context(mock.patch.object(batch_graph.Graph, "adjacency", graphs.adjacency))
        stack.enter_context(mock.patch.object(graph_conv.GraphConv, "_pass", graphs.aggregated))
        stack.enter_context(mock.patch.object(similarity_graph, "surely_all", lambda mask: sure(mask)))
        # Once in a run, by values that there are none of here.
        stack.enter_context(mock.patch.object(hegraph, "check_agreement", _nothing))
        yield


def sure(mask: Tensor) -> bool:
    """`host_copies.surely_all` of a mask on a GPU, whose values the host does not wait for. In a plan the mask has
    arbitrary values, so it must not be read."""
    return False


def begin(model: nn.Module) -> None:
    """Let heads compute what they compute once in a run, so that it is not counted to a step."""
    for module in model.modules():
        if isinstance(module, hegraph.ClassGraphHead):
            module.made()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Leave the tensors as they are."""


def _repeat(out: Tensor, own: Tensor, *args: Any, **kwargs: Any) -> None:
    if out.device == own.device:
        out.view(-1, max(1, own.numel())).copy_(own.reshape(1, -1))
