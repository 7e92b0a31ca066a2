"""What a backbone must offer. One file per family; `ENTRY` in it is a class that satisfies `Backbone`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from mmpeft_ds.data.batch import GenerationOutput, PackedBatch, Prompted


@runtime_checkable
class Backbone(Protocol):
    """A frozen model family, built from the options of the recipe's `backbone` section.

    Attributes:
        Options: dataclass of the recipe keys beside `name`.
        modalities: what `dummy` can make and a batch may hold, in the order in which the towers run.
        condition_width: width of the condition that the model publishes, None if it publishes none.

    Before `build` the engine sets `dtype`, `attention` and `train_dropout` from the recipe's `engine` section.
    """

    Options: ClassVar[type]
    modalities: tuple[str, ...]
    condition_width: int | None

    def __init__(self, options: Any, labels: list[str] | None): ...

    def check(self) -> None:
        """Raise BadInput if the options cannot work; reads configurations only, never weights."""

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The pretrained model, called inside the engine's init context; `on_meta` allocates nothing."""

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Any]:
        """(uint8 (3, H, W) RGB, torch.Generator) -> what `collate_images` takes; must pickle."""

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]: ...

    def collate_texts(self, texts: list[str | Prompted]) -> dict[str, Tensor]:
        """Forward arguments of the text side, each (T, L)."""

    def dummy(self, modality: str) -> Any:
        """The smallest raw `image` (uint8, before the transform) or `text` (str) that runs that modality's tower."""

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments. The model itself publishes the condition with `sites.condition.conditioned`."""

    def frozen_prefix(self, model: PreTrainedModel) -> list[str]:
        """Paths of modules below the lowest trainable one, which run in eval mode without autograd."""


class Generative(Protocol):
    """What a backbone offers besides, if its model writes text."""

    def read(self, outputs: Any, batch: PackedBatch) -> GenerationOutput:
        """What the task's loss sees of the model's outputs: logits aligned with labels."""

    def generate(self, model: Any, batch: PackedBatch, **options: Any) -> list[str]:
        """What the model writes after the prompt of each text of the batch, special tokens stripped.

        Args:
            model: the PeftModel; under ZeRO-3 all ranks call it together (`synced_gpus`).
            options: of transformers' `generate` (num_beams, max_new_tokens, ...), as the task gives them.
        """


class Ranking(Protocol):
    """What a backbone offers besides, if its model can choose from a list of answers."""

    def rank(
        self, model: Any, batch: PackedBatch, answers: list[str], k: int = 128, smoothing: float = 0.0
    ) -> list[str]:
        """The best of `answers` for each prompt of the batch: the k with the likeliest first token, scored whole."""


class Standardised(Protocol):
    """What a backbone offers besides, if its condition can be scaled with statistics of the data set."""

    wants_statistics: bool

    def statistics_key(self) -> str:
        """Hash of the tower's weights, the image transform and the choice of feature: what statistics belong to."""

    def use_statistics(self, statistics: dict[str, Any]) -> None:
        """Take `mean` and `std`, lists of `condition_width` numbers, from a manifest; before `build`."""

    def build_vision(self) -> Callable[[dict[str, Tensor]], Tensor]:
        """The frozen tower alone: what `collate_images` returned -> (I, condition_width) float32 features."""


class Embedding(Protocol):
    """What a backbone offers besides, if its frozen towers can serve as encoders of images and texts.

    Attributes:
        feature_widths: D of image and of text features.
    """

    feature_widths: tuple[int, int]

    def towers_key(self) -> str:
        """Hash of the towers' weights, the image transform and the choice of feature: what features belong to."""

    def embed(self, model: PreTrainedModel, batch: PackedBatch) -> tuple[Tensor | None, Tensor | None]:
        """Features of the images (I, Dv) and texts (T, Dt) of the batch, at least float32, not normalised; None where
        the batch has none of them."""

    def embed_texts(self, model: PreTrainedModel, texts: list[str]) -> Tensor:
        """(n, Dt) of plain texts, such as class names in a template."""

    def logit_scale_of(self, model: PreTrainedModel) -> float:
        """Factor of the cosine of image and text, 1 / temperature; 1 for towers that were never aligned."""


class OnFeatures(Protocol):
    """What a backbone offers besides, if it reads feature shards and scores classes."""

    def use_features(self, towers: dict[str, Any]) -> None:
        """What the manifest says of the stored features; before `check`."""

    def use_encoder(self, encoder: Backbone) -> None:
        """The backbone that the `encoder` section names; before `check`."""

    def use_bank(self, bank: dict[str, Tensor]) -> None:
        """Class texts and support samples (`sites.features.Bank`), on meta where only shapes are known; before
        `build`."""
