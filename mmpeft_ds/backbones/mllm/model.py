"""Multimodal language models: a mixin with which transformers' own classes take the packed batch.

Texts come with one placeholder for each run of tokens of an image or a video. The vision tower runs once per image and
once per video, and then every placeholder is widened to the length of its run: all features of an image that is one
run, or what the checkpoint's processor wrote, which is compared with the features. So no rule of any processor is
repeated here. The published condition is made of the features after the projector.
"""

# I images, V videos, T texts, R of both as all texts read them, L text length with placeholders, S without, d width

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

from mmpeft_ds.backbones.common.affine import Affine
from mmpeft_ds.backbones.common.kinds import kinds_of
from mmpeft_ds.backbones.common.stock import Publishing
from mmpeft_ds.backbones.common.text_row import TextRow
from mmpeft_ds.backbones.mllm import alike, first_forward, patch_products
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.image_features import ImageFeatures, MediaFeatures, Outputs
from mmpeft_ds.backbones.mllm.processing import TOKEN_RUNS
from mmpeft_ds.backbones.mllm.unread_blocks import UnreadBlocks
from mmpeft_ds.host_copies import both, on_host, to_device
from mmpeft_ds.sites.condition import OTHER, Condition, conditioned, current

# Names under which models ask for the kinds of tokens.
TYPES = ("mm_token_type_ids", "token_type_ids")
# What models ask for beside the features: sizes in patches, and seconds between those of a video.
GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
NONE = ImageFeatures([], [])


@dataclass
class Widened:
    """Texts in which every placeholder is replaced by as many tokens as its image has features.

    Attributes:
        input_ids, attention_mask: (T, S), padded on one side.
        labels: (T, S), -100 where nothing is asked; None if there were none.
        media_tokens: (T, S) int64, 1 where a token of an image stands, 2 where one of a video does.
        kinds: makes (T, S), as `Condition.kinds`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    media_tokens: Tensor
    kinds: Callable[[], Tensor]


class ImageText(Publishing):
    """Mixin over the `ForConditionalGeneration` classes: with `media_rows` for the packed batch, else stock.

    `config.condition` says what is published: `none`, the `pooled` vector of an image (mean of its tokens, mean over
    the images of a slot), or all its `tokens`.

    Attributes:
        family: what is special about it.
        widened_labels: (T, S) of the packed batch that was seen last, -100 at image tokens.
        has_read: a packed batch was read to the end.
        raw_pixels: how pixels are read that come as whole numbers; None: they come normalised.
    """

    family: Family
    raw_pixels: patch_products.RawPixels | None = None
    has_read: bool = False

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        patch_products.used(self)
        if statistics := getattr(config, "pixel_statistics", None):
            self.raw_pixels = patch_products.RawPixels.of(self, Affine(**statistics))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: dict[str, Tensor] | None = None,
        videos: dict[str, Tensor] | None = None,
        media_rows: Tensor | None = None,
        image_owner: Tensor | None = None,
        video_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        padding_free: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The stock forward; or, given `media_rows`, that of a packed batch.

        Args:
            input_ids, attention_mask, labels: (T, L), padded on the right, with a placeholder for each run of image
                tokens.
            images, videos: as the family's processor makes them and `collate_images` and `collate_videos` put them
                together.
            media_rows: (R,) images and videos as the texts read them, one after the other, each once per text: numbers
                of images, and from their number on of videos.
            image_owner, video_owner, text_owner, num_slots: as in the packed batch; only a condition needs them.
            padding_free: read all texts as one row, one after the other and each by itself.

        Returns:
            the stock output; of a packed batch besides `labels` (T, S), and `logits` for the last positions only, from
            the first that predicts a label: (T, K, V), K <= S. With `padding_free` they are (1, N) and (1, K, V), and
            `text_of` (1, N) says whose token each is. Also `lengths` (T,) of the widened texts, and `positions`, the
            number that was computed for them.
        """
        if media_rows is None:
            own = {} if labels is None else {"labels": labels}
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **own, **kwargs
            )
        images, videos = images or {}, videos or {}
        features = self.media_features(images, videos)
        widened = self.widen(input_ids, attention_mask, labels, features, media_rows)
        condition = current()  # one that the caller has set around the call takes precedence
        if condition is None:
            owners = image_owner, video_owner, text_owner
            condition = self.condition_of(features, *owners, num_slots, widened.attention_mask)
        condition = dataclasses.replace(condition, kinds=widened.kinds)
        arguments, labels = self.arguments(widened, features, images, videos, media_rows), widened.labels
        row = TextRow(both(Tensor.bool, widened.attention_mask)) if padding_free else None
        by_grid = hasattr(self.inner, "get_rope_index") and not arguments.keys().isdisjoint(self._grids)
        if row is None and by_grid:
            arguments["position_ids"] = self._positions(arguments)
        if row is not None:
            arguments |= self.row_arguments(row, arguments)
            labels = None if labels is None else row.labels(labels)
            condition = dataclasses.replace(condition, segments=row.segments)
        self.widened_labels = labels
        with conditioned(condition), self._blamed():
            outputs = super().forward(**arguments, logits_to_keep=_asked(labels), use_cache=False, **kwargs)
        self.has_read = True
        if labels is not None:
            outputs["labels"] = labels
        outputs["lengths"], outputs["positions"] = widened.attention_mask.sum(1), arguments["input_ids"].numel()
        if row is not None:
            outputs["text_of"] = row.text_of
        unread = sorted(set(range(len(features))) - set(on_host(media_rows).tolist()))
        if len(features) and torch.is_grad_enabled() and features.tokens[0].requires_grad:
            # All ranks must reach the vision tower in backward, also one whose images no text refers to. Where texts
            # do, the first one stands for them: ZeRO-3 counts the ways from what the model returns, alike on all.
            outputs["tie"] = sum(features.tokens[i].sum() for i in unread or (0,)) * 0
        return outputs

    @property
    def runs_unevenly(self) -> tuple[str, ...]:
        """The blocks of the vision tower and what stands after it, see `alike.uneven`."""
        return alike.uneven(self, self.inner, self.family.merges_each)

    @property
    def inner(self) -> nn.Module:
        """The towers and the language model: what is below the output layer, in most families."""
        return self._modules.get("model", self)

    @property
    def _grids(self) -> tuple[str, ...]:
        return GRIDS + self.family.sizes_of_runs

    def media_features(self, images: dict[str, Tensor], videos: dict[str, Tensor]) -> MediaFeatures:
        """After the projector; each image and each video is seen once, images first."""
        apart = self.takes_videos_apart and not self.family.one_token
        return MediaFeatures(self.image_features(images), self.video_features(videos), apart)

    def image_features(self, images: dict[str, Tensor]) -> ImageFeatures:
        """After the projector; each image is seen once, or not at all where its features are given."""
        if not images:
            return NONE
        if (given := ImageFeatures.together(images, images.get(TOKEN_RUNS))) is not None:
            return given
        return ImageFeatures.of(self.family.apart(self._seen(images, "image")), images.get(TOKEN_RUNS))

    def video_features(self, videos: dict[str, Tensor]) -> ImageFeatures:
        """After the projector; each video is seen once."""
        if not videos:
            return NONE
        output = self._seen(videos, "video" if self.takes_videos_apart else "image")
        features = ImageFeatures.of(self.family.apart(output), videos[TOKEN_RUNS], self.family.without_padding)
        return dataclasses.replace(features, one_tensor=features.one_tensor and not self.family.video_list)

    def _seen(self, media: dict[str, Tensor], kind: str) -> Any:
        """The model's own outputs for all images, or for all videos."""
        see = getattr(self.inner, f"get_{kind}_features")
        known = argument_names(see.__func__)
        given = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in media.items()
            if name in known
        }
        given |= {name: on_host(given[name]).tolist() for name in self.family.as_lists if name in given}
        # Other ranks may have images in parts, for which the tower runs once more.
        lacking = self.family.optional and media.keys().isdisjoint(self.family.optional) and alike.is_split(self)
        if lacking:
            given = alike.with_parts(given, self.config.image_part_side)
        pixels = contextlib.nullcontext(given) if self.raw_pixels is None else self.raw_pixels.read_by(self, given)
        with (
            pixels as given,
            alike.whole(self.inner),
            self._unread.left_out(),
            self._blamed(),
        ):
            output = see(**given, return_dict=True)
        return alike.without_last(output) if lacking else output

    def _blamed(self) -> contextlib.AbstractContextManager[None]:
        """The first time that it reads a batch, not where it only counts tokens."""
        known = self.has_read or self.device.type == "meta"
        return contextlib.nullcontext() if known else first_forward.blamed(self.config)

    @functools.cached_property
    def _unread(self) -> UnreadBlocks:
        return UnreadBlocks(self.config, self.get_encoder(modality="image"))

    @property
    def takes_videos_apart(self) -> bool:
        """Whether the stock model knows videos; to others their frames are images."""
        return takes_videos_apart(type(self.inner))

    def widen(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        features: MediaFeatures,
        media_rows: Tensor,
        left: bool = False,
        answers: Tensor | None = None,
    ) -> Widened:
        """Give every placeholder as many places as its run has tokens; padding goes to the right, or `left`.

        It is done on the host, which knows the texts and the number of features, without waiting for the device.
        `answers` are labels that say where the first answer begins, where there are no `labels`.
        """
        device = input_ids.device
        input_ids, attention_mask, media_rows = map(on_host, (input_ids, attention_mask, media_rows))
        keep = attention_mask.bool()
        places = keep & torch.isin(input_ids, torch.tensor(media_ids(self.config)))
        times, kinds = keep.to(torch.int64), torch.zeros_like(input_ids)
        read = [(n, 1 + (i >= len(features.images))) for i in media_rows.tolist() for n in features.runs[i]]
        times[places] = torch.tensor([n for n, _ in read], dtype=torch.int64)
        kinds[places] = torch.tensor([kind for _, kind in read], dtype=torch.int64)
        answers = labels if answers is None else answers
        widths = times.sum(1)
        rows, length = len(input_ids), int(widths.max())
        row = torch.repeat_interleave(torch.arange(rows), widths)
        column = torch.arange(len(row)) - (widths.cumsum(0) - widths)[row]
        if left:
            column = column + (length - widths)[row]

        def spread(values: Tensor, fill: int) -> Tensor:
            out = values.new_full((rows, length), fill)
            out[row, column] = values.flatten().repeat_interleave(times.flatten())
            return to_device(out, device)

        @functools.cache
        def token_kinds() -> Tensor:
            return spread(kinds_of(keep, kinds > 0, None if answers is None else on_host(answers)), OTHER)

        pad = self.config.get_text_config().pad_token_id
        return Widened(
            spread(input_ids, 0 if pad is None else pad),
            spread(attention_mask, 0),
            None if labels is None else spread(on_host(labels), -100),
            spread(kinds, 0),
            token_kinds,
        )

    def arguments(
        self,
        widened: Widened,
        features: MediaFeatures,
        images: dict[str, Tensor],
        videos: dict[str, Tensor],
        media_rows: Tensor,
    ) -> dict[str, Any]:
        """Arguments of the stock forward, or of `generate`, for widened texts."""
        arguments: dict[str, Any] = {"input_ids": widened.input_ids, "attention_mask": widened.attention_mask}
        known = argument_names(type(self).forward)
        for name in TYPES:
            if name in known:
                arguments[name] = self.family.token_types(self._media_kinds(widened), widened.labels)
        rows, first = on_host(media_rows), len(features.images)
        for media, own in ((images, rows[rows < first]), (videos, rows[rows >= first] - first)):
            of = {tensor.device: tensor for tensor in (to_device(own, media_rows.device), own)}
            for name in GRIDS:
                if name in known and name in media and len(own):
                    arguments[name] = both(lambda grid, of=of: grid[of[grid.device]], media[name])
            for name in self.family.sizes_of_runs:
                if name in known and name in media and len(own):
                    counts = (on_host(media[TOKEN_RUNS]) > 0).sum(1).tolist()
                    rows_of = torch.arange(sum(counts)).split(counts)
                    of_runs = torch.cat([rows_of[i] for i in own.tolist()])
                    arguments[name] = both(lambda sizes, at=of_runs: sizes[at.to(sizes.device)], media[name])
        if len(rows):
            media = rows.tolist()

            def outputs(of: list[int]) -> dict[str, Any]:
                return {kind: self.family.joined(output) for kind, output in features.read_as(of).items()}

            def by_text() -> list[list[int]]:
                return features.by_text(media, (on_host(widened.media_tokens) > 0).sum(1).tolist())

            arguments["mm_encoder_outputs"] = Outputs(outputs, media, by_text)
        return arguments

    def _expand_multimodal_outputs(
        self, input_ids: Tensor, mm_encoder_output: dict[str, Any], expand_size: int = 1, **others: Any
    ) -> dict[str, Any]:
        """Features for `expand_size` sequences of each text, in transformers' `generate`.

        Some families repeat image by image there, so that a sequence would read one image of its text several times
        and others never; others count on tokens that images do not share with videos.
        """
        if isinstance(mm_encoder_output, Outputs):
            return mm_encoder_output.repeated(expand_size)
        return super()._expand_multimodal_outputs(input_ids, mm_encoder_output, expand_size, **others)

    def _media_kinds(self, widened: Widened) -> Tensor:
        """(T, S) `media_tokens`, with 1 also for what the processor counts to an image beside its features."""
        more = getattr(self.config, "image_kind_ids", None)
        if not more:
            return widened.media_tokens
        of_images = torch.isin(widened.input_ids, torch.tensor(more, device=widened.input_ids.device))
        return torch.where(of_images & (widened.media_tokens == 0), 1, widened.media_tokens)

    def row_arguments(self, row: TextRow, arguments: dict[str, Any]) -> dict[str, Any]:
        """Replacements among the `arguments` for widened texts, if these are read as one row."""
        positions = row.position_ids
        if hasattr(self.inner, "get_rope_index"):
            # positions in time, height and width, after those that tell texts apart
            axes = [row.of(axis) for axis in self._positions(arguments)]
            positions = torch.stack([positions, *axes] if self.family.text_axis else axes)
        implementation = self.config.get_text_config()._attn_implementation or "eager"
        masks = None
        ours = self.family.looks_ahead(self.config) or not self.family.text_axis
        if ours and not implementation.startswith("flash"):
            made = self._masks(arguments)
            masks = {kind: row.mask(of) for kind, of in made.items()} if isinstance(made, dict) else row.mask(made)
        return {
            **{name: row.of(arguments[name]) for name in ("input_ids", *TYPES) if name in arguments},
            "attention_mask": masks,  # where there is none, transformers makes it of the positions
            "position_ids": positions + self.family.first_position,
            **row.attention_arguments(implementation),
        }

    def _masks(self, arguments: dict[str, Any]) -> dict[str, Tensor | None] | Tensor | None:
        """(T, 1, S, S) masks of padded rows as the model makes them, by kind of layer or one for all; None for a
        causal one. For a row of several texts transformers 5.23 reads the blocks of one text at the positions of
        another."""
        ids = arguments["input_ids"]
        make = getattr(self, "create_masks_for_generate", masking_utils.create_masks_for_generate)
        return make(
            config=self.config,
            inputs_embeds=torch.empty(*ids.shape, 1, dtype=self.dtype, device=ids.device),
            past_key_values=None,
            position_ids=None,
            is_first_iteration=True,
            **{name: arguments[name] for name in ("attention_mask", *TYPES) if name in arguments},
        )

    def _positions(self, arguments: dict[str, Any]) -> Tensor:
        """(3, T, S) positions in time, height and width; transformers would ask the device for the texts, again and
        again."""
        names = ("input_ids", "attention_mask", "mm_token_type_ids", *self._grids)
        given = {name: on_host(arguments[name]) for name in names if name in arguments}
        return to_device(self.inner.get_rope_index(**given)[0], arguments["input_ids"].device)

    def condition_of(
        self,
        features: MediaFeatures,
        image_owner: Tensor | None,
        video_owner: Tensor | None,
        text_owner: Tensor | None,
        num_slots: int | None,
        own_mask: Tensor | None = None,
    ) -> Condition:
        """Vectors that adapters of the text tower may route on; zeros for a text without image."""
        own = None if own_mask is None else own_mask.bool()
        kind = getattr(self.config, "condition", "none")
        if kind == "none":
            return Condition(own_mask=own)
        images_of = _by_slot(image_owner, video_owner, features, num_slots)
        slots = range(len(images_of)) if text_owner is None else on_host(text_owner).tolist()
        like = next(t for t in (own_mask, text_owner, *features.tokens) if t is not None)
        nothing = torch.zeros(1, self.family.width(self.config), dtype=self.dtype, device=like.device)
        per_text = []
        for slot in slots:
            mine = [features.tokens[i] for i in images_of[slot]]
            if mine and kind == "pooled":
                mine = [torch.stack([f.mean(0) for f in mine]).mean(0, keepdim=True)]
            per_text.append(torch.cat(mine) if mine else nothing)
        tokens = nn.utils.rnn.pad_sequence(per_text, batch_first=True)
        if kind == "pooled":
            return Condition(tokens, own_mask=own)
        counts = to_device(torch.tensor([len(t) for t in per_text]), tokens.device)
        return Condition(tokens, torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None], own_mask=own)


def media_ids(config: PretrainedConfig) -> list[int]:
    """Tokens that stand for features of images, and of videos where these have others."""
    names = ("image_token_id", "image_token_index"), ("video_token_id", "video_token_index")
    numbers = [
        next((getattr(config, n) for n in pair if getattr(config, n, None) is not None), None) for pair in names
    ]
    return list(dict.fromkeys(number for number in numbers if number is not None))


def takes_videos_apart(model_class: type[PreTrainedModel]) -> bool:
    """Whether a stock model knows videos."""
    return hasattr(model_class, "get_video_features")


@functools.cache
def argument_names(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the arguments of a function."""
    return frozenset(inspect.signature(function).parameters)


def _asked(labels: Tensor | None) -> int:
    """Number of the last positions that are needed to predict all labels; at least two, of which one is compared."""
    if labels is None:
        return 0
    asked = (on_host(labels) != -100).any(0).nonzero()
    first = int(asked[0]) if len(asked) else labels.shape[1]
    return min(labels.shape[1], max(2, labels.shape[1] - first + 1))


def _by_slot(
    image_owner: Tensor | None, video_owner: Tensor | None, features: MediaFeatures, num_slots: int | None
) -> list[list[int]]:
    """Numbers of the images and videos that each slot owns; without owners number i belongs to slot i."""
    pairs = ((image_owner, len(features.images)), (video_owner, len(features.videos)))
    owners = [slot for owner, n in pairs for slot in (range(n) if owner is None else on_host(owner).tolist())]
    media_of: list[list[int]] = [[] for _ in range(num_slots if num_slots is not None else len(owners))]
    for number, slot in enumerate(owners):
        media_of[slot].append(number)
    return media_of
