"""Skipping of positions of a text encoder that are never read: padding, and in the last layer all but one.

After its attention a BERT-like layer treats every position alone, so there the positions of all rows may stand in one
long row without padding, and in the last layer only the one that the head reads. The rest is as before.
"""

# T texts, L positions of each, N positions that count, d width

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from mmpeft_ds.host_copies import nonzero
from mmpeft_ds.sites.condition import current
from mmpeft_ds.sites.unread import all_allow, put_back


def leave_out_unread(layers: Iterable[nn.Module]) -> None:
    """Make BERT-like `layers`, given in order, follow `Condition.kept`, and the last one `Condition.read`."""
    *others, last = layers
    for layer in others:
        layer.attention.output.register_forward_pre_hook(_without_padding)
        layer.output.register_forward_hook(_with_padding)
    last.attention.output.register_forward_pre_hook(_only_read)


def tokenwise(layer: nn.Module) -> bool:
    """Whether this layer, with the adapters in it, mixes no positions after its attention."""
    return all_allow(_behind_attention(layer), "tokenwise")


def rowless(layer: nn.Module) -> bool:
    """Whether all is `tokenwise`, and no adapter there asks which row a position belongs to, for example for its
    condition."""
    return all_allow(_behind_attention(layer), "rowless")


def kept_positions(keep_TL: Tensor, count: int) -> Tensor | None:
    """(N,) where the positions that count stand in (T * L,); None if all of them do.

    Args:
        keep_TL: bool.
        count: N, which is known on the host.
    """
    return None if count == keep_TL.numel() else nonzero(keep_TL.flatten(), count)[:, 0]


def first_position(prefix_keep: Tensor, length: int) -> Tensor:
    """(T, L) bool: position 0, or the first token of the text itself where it has no image."""
    prefix = prefix_keep.shape[1]
    read = torch.zeros(len(prefix_keep), length, dtype=torch.bool, device=prefix_keep.device)
    if prefix == 0:
        read[:, 0] = True
    else:
        read[:, 0] = prefix_keep[:, 0]
        read[:, prefix] = ~prefix_keep[:, 0]
    return read


def take(hidden: Tensor, read: Tensor) -> Tensor:
    """(T, 1, d) the position of each row that `read` marks."""
    at = read.to(torch.uint8).argmax(1)
    return hidden.gather(1, at[:, None, None].expand(-1, 1, hidden.shape[2]))


def _behind_attention(layer: nn.Module) -> Iterator[nn.Module]:
    for part in (layer.attention.output, layer.intermediate, layer.output):
        yield from part.modules()


def _only_read(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Forward pre-hook of the last layer's attention output: from here on no token sees another."""
    condition = current()
    read = None if condition is None else condition.read
    # another length: a method has inserted tokens
    if read is None or any(a.shape[1] != read.shape[1] for a in args):
        return None
    return tuple(take(a, read) for a in args)


def _without_padding(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Forward pre-hook of an attention output: (T, L, d) -> (1, N, d)."""
    condition = current()
    if condition is None or condition.kept is None or any(a.shape[:2] != condition.own_mask.shape for a in args):
        return None
    return tuple(a.flatten(0, 1).index_select(0, condition.kept).unsqueeze(0) for a in args)


def _with_padding(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
    """Forward hook of the end of the same layer: (1, N, d) -> (T, L, d), zeros where nothing counts."""
    condition = current()
    if condition is None or condition.kept is None or out.shape[:2] != (1, len(condition.kept)):
        return None
    return put_back(out, condition.kept, *condition.own_mask.shape)
