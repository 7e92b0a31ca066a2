"""Report on a graph over the batch: accuracy without edges, in several random orders, and sorted by class.

It says how far predictions depend on the other samples of a batch.
"""

# n rows of a split

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.distributed import collectives
from mmpeft_ds.engine import calibrate
from mmpeft_ds.engine.assembly import hub
from mmpeft_ds.engine.assembly.resolve import resolve
from mmpeft_ds.engine.streams import make_stream
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import write_json
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.runs.finished import on_split, open_run
from mmpeft_ds.sites.feature_site import Labelled
from mmpeft_ds.stop import StopFlag

SEEDS = (0, 1, 2)


def invariance(
    head: Any,
    rows: Labelled,
    size: int,
    seeds: Sequence[int] = SEEDS,
    stopped: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]] | None:
    """Accuracy and graph of the same rows in different batches. Collective.

    In a batch that is sorted by class, neighbours give the class away: accuracy above that of shuffled rows is
    leakage. Accuracy of shuffled rows above that of `no edges` is what the graph contributes.

    Args:
        head: one that is `over_batch`, such as GA-Net's.
        rows: all rows of a split, the same on every rank.
        size: rows per graph.
        stopped: asked before each order, the same on every rank.

    Returns:
        None if `stopped`, else one mapping per order: `order`, `top1`, and where there are edges `degree` (edges per
        node), `same_class` (share of edges between samples of one class; None without edges), `isolated` (share of
        nodes).
    """
    labels, n = rows.labels, len(rows.labels)
    with head.without_edges():
        lines = [{"order": "no edges", "top1": head.top1(rows, size)["top1"]}]
    orders = {
        f"shuffled, seed {seed}": torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    }
    orders["sorted by class"] = labels.cpu().argsort(stable=True)
    for name, order in orders.items():
        if stopped():
            return None
        numbers = head.top1(rows, size, order.to(labels.device))
        nodes, known = max(1.0, numbers["nodes"]), numbers["labelled_edges"]
        lines.append(
            {
                "order": name,
                "top1": numbers["top1"],
                "degree": numbers["edges"] / nodes,
                "same_class": numbers["same_class_edges"] / known if known else None,
                "isolated": numbers["isolated"] / nodes,
            }
        )
    return lines


def of_run(
    run: Path, split: str, which: str = "best", size: int = 0, overrides: Sequence[str] = ()
) -> list[dict[str, Any]] | None:
    """`invariance` of checkpoint `which` of a run on `split` of its first training data set. Every rank calls it.

    Writes RUN/graph-report-SPLIT.json; nothing, and returns None, if a stop was requested on a rank.

    Args:
        size: rows per graph; 0: `data.global_batch`.
        overrides: as `--set`, for where and how to run.

    Raises:
        BadInput: no run there, no such checkpoint or split, a method without a graph over the batch, labels missing.
    """
    recipe = recipes.of_run(run, overrides)
    recipe.data.validation = [on_split(recipe.data.sources[0], split)]
    # Nothing has to be saved: a signal, or the end of the launcher, ends it before the next order.
    with StopFlag(recipe.engine.stop_grace) as stop:
        hub.have(recipe)
        resolved = resolve(recipe)
        opened = open_run(run, resolved, which)
        head = head_of(opened.built.model)
        if head is None or not head.over_batch:
            raise BadInput(
                f"{run}: method {recipe.method['name']} has no graph over the batch. This report is of ga_net."
            )
        stop.begin()
        opened.built.engine.eval()
        source, ranks = resolved.validation[0], opened.ranks

        def stopped() -> bool:
            return bool(collectives.sum_scalars([float(stop.requested())], ranks.device)[0])

        stream = make_stream(resolved, [source], ranks, train=False)
        rows = calibrate.rows_of(opened.built.engine, resolved.backbone, source.task, stream.epoch(0), ranks.device)
        stream.close()
        lines = invariance(head, rows, size or recipe.data.global_batch, stopped=stopped)
    if lines is not None and ranks.rank == 0:
        report = {"split": split, "checkpoint": opened.checkpoint.name, "rows": len(rows.labels)}
        report |= {"there": source.samples, "lines": lines}
        write_json(run / f"graph-report-{split}.json", report)
    return lines
