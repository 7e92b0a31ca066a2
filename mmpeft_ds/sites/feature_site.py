"""Inputs and outputs of classification heads on frozen features: rows of a batch, scores, and the bank of class texts
and support samples. A model of features has one site, the module that turns `Features` into `Scores`."""

# B rows of this rank, C classes, D (Dv, Dt) feature widths, T templates, M support samples, V passes of each

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FeatureSite:
    """The site of a classification head.

    Attributes:
        path: full path of the module that gives `Scores`.
        image_width, text_width: D of image and text features; 0: there are none.
        num_classes: C.
        has_text, has_negative, has_support: what the bank holds.
        live_images: an encoder computes the image features in every step, so that layers inside it may change them.
    """

    path: str
    image_width: int
    text_width: int
    num_classes: int
    has_text: bool = False
    has_negative: bool = False
    has_support: bool = False
    live_images: bool = False


@dataclass
class Features:
    """Samples as frozen encoders see them, one row each.

    Attributes:
        image: (B, Dv), not normalised; zeros where a sample has no image.
        text: (B, Dt) of the sample's own text (a caption); None where samples bring none.
        valid: (B,) bool; a row of padding or of a bad sample is absent from graph, loss and metric.
        key: (B,) int64, a stable hash of the sample's id: breaks ties the same way however ranks share the batch.
        further: name -> (B, d) of what layers inside the encoder gave of the images (`collecting`), and where the
            scorer `reads_frozen_images`, `frozen` (B, Dv): what the encoder gives without them; None: nothing.
    """

    image: Tensor
    text: Tensor | None
    valid: Tensor
    key: Tensor
    further: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.image)

    def to(self, dtype: torch.dtype) -> Features:
        """A copy whose features have that dtype."""
        text = None if self.text is None else self.text.to(dtype)
        further = None if self.further is None else {name: x.to(dtype) for name, x in self.further.items()}
        return Features(self.image.to(dtype), text, self.valid, self.key, further)

    def __getitem__(self, index: Any) -> Features:
        """Some of the rows."""
        text = None if self.text is None else self.text[index]
        further = None if self.further is None else {name: x[index] for name, x in self.further.items()}
        return Features(self.image[index], text, self.valid[index], self.key[index], further)


_collected: contextvars.ContextVar[dict[str, Tensor] | None] = contextvars.ContextVar(
    "mmpeft_ds_image_features", default=None
)


@contextlib.contextmanager
def collecting() -> Iterator[dict[str, Tensor]]:
    """Context in which the layers of an encoder can pass further tensors of its images to the head, (I, d) with one
    row per image, in the mapping that it yields. Outside of it such layers do nothing."""
    collected_tensors: dict[str, Tensor] = {}
    token = _collected.set(collected_tensors)
    try:
        yield collected_tensors
    finally:
        _collected.reset(token)


def collected() -> dict[str, Tensor] | None:
    """The mapping of `collecting`; None outside of it."""
    return _collected.get()


class Scores(NamedTuple):
    """Scores of B rows. A tuple, in which ZeRO-3 finds the tensors whose backward needs parameters.

    Attributes:
        logits: (B, C); the largest is the prediction, their softmax the probabilities.
        terms: weighted logits (B, C) whose cross-entropies add up to the loss; None: `logits` alone, weight 1.
        report: numbers for the monitor, each a sum over own rows, so that ranks add up; the same names on every rank.
        graph: what a drawn picture of the graph needs; None without a graph.
        penalty: (B,) added to the loss of each row, such as a distance to frozen features; None: nothing.
    """

    logits: Tensor
    terms: list[tuple[float, Tensor]] | None = None
    report: dict[str, float] | None = None
    graph: Any = None
    penalty: Tensor | None = None


@dataclass
class Labelled:
    """Rows with their classes, for what is fitted or searched without gradients: `labels` is (B,) int64."""

    features: Features
    labels: Tensor


class Bank(nn.Module):
    """Frozen tensors that heads read: class texts and the support samples. Empty where absent.

    Args:
        num_classes: C.
        positive: (C, T, D) text features of each class and template, not normalised.
        negative: (C, T, D) of the negated templates.
        support: (M, V, D) image features: V augmented passes of each sample, or its evaluation view as the only one;
            rows sorted by (label, id).
        support_labels: (M,) int64.

    Source: HeGraphAdapter, arXiv 2410.07854; Tip-Adapter, arXiv 2207.09519.
    """

    NAMES = ("positive", "negative", "support", "support_labels")

    def __init__(
        self,
        num_classes: int,
        positive: Tensor | None = None,
        negative: Tensor | None = None,
        support: Tensor | None = None,
        support_labels: Tensor | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        given = (positive, negative, support, support_labels)
        for name, tensor in zip(self.NAMES, given, strict=True):
            if tensor is None:
                tensor = torch.zeros(0, dtype=torch.int64) if name == "support_labels" else torch.zeros(0, 0, 0)
            self.register_buffer(name, tensor)

    @property
    def text(self) -> Tensor:
        """(C, D) mean over templates, not normalised."""
        return self.positive.mean(1)

    @property
    def negative_text(self) -> Tensor:
        """(C, D) mean over the negated templates, not normalised."""
        return self.negative.mean(1)

    @property
    def cache(self) -> Tensor:
        """(M, D) mean over the passes of each support sample."""
        return self.support.mean(1)

    @property
    def prototypes(self) -> Tensor:
        """(C, D) mean of the support samples of each class, summed in float64; zeros for a class without any."""
        cache = self.cache
        sums = torch.zeros(self.num_classes, cache.shape[1], dtype=torch.float64, device=cache.device)
        sums.index_add_(0, self.support_labels, cache.double())
        counts = torch.bincount(self.support_labels, minlength=self.num_classes).clamp(min=1)
        return (sums / counts[:, None]).to(cache.dtype)

    @property
    def holds(self) -> dict[str, bool]:
        """Those of `text`, `negative` and `support` that the bank has."""
        parts = {"text": self.positive, "negative": self.negative, "support": self.support}
        return {name: tensor.numel() > 0 for name, tensor in parts.items()}


class Calibrated(nn.Module):
    """Base of a module with buffers that are found after training, by search or in closed form.

    Attributes:
        calibrated: their names, of a submodule with its path; they are persistent and travel with checkpoints and
            adapter directories.
        found_anew: those of them that follow from the data of a run, and are not taken by one that starts from an
            adapter.
    """

    calibrated: tuple[str, ...] = ()
    found_anew: tuple[str, ...] = ()


def calibrated_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The calibrated buffers of all modules of `model` by their full paths."""
    return {
        f"{path}.{name}": module.get_buffer(name)
        for path, module in model.named_modules()
        if isinstance(module, Calibrated)
        for name in module.calibrated
    }
