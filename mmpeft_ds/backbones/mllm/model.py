"""Multimodal language models: a mixin with which transformers' own classes take the packed batch.

Texts come with one placeholder for each run of image tokens. The vision tower runs once per image, and then every
placeholder is widened to the length of its run: all features of an image that is one run, or what the checkpoint's
processor wrote, which is compared with the features. So no rule of any image processor is repeated here. The published
condition is made of the image features behind the projector.
"""

# I images, T texts, R images as all texts read them, L text length with placeholders, S with image tokens, d width

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.backbones.common.stock import Publishing
from mmpeft_ds.backbones.common.text_row import TextRow
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.image_features import ImageFeatures
from mmpeft_ds.backbones.mllm.processing import TOKEN_RUNS
from mmpeft_ds.host_copies import both, on_host, to_device
from mmpeft_ds.sites.condition import Condition, conditioned, current

# Names under which models ask for the kinds of tokens.
TYPES = ("mm_token_type_ids", "token_type_ids")


@dataclass
class Widened:
    """Texts in which every placeholder is replaced by as many tokens as its image has features.

    Attributes:
        input_ids, attention_mask: (T, S), padded on one side.
        labels: (T, S), -100 where nothing is asked; None if there were none.
        image_tokens: (T, S) int64, 1 where an image token stands.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    image_tokens: Tensor


class ImageText(Publishing):
    """Mixin over the `ForConditionalGeneration` classes: with `image_rows` for the packed batch, else stock.

    `config.condition` says what is published: `none`, the `pooled` vector of an image (mean of its tokens, mean over
    the images of a slot), or all its `tokens`.

    Attributes:
        family: what is special about it.
        widened_labels: (T, S) of the packed batch that was seen last, -100 at image tokens.
    """

    family: Family

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: dict[str, Tensor] | None = None,
        image_rows: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        padding_free: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The stock forward; or, given `image_rows`, that of a packed batch.

        Args:
            input_ids, attention_mask, labels: (T, L), padded on the right, with a placeholder for each run of image
                tokens.
            images: as the family's processor makes them and `collate_images` puts them together.
            image_rows: (R,) images as the texts read them, one after the other, each once a text.
            image_owner, text_owner, num_slots: as in the packed batch; only a condition needs them.
            padding_free: read all texts as one row, one behind the other and each by itself.

        Returns:
            the stock output; of a packed batch besides `labels` (T, S), and `logits` for the last positions only, from
            the first that predicts a label: (T, K, V), K <= S. With `padding_free` they are (1, N) and (1, K, V), and
            `text_of` (1, N) says whose token each is. Also `lengths` (T,) of the widened texts, and `positions`, the
            number that was computed for them.
        """
        if image_rows is None:
            own = {} if labels is None else {"labels": labels}
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **own, **kwargs
            )
        features = self.image_features(images or {})
        widened = self.widen(input_ids, attention_mask, labels, features, image_rows)
        condition = current()  # one that the caller has set around the call takes precedence
        if condition is None:
            condition = self.condition_of(features, image_owner, text_owner, num_slots, widened.attention_mask)
        arguments, labels = self.arguments(widened, features, images or {}, image_rows), widened.labels
        row = TextRow(both(Tensor.bool, widened.attention_mask)) if padding_free else None
        if row is None and "image_grid_thw" in arguments and hasattr(self.model, "get_rope_index"):
            arguments["position_ids"] = self._positions(arguments)
        if row is not None:
            arguments |= self.row_arguments(row, arguments)
            labels = None if labels is None else row.labels(labels)
            condition = dataclasses.replace(condition, segments=row.segments)
        self.widened_labels = labels
        with conditioned(condition):
            outputs = super().forward(**arguments, logits_to_keep=_asked(labels), use_cache=False, **kwargs)
        if labels is not None:
            outputs["labels"] = labels
        outputs["lengths"], outputs["positions"] = widened.attention_mask.sum(1), arguments["input_ids"].numel()
        if row is not None:
            outputs["text_of"] = row.text_of
        unread = sorted(set(range(len(features))) - set(on_host(image_rows).tolist()))
        if unread and torch.is_grad_enabled() and features.tokens[0].requires_grad:
            # All ranks must reach the vision tower in backward, also one whose images no text refers to.
            outputs["tie"] = sum(features.tokens[i].sum() for i in unread) * 0
        return outputs

    @property
    def runs_unevenly(self) -> tuple[str, ...]:
        """The blocks of the vision tower and what stands behind it: in some families a part of them runs once an
        image."""
        text, tower = self.get_decoder(), self.get_encoder(modality="image")
        paths = []
        for name, child in self.model.named_children():
            if child is tower:
                lists = [path for path, module in child.named_modules() if isinstance(module, nn.ModuleList)]
                outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
                blocks = [f"{path}.{i}" for path in outer for i in range(len(child.get_submodule(path)))]
                paths += [f"model.{name}.{path}" for path in blocks]
            elif child is not text:
                paths.append(f"model.{name}")
        return tuple(paths)

    def image_features(self, images: dict[str, Tensor]) -> ImageFeatures:
        """Behind the projector; each image is seen once."""
        if not images:
            return ImageFeatures([], [])
        known = _parameters(type(self.model).get_image_features)
        given = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in images.items()
            if name in known
        }
        with _whole(self.model, "image_newline"):
            output = self.model.get_image_features(**given, return_dict=True)
        return ImageFeatures.of(output, images.get(TOKEN_RUNS))

    def widen(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None,
        features: ImageFeatures,
        image_rows: Tensor,
        left: bool = False,
    ) -> Widened:
        """Give every placeholder as many places as its image has features; padding goes to the right, or `left`.

        It is done on the host, which knows the texts and how many features there are, and goes on without the device.
        """
        device = input_ids.device
        input_ids, attention_mask, image_rows = map(on_host, (input_ids, attention_mask, image_rows))
        keep = attention_mask.bool()
        places = keep & (input_ids == self.config.image_token_id)
        times = keep.to(torch.int64)
        times[places] = torch.tensor([n for i in image_rows.tolist() for n in features.runs[i]], dtype=torch.int64)
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

        pad = self.config.get_text_config().pad_token_id
        return Widened(
            spread(input_ids, 0 if pad is None else pad),
            spread(attention_mask, 0),
            None if labels is None else spread(on_host(labels), -100),
            spread(places.to(torch.int64), 0),
        )

    def arguments(
        self, widened: Widened, features: ImageFeatures, images: dict[str, Tensor], image_rows: Tensor
    ) -> dict[str, Any]:
        """Arguments of the stock forward, or of `generate`, for widened texts."""
        arguments: dict[str, Any] = {"input_ids": widened.input_ids, "attention_mask": widened.attention_mask}
        known = _parameters(type(self).forward)
        for name in TYPES:
            if name in known:
                arguments[name] = self.family.token_types(widened.image_tokens, widened.labels)
        if "image_grid_thw" in known and "image_grid_thw" in images and len(image_rows):
            rows = {tensor.device: tensor for tensor in (image_rows, on_host(image_rows))}
            arguments["image_grid_thw"] = both(lambda grid: grid[rows[grid.device]], images["image_grid_thw"])
        if len(image_rows):
            arguments["mm_encoder_outputs"] = {"image": features.read_as(on_host(image_rows).tolist())}
        return arguments

    def row_arguments(self, row: TextRow, arguments: dict[str, Any]) -> dict[str, Any]:
        """What changes in the `arguments` for widened texts where these are read as one row."""
        positions = row.position_ids
        if hasattr(self.model, "get_rope_index"):
            # positions in time, height and width, behind those that tell texts apart
            positions = torch.stack([positions, *(row.of(axis) for axis in self._positions(arguments))])
        implementation = self.config.get_text_config()._attn_implementation or "eager"
        return {
            **{name: row.of(arguments[name]) for name in ("input_ids", *TYPES) if name in arguments},
            "attention_mask": None,  # transformers makes it of the positions
            "position_ids": positions,
            **row.attention_arguments(implementation),
        }

    def _positions(self, arguments: dict[str, Any]) -> Tensor:
        """(3, T, S) positions in time, height and width; transformers would ask the device for the texts, again and
        again."""
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        given = {name: on_host(arguments[name]) for name in names if name in arguments}
        return to_device(self.model.get_rope_index(**given)[0], arguments["input_ids"].device)

    def condition_of(
        self,
        features: ImageFeatures,
        image_owner: Tensor | None,
        text_owner: Tensor | None,
        num_slots: int | None,
        own_mask: Tensor | None = None,
    ) -> Condition:
        """Vectors that adapters of the text tower may route on; zeros for a text without image."""
        own = None if own_mask is None else own_mask.bool()
        kind = getattr(self.config, "condition", "none")
        if kind == "none":
            return Condition(own_mask=own)
        images_of = _images_by_slot(image_owner, len(features), num_slots)
        slots = range(len(images_of)) if text_owner is None else on_host(text_owner).tolist()
        like = next(t for t in (own_mask, text_owner, *features.tokens) if t is not None)
        nothing = torch.zeros(1, self.config.get_text_config().hidden_size, dtype=self.dtype, device=like.device)
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


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _asked(labels: Tensor | None) -> int:
    """How many of the last positions are needed to predict all labels; at least two, of which one is compared."""
    if labels is None:
        return 0
    asked = (on_host(labels) != -100).any(0).nonzero()
    first = int(asked[0]) if len(asked) else labels.shape[1]
    return min(labels.shape[1], max(2, labels.shape[1] - first + 1))


def _images_by_slot(image_owner: Tensor | None, images: int, num_slots: int | None) -> list[list[int]]:
    """Numbers of the images that each slot owns; None: image i belongs to slot i."""
    owners = list(range(images)) if image_owner is None else on_host(image_owner).tolist()
    images_of: list[list[int]] = [[] for _ in range(num_slots if num_slots is not None else len(owners))]
    for image, slot in enumerate(owners):
        images_of[slot].append(image)
    return images_of


@contextlib.contextmanager
def _whole(module: nn.Module, name: str) -> Iterator[None]:
    """Keep a parameter directly on `module` gathered while a method other than its forward reads it.

    ZeRO-3 gathers such a parameter for the module's forward only.
    """
    parameter = getattr(module, name, None)
    if not hasattr(parameter, "ds_id") or parameter.numel() == parameter.ds_numel:
        yield  # not partitioned, resident, or still there from the last step
        return
    parameter.all_gather()  # what DeepSpeed gives every parameter that it has partitioned
    try:
        yield
    finally:
        parameter.partition(has_been_updated=False)
