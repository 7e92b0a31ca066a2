"""Generation under two constraints: answers of a closed list, and equally many steps on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from mmpeft_ds.distributed import collectives


def in_step(model: nn.Module) -> bool:
    """Whether all ranks must take equally many steps of generation: each step gathers partitioned weights."""
    return collectives.world_size() > 1 and any(hasattr(p, "ds_id") for p in model.parameters())


def one_of(sequences: Iterable[list[int]], end: int, skip: int = 1) -> Callable[[int, Tensor], list[int]]:
    """`prefix_allowed_tokens_fn` of transformers' `generate` that allows one of `sequences` and nothing else.

    Greedy decoding then compares the logits of the first token in which the choices differ.

    Args:
        sequences: token ids of each choice, special tokens included.
        end: token that follows a choice.
        skip: tokens before the generated ones.
    """
    tree: dict[int, Any] = {}
    for sequence in sequences:
        at = tree
        for token in sequence:
            at = at.setdefault(token, {})
        at.setdefault(end, {})

    def allowed(row: int, ids: Tensor) -> list[int]:
        at = tree
        for token in ids[skip:].tolist():
            at = at.get(token, {})
        return list(at) or [end]

    return allowed
