"""The contract of a backbone: `BackboneBase`. That of the model that it builds is `common.model_hooks`.

A backbone is a file `backbones/NAME.py`, or a folder `backbones/NAME/` with `options.py` and `backbone.py`. Its
`ENTRY` is a subclass of `BackboneBase` that gives `Options`, `build`, `image_transform` and `collate_texts`; all else
has a default.
"""

# S slots, I images, V videos, T texts, L text length, D feature widths

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmpeft_ds.backbones.common.options import BackboneOptions
from mmpeft_ds.data.batch import PackedBatch, Prompted
from mmpeft_ds.data.token_counts import TokenCounts
from mmpeft_ds.data.video import Times, Video
from mmpeft_ds.errors import BadInput
from mmpeft_ds.host_copies import to_device
from mmpeft_ds.ops.finished_logits import PLAIN, Finish


@dataclass(frozen=True)
class ImagePrefix:
    """The part of a model that images alone pass, and that is frozen to its end: what it gives for an image is always
    the same, and can be kept.

    Attributes:
        modules: paths of its modules below the base model.
        choice: all else that its values depend on besides weights, dtype, attention and the image transform, as JSON
            has it.
    """

    modules: tuple[str, ...]
    choice: dict[str, Any] = field(default_factory=dict)


class BackboneBase(abc.ABC):
    """A frozen model family, made from the options of the recipe's `backbone` section.

    Args:
        options: an `Options`.
        labels: the closed list of answers or classes of the training data, None without one.

    Attributes:
        Options: dataclass of the recipe keys but `name`, a `BackboneOptions`, which also says what tasks may read
            of the model's output; its module imports neither torch nor transformers.
        modalities: what `dummy` can make and a batch may hold, in the order in which the towers run: `image`, `video`,
            `text`. Without `video` the frames of a video are images.
        condition_width: width of the condition that the model publishes, None if it publishes none.
        publishes_kinds: the language model reads the tokens of images in its sequence, and its condition says which
            they are: `Condition.kinds`.
        generates: the model generates text: texts are `Prompted`, `read` gives a `GenerationOutput`, and `generate`
            works.
        ranks_answers: `rank` works.
        embeds: the frozen towers serve as encoders of images and texts: `feature_widths`, `towers_key`, `embed` and
            `embed_texts` work.
        wants_statistics: the image feature is standardised: `use_statistics` is called before `build`, and
            `statistics_width`, `statistics_key` and `build_vision` work.
        prompt_limit, target_limit: options that limit the tokens of a text, and of its target where it has one;
            messages about texts that were cut name them.
        reads_bank: the model scores classes from a bank of class texts and support samples: `use_bank` and
            `use_trained_classes` are called before `build`, and `read_classes` after it.
        unpackable: why the language model cannot read all texts of a batch as one row without padding, each by itself,
            as the end of a sentence that begins with the backbone; empty: it can where the batch says so
            (`PackedBatch.padding_free`), and `tokens` and `tokens_key` work.
        row_attention: takes the place of sdpa where texts stand in one row, as `backbones.common.text_attention` names
            it; empty: nothing does, and a mask alone tells the texts apart.
        attentions: attention implementations that compute what the checkpoint means, the first for `auto`; empty: all
            that transformers has. flash-attn takes a mask for a number of tokens at one end of each row, which is
            wrong where padding stands between tokens.
        no_videos: why videos cannot be read as such, where their frames must not pass for images unasked; data with
            videos are then refused. Empty: they can, or frames are images.
        one_turn: why conversations of several turns cannot be read; data that hold such are then refused. Empty: they
            can, or the backbone's texts say so themselves.
        most_images: that a sample may have, 0 = any number; a sample with more is a bad one.
        images_differ: images have sizes of their own; where their values are kept, the tower then sees one at a time.
        dtype: of the frozen weights. This and the next two are set from the recipe's `engine` section before `build`.
        attention: attention implementation as transformers names them; `auto` leaves the choice to the backbone.
        train_dropout: keep the dropout of the text tower on in training.
        device: where `build` puts pretrained weights as it reads them; None: on the host, or where `zero.Init` has its
            parts. Set by the engine. Weights that are drawn are drawn on the host, for the same numbers everywhere.
    """

    Options: ClassVar[type[BackboneOptions]]
    modalities: tuple[str, ...] = ("image", "text")
    condition_width: int | None = None
    publishes_kinds: bool = False
    generates: bool = False
    ranks_answers: bool = False
    embeds: bool = False
    wants_statistics: bool = False
    reads_bank: bool = False
    unpackable: str = "reads each text in a row of its own, as it is set"
    row_attention: str = "sdpa_by_text"
    attentions: tuple[str, ...] = ()
    prompt_limit: str = "max_text_length"
    target_limit: str = "max_text_length"
    most_images: int = 0
    images_differ: bool = False
    no_videos: str = ""
    one_turn: str = ""

    def __init__(self, options: Any, labels: list[str] | None):
        self.options, self.labels = options, labels
        self.dtype = torch.float32
        self.attention = "auto"
        self.train_dropout = False
        self.device: torch.device | None = None

    # required

    @abc.abstractmethod
    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The pretrained model, frozen, called inside the engine's init context.

        Its forward takes what `inputs` returns. It publishes the condition, if it has one, with
        `sites.condition.conditioned`.

        Args:
            on_meta: build it on the meta device, which allocates nothing.
        """

    @abc.abstractmethod
    def image_transform(self, train: bool) -> Callable[[Tensor, torch.Generator | None], Any]:
        """Function (uint8 (3, H, W) RGB image, generator) -> what `collate_images` takes.

        It must survive pickling. See `data.transform.ImageTransform` for its optional attributes, such as that it
        takes stored features instead of pixels. Without `image` among the modalities any function serves.

        Args:
            train: augment, if this family does; the generator is seeded per sample and epoch.
        """

    @abc.abstractmethod
    def collate_texts(self, texts: list[Any]) -> dict[str, Tensor]:
        """Forward arguments of the text side, each of shape (T, L); `labels` among them is read by the task alone.

        Args:
            texts: what the task's `read` returned: strings, `Prompted`, or `Described`.

        Returns:
            a `CollatedTexts` where texts may have been changed on the way, with the counts.

        Raises:
            BadSample: for a text that cannot be read by this family; its sample is then left out and counted.
        """

    # with defaults

    def check(self) -> None:  # noqa: B027 (an empty default is meant)
        """Raise BadInput if the options cannot work. Reads configurations only, never weights. Default: accept all."""

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]:
        """Forward arguments of the image side, first dimension I. Default: `pixel_values`, the images stacked."""
        return {"pixel_values": torch.stack([torch.as_tensor(image) for image in images])}

    def video_transform(self) -> Callable[[Video], Any] | None:
        """Function of a video -> what `collate_videos` takes, which must survive pickling; None: frames are images."""
        return None

    def collate_videos(self, videos: list[Any]) -> dict[str, Tensor]:
        """Forward arguments of videos, of a backbone with `video` among its modalities."""
        raise self._lacks("video")

    def dummy(self, modality: str) -> Any:
        """The smallest raw `image` or `video` (before the transform) or `text` that runs the tower of that modality.

        Under ZeRO-3 a rank whose batch lacks a modality runs it, with weight 0. Default: a black image of 8 x 8
        pixels, and the text "a".
        """
        if modality == "image":
            return torch.zeros(3, 8, 8, dtype=torch.uint8)
        return Prompted("a", "a") if self.generates else "a"

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments for a batch. Default: its texts without `labels`, its images, and who owns which."""
        return {
            **{name: rows for name, rows in batch.texts.items() if name != "labels"},
            **batch.images,
            "image_owner": batch.image_owner,
            "text_owner": batch.text_owner,
            "num_slots": len(batch.sample_id),
        }

    def read(self, outputs: Any, batch: PackedBatch) -> Any:
        """The outputs of the model in the form that tasks read.

        Default: the outputs themselves. A model that generates returns a `GenerationOutput`, logits beside labels.
        """
        return outputs

    def output_layer(self, model: nn.Module) -> nn.Module | None:
        """The layer that makes logits of states, called once a forward; None if what it returns is changed otherwise
        than `logit_finish` says.

        A constant bias that the model adds is no such change where it does so by `ops.scored_head.biased_logits`.

        Args:
            model: the base model, adapters in place.

        Default: transformers' output embeddings. In training and evaluation losses are computed inside this layer
        (`ops.token_scores`).
        """
        return model.get_output_embeddings()

    @property
    def logit_finish(self) -> Finish:
        """What the model makes of the logits of its output layer. Default: they stay as they are."""
        return PLAIN

    def labels_at(self, model: nn.Module, batch: PackedBatch, positions: int) -> Tensor:
        """(T, S) int64, what each of the last S of `positions` predicts, -100 = nothing; of a model that generates.

        Args:
            model: the base model, in its forward pass.
            positions: length that the output layer is called with.

        Default: the labels of the batch, which stand at the positions that predict them.
        """
        return batch.texts["labels"]

    def tokens(
        self, texts: list[Any], image_sizes: list[tuple[int, int]], videos: Sequence[tuple[int, int, Times]] = ()
    ) -> TokenCounts:
        """Cost of the texts, images and videos of one sample: tokens that the language model reads, image and video
        tokens included, and patches. For a backbone that packs, or has `video` among its modalities.

        Args:
            texts: what the task's `read` returned, the number of images and videos set.
            image_sizes: (height, width) of its images, before the transform.
            videos: height, width and times of the frames of its videos.

        Raises:
            BadSample: as `collate_texts`.
        """
        raise self._lacks("unpackable")

    def costs(self, counts: TokenCounts) -> np.ndarray:
        """Cost of training on samples, over that of a token in the weights of the language model, by which ranks are
        balanced.

        Args:
            counts: of arrays (samples,), as `tokens` gives them for one sample.

        Default: tokens.
        """
        return counts.tokens.astype(np.float64)

    def tokens_key(self) -> str:
        """Hash of all that `tokens` depends on besides its arguments."""
        raise self._lacks("unpackable")

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """Paths of modules below the lowest trainable one; they run in eval mode and without autograd.

        Default: none, which is always right and sometimes slower.
        """
        return []

    # frozen work done once (`engine.cache_frozen`)

    def image_prefix(self, model: nn.Module) -> ImagePrefix | None:
        """The module at which the frozen prefix of images ends; None if a part of it trains, or there is none to
        cache.

        Args:
            model: the base model, adapters in place.

        Default: none.
        """
        return None

    def image_values(self, model: nn.Module, images: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Output of that prefix for each image of `PackedBatch.images`, by names of forward arguments.

        Under ZeRO-3 all ranks call it together.
        """
        raise self._lacks("image_prefix")

    def collate_apart(self, images: list[Any]) -> dict[str, Tensor]:
        """Images as `some_images` takes them apart again. Default: as `collate_images`."""
        return self.collate_images(images)

    def some_images(self, images: dict[str, Tensor], chosen: Sequence[int]) -> dict[str, Tensor]:
        """These of the images of `collate_apart`, in this order, as `collate_images` gives them. Default: by the first
        dimension."""
        rows = torch.tensor(list(chosen), dtype=torch.int64)
        return {name: tensor.index_select(0, to_device(rows, tensor.device)) for name, tensor in images.items()}

    def collate_values(self, values: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Values of images as `PackedBatch.images` then holds them in place of pixels. Default: stacked."""
        return {name: torch.stack([value[name] for value in values]) for name in values[0]}

    # a model that generates text (`generates`), or ranks given answers (`ranks_answers`)

    def check_generation(self, options: dict[str, Any]) -> None:  # noqa: B027 (an empty default is meant)
        """Raise BadInput if `generate` cannot work with the task's `options`; asked before training. Default: accept
        all."""

    def generate(self, model: Any, batch: PackedBatch, **options: Any) -> list[str]:
        """The text generated after the prompt of each text of the batch, without special tokens.

        Args:
            model: the PeftModel; under ZeRO-3 all ranks call it together (`synced_gpus`).
            options: of transformers' `generate` (num_beams, max_new_tokens, ...), as the task gives them; and
                `choices`, the only texts that may be generated.
        """
        raise self._lacks("generates")

    def as_generated(self, text: str) -> str | None:
        """`text` as `generate` would give it back, through the tokenizer; None if the tokenizer lacks a part of it.

        Where it equals a generated text both are the same to the model. Default: the text itself.
        """
        return text

    def rank(
        self, model: Any, batch: PackedBatch, answers: list[str], k: int = 128, smoothing: float = 0.0
    ) -> list[str]:
        """The best of `answers` for each prompt of the batch.

        Args:
            answers: at least one; the same list on all ranks.
            k: how many of them are scored in full: those with the likeliest first token.
            smoothing: label smoothing of the score.
        """
        raise self._lacks("ranks_answers")

    # towers that serve as encoders (`embeds`)

    @property
    def feature_widths(self) -> tuple[int, int]:
        """Widths (Dv, Dt) of the features of images and of texts."""
        raise self._lacks("embeds")

    def towers_key(self) -> str:
        """Hash of all that features depend on: the towers' weights, the image transform, the choice of feature."""
        raise self._lacks("embeds")

    def embed(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor | None, Tensor | None]:
        """Features of the images (I, Dv) and of the texts (T, Dt) of the batch, at least float32, not normalised; None
        for a modality that the batch lacks."""
        raise self._lacks("embeds")

    def embed_texts(self, model: nn.Module, texts: list[str]) -> Tensor:
        """Features (n, Dt) of plain texts, such as class names in a template, without gradient."""
        raise self._lacks("embeds")

    def logit_scale_of(self, model: nn.Module) -> float:
        """Factor of the cosine of image and text, 1 / temperature. Default: 1, for towers that were never aligned."""
        return 1.0

    # a standardised image feature (`wants_statistics`)

    @property
    def statistics_width(self) -> int:
        """Width of the feature that is standardised."""
        raise self._lacks("wants_statistics")

    def statistics_key(self) -> str:
        """Hash of all that the statistics depend on: the tower's weights, the image transform, the feature."""
        raise self._lacks("wants_statistics")

    def use_statistics(self, statistics: dict[str, Any]) -> None:
        """Take `mean` and `std`, lists of `statistics_width` numbers, from a manifest; called before `build`."""
        raise self._lacks("wants_statistics")

    def build_vision(self) -> Callable[[dict[str, Tensor]], Tensor]:
        """The frozen tower alone: what `collate_images` returned -> (I, statistics_width) float32 features."""
        raise self._lacks("wants_statistics")

    def statistics_rows(self, images: dict[str, Tensor]) -> Tensor:
        """(I, statistics_width) float32 features in values of the frozen prefix, as `collate_values` gave them."""
        raise self._lacks("wants_statistics")

    # stored features, an encoder inside, a bank (`reads_bank`)

    def use_features(self, towers: dict[str, Any]) -> None:
        """Take what the manifest says of stored features; called before `check` where the data has some.

        Default: raise BadInput, since this backbone reads pixels.
        """
        raise BadInput(
            "backbone: these shards hold features of frozen encoders, but this backbone reads pixels. Name the shards "
            "of images, or a backbone that reads features: features or dual_encoder."
        )

    def check_stored(self, features_are: str, numbers: int) -> str:
        """Refuse stored arrays of another kind than the model reads; called where the image transform takes features
        that no frozen towers made. Default: accept all.

        Args:
            features_are: `grid`, `regions`, or empty where the manifest does not say.
            numbers: of the largest sample, rows times width times images.

        Returns:
            a remark for the user, empty for none.

        Raises:
            BadInput: the arrays are of another kind, or may be.
        """
        return ""

    def use_encoder(self, encoder: BackboneBase) -> None:
        """Take the backbone that the option `encoder` names; called before `check`.

        An option that names another component says so in its metadata: `field(metadata={"component": "backbones"})`.
        """
        raise self._lacks("encoder")

    def use_bank(self, bank: dict[str, Tensor]) -> None:
        """Take the parts of a `sites.feature_site.Bank`, on the meta device where only shapes are known."""
        raise self._lacks("reads_bank")

    def use_trained_classes(self, classes: list[int]) -> None:
        """Take the indices of the classes that occur in training; called before `build` where it `reads_bank`."""
        raise self._lacks("reads_bank")

    def read_classes(self, model: nn.Module) -> None:  # noqa: B027 (an empty default is meant)
        """Fill in class texts that the bank lacks; the weights of `model` are whole, and no adapter is attached yet.

        Default: nothing.
        """

    def _lacks(self, hook: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} does not do this; it would have to set `{hook}`.")
