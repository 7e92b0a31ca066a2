"""Base of heads whose class features come from the frozen text tower in every step (CoOp, MMRL)."""

# C classes, L tokens of a text, D width of the features

from __future__ import annotations

import contextlib
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.head import Head
from mmpeft_ds.sites import Sites

SomeHead = TypeVar("SomeHead", bound="TextTowerHead")


class TextTowerHead(Head):
    """Base of a head that reads class features of the text tower; a subclass gives `inserting`.

    Args:
        encoder: the frozen dual encoder, which is called and never becomes part of the head.
        tokens: arguments of the text tower, each (C, L).
    """

    def __init__(self, config: Any, base: nn.Module, encoder: nn.Module, tokens: dict[str, Tensor]):
        super().__init__(config, base)
        self._encoder = (encoder,)  # in a tuple, which hides it from torch
        self._names = tuple(tokens)
        for name, rows in tokens.items():
            self.register_buffer(name, rows, persistent=False)
        self._known: Tensor | None = None

    def inserting(self) -> contextlib.AbstractContextManager[Any]:
        """Texts that go through the tower in here are those of classes."""
        raise NotImplementedError

    @property
    def text(self) -> Tensor:
        """(C, D) class features, not normalised. Without gradient they are computed once per call of `eval`."""
        if torch.is_grad_enabled() or self.training:
            return self._through_the_tower()
        if self._known is None:
            self._known = self._through_the_tower()
        return self._known

    def _through_the_tower(self) -> Tensor:
        with self.inserting():
            return self._as_frozen()

    def _as_frozen(self) -> Tensor:
        """(C, D) what the tower gives for the texts of classes outside of `inserting`."""
        return self._encoder[0](**{name: getattr(self, name) for name in self._names}, unit=False).text_features

    def train(self: SomeHead, mode: bool = True) -> SomeHead:
        """Set the mode, and drop the class features that evaluation has stored."""
        self._known = None
        return super().train(mode)


def tower_of(method: str, sites: Sites, modality: str) -> str:
    """Path of the one tower that reads texts, or images. Raises BadInput."""
    towers = [path for path, kind in sites.towers.items() if kind == modality]
    if len(towers) != 1:
        raise BadInput(
            f"{method}: it needs one {modality} encoder in every step, and the model has {len(towers)}. Set "
            "backbone.encoder to a dual_encoder or clip."
        )
    return towers[0]


def names_and_tokeniser(method: str, model: nn.Module) -> tuple[list[str], Any]:
    """Class names in words, and the function from texts to arguments of the encoder. Raises BadInput."""
    # every model with a feature site has both, or None
    if model.tokenise is None or not model.class_names:
        raise BadInput(
            f"{method}: the model does not know its class names as texts: it has no text encoder, or was made without "
            "them. Set backbone.encoder to a dual_encoder or clip."
        )
    return model.class_names, model.tokenise


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """Full path of a module of `model`."""
    return next(path for path, module in model.named_modules() if module is wanted)
