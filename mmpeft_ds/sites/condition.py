"""The condition (image features and what goes with them) on its way from the model's forward to the adapter layers.

It is a context captured per forward, not a global: two forwards may run before one backward, and a recomputed block
(activation checkpointing) sees the condition of its own forward, because `checkpoint` captures and re-enters it.
"""

# B rows of the text side, m conditioning tokens, d width

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.utils.checkpoint
from torch import Tensor

from mmpeft_ds.sites import once

_AXES = {
    "tokens": ("rows of text", "conditioning tokens", "width"),
    "mask": ("rows of text", "conditioning tokens"),
    "own_mask": ("rows of text", "positions"),
    "encoder": ("rows of text", "encoder positions", "width"),
    "encoder_mask": ("rows of text", "encoder positions"),
    "read": ("rows of text", "positions"),
    "frame_weights": ("rows of text", "frames"),
    "kinds": ("rows of text", "positions"),
    "kept": ("kept positions",),
}


# What `Condition.kinds` says of a position. Prompt is what a text says before its first answer.
OTHER, MEDIA, PROMPT, QUESTION = range(4)


@dataclass(frozen=True)
class Segments:
    """Boundaries of the texts in the one row without padding, (1, N), that a tower reads, one text after the other.

    Layers that treat every token alone need not know. One that mixes the tokens of a text, or reads something of its
    text, gives each text a row of its own again (`split`), best where rows are narrow, and puts the results back
    (`join`).

    Attributes:
        text: (N,) int64, number of the text of each position, ascending.
        place: (N,) int64, of each position within its text.
        lengths: tokens of each of the G texts.
    """

    text: Tensor
    place: Tensor
    lengths: tuple[int, ...]

    def split(self, row_1Nd: Tensor) -> Tensor:
        """(G, L, d) with a row for each text, zeros after the shorter ones; (G, L) of a row of numbers."""
        rows = row_1Nd.new_zeros(len(self.lengths), max(self.lengths), *row_1Nd.shape[2:])
        return rows.index_put((self.text, self.place), row_1Nd[0])

    def join(self, rows_GLd: Tensor) -> Tensor:
        """(1, N, d): what `split` gave, or something in its form, as one row."""
        return rows_GLd[self.text, self.place][None]


@dataclass(frozen=True)
class Condition:
    """Image features and masks that adapters may route on. A model publishes those that it has.

    Attributes:
        segments: the tower reads its B texts as one row without padding; None: each has a row. B and L of the others
            are numbers of texts and the length of the longest, whichever it is.
        tokens: (B, m, d) conditioning features, one row per text row.
        mask: (B, m) bool, True = keep; None keeps all.
        own_mask: (B, L) bool mask of the tower's own tokens, for layers that pool their own input.
        encoder: (B, n, d) states that cross-attention reads, and `encoder_mask` (B, n).
        read: (B, L) bool, the one position of each row whose final state is read; None: all may be.
        kept: (N,) indices into (B * L,) of the positions that `own_mask` keeps. Layers may skip the others in
            computations that treat each position by itself. None: they may not.
        frame_weights: (B, T) how much each of the T frames counts whose tokens stand one after the other in what
            cross-attention reads; the keys of an adapted cross-attention are multiplied by it.
        kinds: (B, L) int64, of each position of a language model that reads images in its sequence: MEDIA, a token of
            an image or a video; QUESTION, text of the prompt after all its images; PROMPT, its other text; OTHER,
            answers, what follows them, and padding; or a function that makes them when they are first read, since few
            methods do: `token_kinds` gives them either way. Methods that say so in `SiteMethod.reads_kinds` may.
    """

    tokens: Tensor | None = None
    mask: Tensor | None = None
    own_mask: Tensor | None = None
    encoder: Tensor | None = None
    encoder_mask: Tensor | None = None
    read: Tensor | None = None
    frame_weights: Tensor | None = None
    kinds: Tensor | Callable[[], Tensor] | None = None
    kept: Tensor | None = None
    segments: Segments | None = None

    def __post_init__(self) -> None:
        for name, axes in _AXES.items():
            tensor = getattr(self, name)
            if not (tensor is None or isinstance(tensor, Tensor) or (name == "kinds" and callable(tensor))):
                raise TypeError(f"Condition({name}=...): expected a tensor, got a {type(tensor).__name__}.")
            if isinstance(tensor, Tensor) and tensor.dim() != len(axes):
                hint = ""
                if name in ("tokens", "encoder") and tensor.dim() == 2:
                    hint = f" For one vector per row: {name}=x.unsqueeze(1)."
                raise ValueError(
                    f"Condition({name}=...): a tensor of shape {tuple(tensor.shape)} was given, expected "
                    f"({', '.join(axes)}).{hint}"
                )
        for mask, tensor in ((self.mask, self.tokens), (self.encoder_mask, self.encoder)):
            if mask is not None and tensor is not None and mask.shape != tensor.shape[:2]:
                raise ValueError(
                    f"Condition: a mask of shape {tuple(mask.shape)} was given for tokens of shape "
                    f"{tuple(tensor.shape)}, expected {tuple(tensor.shape[:2])}."
                )

    def expand_to(self, rows: int) -> Condition:
        """Follow beam expansion: row b of the condition serves rows b*k ... b*k+k-1.

        Raises:
            ValueError: if `rows` is no multiple of B.
        """
        if self.segments is not None or all(t is None or t.shape[0] == rows for t in self._tensors()):
            return self
        return Condition(*(_expand(t, rows) for t in self._tensors()), kinds=self.kinds)

    def token_kinds(self, rows: int | None = None) -> Tensor | None:
        """`kinds`, made now if they were not; of that many rows, as `expand_to` counts them.

        Raises:
            ValueError: if `rows` is no multiple of B.
        """
        kinds = self.kinds() if callable(self.kinds) else self.kinds
        return kinds if rows is None else _expand(kinds, rows)

    @property
    def requires_grad(self) -> bool:
        return any(t is not None and t.requires_grad for t in (self.tokens, self.encoder))

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return (
            self.tokens, self.mask, self.own_mask, self.encoder, self.encoder_mask, self.read, self.frame_weights
        )  # fmt: skip


def _expand(tensor: Tensor | None, rows: int) -> Tensor | None:
    if tensor is None or tensor.shape[0] == rows:
        return tensor
    have = tensor.shape[0]
    if rows % have:
        raise ValueError(f"condition has {have} rows but the layer sees {rows}, which is no multiple of it")
    return tensor.repeat_interleave(rows // have, 0)


_current: contextvars.ContextVar[Condition | None] = contextvars.ContextVar("mmpeft_ds_condition", default=None)


def current() -> Condition | None:
    """The condition of the forward that is running, or None."""
    return _current.get()


@contextlib.contextmanager
def conditioned(condition: Condition | None) -> Iterator[None]:
    """Run a forward under `condition`. Raises TypeError for a bare tensor."""
    if not (condition is None or isinstance(condition, Condition)):
        raise TypeError(
            f"conditioned(...): expected a Condition, got a {type(condition).__name__}: Condition(tokens=x)."
        )
    token = _current.set(condition)
    try:
        yield
    finally:
        _current.reset(token)


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint` whose recomputation runs under the condition of the first pass, and with
    what its layers shared (`once`); reentrant blocks, of which each has a backward pass of its own, share nothing.

    Raises:
        ValueError: reentrant with a condition that needs gradient: that gradient would be lost (measured).
    """
    condition = current()
    if use_reentrant and condition is not None and condition.requires_grad:
        raise ValueError("reentrant checkpointing loses the gradient of the condition; set use_reentrant to false")
    if use_reentrant and torch.is_grad_enabled():
        args = _with_gradient(args)

    shared = None if use_reentrant else once.values()

    def run(*inner: Any, **inner_kwargs: Any) -> Any:
        with conditioned(condition), once.keeping(shared):
            return function(*inner, **inner_kwargs)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=use_reentrant, **kwargs)


def _with_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """After frozen embeddings no input needs gradient, and reentrant checkpointing would then give none to the
    adapters inside: let the first one need it."""
    floating = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    if not floating or any(args[i].requires_grad for i in floating):
        return args
    first = floating[0]
    return (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])


def enable_checkpointing(model: Any, use_reentrant: bool = False) -> None:
    """Turn on activation checkpointing of a transformers model so that recomputed layers see their condition.

    Args:
        model: a `PreTrainedModel`; the stock `gradient_checkpointing_enable` would lose the condition.
    """
    model._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=use_reentrant))
