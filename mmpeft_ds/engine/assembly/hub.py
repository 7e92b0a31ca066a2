"""Checkpoints of the Hugging Face hub: one rank of each node fetches them, then all read them from its disk."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import transformers
from huggingface_hub import constants, snapshot_download
from transformers.integrations import hub_kernels

from mmpeft_ds.backbones.common.tower_loading import first_line, is_on_hub
from mmpeft_ds.distributed import processes
from mmpeft_ds.distributed.collectives import first_message
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe import Recipe, Section, components

# What a configuration, a tokenizer and an image processor consist of; weights as they are preferred.
SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def named(recipe: Recipe) -> dict[str, bool]:
    """Checkpoints on the hub that the backbone of `recipe` loads -> whether with their weights; none for local ones,
    for which no rank has to wait. Raises BadInput."""
    backbone = components(recipe).backbone
    sections: list[Section] = [backbone, *backbone.inner.values()]
    return {
        name: not section.options.random_weights
        for section in sections
        for name in section.options.checkpoints()
        if is_on_hub(name)
    }


def have(recipe: Recipe) -> None:
    """Before a recipe is resolved: have what its backbone needs of the hub on the disk of every node, which takes a
    meeting of the ranks, and only then. Every rank calls it.

    Raises:
        BadInput: on all ranks, with the node's name, if it cannot be had on some node.
    """
    if checkpoints := named(recipe):
        share(checkpoints, recipe.engine.attention, processes.start(**recipe.start_options()))


def share(checkpoints: dict[str, bool], attention: str, ranks: Ranks) -> None:
    """Fetch on one rank of each node while the others wait, and let no rank ask the network afterwards. Collective.

    512 ranks that ask for a dozen files each would wait for each other's locks, or be turned away by the hub.

    Args:
        checkpoints: what `named` gave.
        attention: `engine.attention`, which may name a kernel of the hub.

    Raises:
        BadInput: as `have` does.
    """
    if ranks.world_size == 1:
        return
    problem = _fetched(checkpoints, attention) if ranks.local_rank == 0 else ""
    if problem := first_message(problem):
        raise BadInput(problem)
    os.environ["HF_HUB_OFFLINE"] = "1"  # of loader processes
    constants.HF_HUB_OFFLINE = True


def _fetched(checkpoints: dict[str, bool], attention: str) -> str:
    """Put everything into the cache of this node; what went wrong, if something did."""
    name = attention
    try:
        for name, weights in checkpoints.items():  # noqa: B007 - told below
            fetch(name, weights)
        if "/" in attention and transformers.utils.is_kernels_available():
            name = attention
            hub_kernels.load_and_register_attn_kernel(name)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks wait to hear of it
        asks = "HF_HUB_OFFLINE=1 keeps it from asking the hub" if constants.HF_HUB_OFFLINE else "see HF_TOKEN, HF_HOME"
        return (
            f"{socket.gethostname()}: cannot get {name!r} from the hub or its cache {constants.HF_HUB_CACHE} "
            f"({asks}; {type(error).__name__}: {first_line(error)}). Fetch it there with: hf download {name}"
        )
    return ""


def fetch(name: str, weights: bool) -> None:
    """Have a checkpoint in the cache of this machine, from the hub unless HF_HUB_OFFLINE forbids it.

    Raises:
        OSError, ValueError: of huggingface_hub, or if there are no weights.
    """
    folder = Path(snapshot_download(name, allow_patterns=SMALL))
    for pattern in WEIGHTS if weights else ():
        folder = Path(snapshot_download(name, allow_patterns=[*SMALL, pattern]))
        if any(folder.glob(pattern)):
            return
    if weights:
        raise FileNotFoundError(f"no weights ({' or '.join(WEIGHTS)}) in {folder}")
