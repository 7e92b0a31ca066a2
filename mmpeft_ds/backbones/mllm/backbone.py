"""Backbone: multimodal language models that answer in a conversation, of any family that transformers has.

The model is transformers' own class (same parameter names) whose forward takes the packed batch. What a family does
otherwise than most stands in its file in `families/`; one without a file is tried as most are.
"""

# I images, T texts, R images as all texts read them, L text length with a placeholder for each run of image tokens

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mmpeft_ds import registry
from mmpeft_ds.backbones.common import stock
from mmpeft_ds.backbones.common.affine import Affine
from mmpeft_ds.backbones.common.generation import in_step, one_of
from mmpeft_ds.backbones.common.spelling import Spelling
from mmpeft_ds.backbones.common.stock_backbone import WHERE, StockBackbone
from mmpeft_ds.backbones.mllm import families
from mmpeft_ds.backbones.mllm.chat import Chat, read_template
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.image_tokens import ImageTokens
from mmpeft_ds.backbones.mllm.model import ImageText
from mmpeft_ds.backbones.mllm.options import Options
from mmpeft_ds.backbones.mllm.processing import (
    TOKEN_RUNS,
    PixelTransform,
    SpelledTransform,
    read_image_processor,
    read_processor,
)
from mmpeft_ds.data.batch import CollatedTexts, GenerationOutput, PackedBatch, Prompted
from mmpeft_ds.errors import BadInput
from mmpeft_ds.host_copies import both, on_host, to_device
from mmpeft_ds.sites.base import base_model
from mmpeft_ds.sites.condition import conditioned

# What an image processor and the vision tower must have alike, where both have it.
_SAME = (
    ("patch_size", "patch_size"),
    ("merge_size", "spatial_merge_size"),
    ("temporal_patch_size", "temporal_patch_size"),
)


class MllmBackbone(StockBackbone):
    """Multimodal language models as recipes use them."""

    Options = Options
    families = ()
    generates = True

    def check(self) -> None:
        """Refuse what cannot work, from configurations, tokenizer and chat template."""
        o = self.options
        self._refuse_unknown()
        if o.max_text_length < 16:
            raise BadInput(f"backbone.max_text_length: {o.max_text_length}. A conversation needs 16 tokens at least.")
        if o.max_pixels < 0 or 0 < o.max_pixels < 28 * 28:
            raise BadInput(f"backbone.max_pixels: {o.max_pixels}. Use 0, or at least 784 (one token).")
        if not self._tokenizer.is_fast or self._tokenizer.eos_token is None:
            raise BadInput(f"{WHERE}: {o.model!r} needs a fast tokenizer (tokenizer.json) with an end token.")
        self._chat.check()
        self._check_processor()

    def _check_processor(self) -> None:
        """Refuse an image processor that makes other patches or images than the vision tower reads."""
        # Some families have their vision tower's settings under another name; its sizes are then not compared.
        vision, processor = getattr(self._config, "vision_config", None), self._image_processor
        pairs = {
            (ours, theirs): (getattr(processor, ours), getattr(vision, theirs))
            for ours, theirs in _SAME
            if isinstance(getattr(processor, ours, None), int) and isinstance(getattr(vision, theirs, None), int)
        }
        black = self.image_transform(False)(self.dummy("image"), torch.Generator())
        if vision and vision.model_type in ("clip_vision_model", "siglip_vision_model"):  # which take one size alone
            pairs["crop_size", "image_size"] = black["pixel_values"].shape[-1], vision.image_size
        for (ours, theirs), (made, read) in pairs.items():
            if made != read:
                raise BadInput(
                    f"{WHERE}: {self.options.model!r}: preprocessor_config.json has {ours} {made}, but the vision "
                    f"tower of config.json has {theirs} {read}. Take both files of one checkpoint."
                )
        if self._family.spelled:
            self._image_tokens.check(black)

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The pretrained model, everything frozen."""
        o, config = self.options, copy.deepcopy(self._config)
        config.condition = o.condition  # saved with the model
        mixin = _mixin_of(self._family)
        model_class = stock.publishing(mixin, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)])
        load = (model_class, o.model, WHERE, config, self.dtype, self.attention)
        return stock.load(*load, o.random_weights, on_meta, self.device)

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], dict[str, Tensor]]:
        """The checkpoint's image processor, without normalising where that can come later; no augmentation."""
        if self._family.spelled:
            return SpelledTransform(self._processor, self._family.alone(self._processor), self._image_token)
        side = self._family.min_side(self._image_processor)
        return PixelTransform(self._image_processor, (side, side) if side else None)

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]:
        """What the processor makes of each image, put together as the family has it: images, tiles of all images,
        tiles padded to their largest number, or patches of all images (N, values of a patch), and sizes or grids."""
        return {name: self._family.collate([image[name] for image in images]) for name in images[0]}

    def collate_texts(self, texts: list[str | Prompted]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` (T, L), and `prompt_length` (T,): tokens before the last answer."""
        encoded = [self._chat.encode(text) for text in texts]

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=fill)

        tensors = {
            "input_ids": padded([e.ids for e in encoded], self._pad_id),
            "attention_mask": padded([[1] * len(e.ids) for e in encoded], 0),
            "labels": padded([e.labels for e in encoded], -100),
            "prompt_length": torch.tensor([e.prompt_length for e in encoded]),
        }
        return CollatedTexts(tensors, torch.tensor([[e.cut, e.cut_answer, e.control] for e in encoded]))

    def dummy(self, modality: str) -> Any:
        """A black image of 28 x 56 pixels (two tokens of Qwen's or Mistral's), or a conversation of one word each."""
        return torch.zeros(3, 28, 56, dtype=torch.uint8) if modality == "image" else super().dummy(modality)

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments; pixels are normalised here, on the device of the batch."""
        texts = {name: batch.texts[name] for name in ("input_ids", "attention_mask", "labels")}
        ids, mask = (on_host(texts[name]) for name in ("input_ids", "attention_mask"))
        places = mask.bool() & (ids == self._config.image_token_id)
        return {
            **texts,
            "images": self._images(batch),
            "image_rows": self._image_rows(batch, places.sum(1).tolist()),
            "image_owner": batch.image_owner,
            "text_owner": batch.text_owner,
            "num_slots": len(batch.sample_id),
            "padding_free": batch.padding_free,
        }

    def read(self, outputs: Any, batch: PackedBatch) -> GenerationOutput:
        """Logits of the last positions, each beside the token that follows it."""
        logits, labels = outputs["logits"], outputs["labels"]
        labels = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
        text_of = outputs.get("text_of")
        if text_of is not None:  # each label beside the token that predicts it, so of the text that stands there
            text_of = text_of[:, text_of.shape[1] - labels.shape[1] :]
        return GenerationOutput(
            logits[:, :-1],
            labels,
            tie=outputs.get("tie"),
            text_of=text_of,
            texts=len(batch.text_owner),
            lengths=outputs["lengths"],
            positions=outputs["positions"],
        )

    def output_layer(self, model: nn.Module) -> nn.Module | None:
        """transformers' output embeddings where nothing is done to what they return: some families scale or cap it."""
        stock_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self._config)]
        return super().output_layer(model) if _logits_are_left_alone(stock_class) else None

    def labels_at(self, model: Any, batch: PackedBatch, positions: int) -> Tensor:
        """The token that follows each of the last positions, image tokens counted; nothing follows the last."""

        def following(labels: Tensor) -> Tensor:
            return nn.functional.pad(labels[:, labels.shape[1] - positions + 1 :], (0, 1), value=-100)

        return both(following, model.widened_labels)

    def tokens(self, texts: list[str | Prompted], image_sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """Of all conversations of a sample, each of which reads its images."""
        counted = [self._image_tokens(*size) for size in image_sizes]
        images = sum(tokens for tokens, _ in counted)
        spellings = tuple(spelling for _, spelling in counted if spelling)
        marks = sum(spelling.count(self._image_token) if spelling else 1 for _, spelling in counted)
        texts = [dataclasses.replace(t, spellings=spellings) if isinstance(t, Prompted) else t for t in texts]
        return sum(len(self._chat.encode(text).ids) + images - marks for text in texts), images

    def costs(self, tokens: np.ndarray, of_images: np.ndarray) -> np.ndarray:
        """Of the language model, whose attention grows with the square, and of the vision tower."""
        # Of 24 d^2 + 2 t d operations a token and layer, t tokens under a causal mask, the first are those of weights.
        width = self._config.get_text_config().hidden_size
        return tokens * (1 + tokens / (12 * width)) + of_images * self._image_tokens.relative_cost

    def tokens_key(self) -> str:
        """Of tokenizer, template, limits and image processor."""
        o, processor = self.options, self._image_processor.to_dict()
        words = self._tokenizer.backend_tokenizer.to_str()
        limits = [o.max_text_length, o.max_pixels, o.system, self._chat.template]
        return stock.short_hash([words, limits, self._config.to_dict(), {k: str(v) for k, v in processor.items()}])

    def check_generation(self, options: dict[str, Any]) -> None:
        """Refuse a length that counts the prompt."""
        if "max_length" in options:
            raise BadInput("task.max_length: prompts have hundreds of image tokens. Set it 0, and max_new_tokens.")

    @torch.no_grad()
    def generate(self, model: Any, batch: PackedBatch, choices: list[str] | None = None, **options: Any) -> list[str]:
        """The answer generated after the prompt of each text, which ends where the last answer begins.

        Args:
            model: the PeftModel, or the base; under ZeRO-3 all ranks call it together.
            choices: the only answers that may be given.
            options: of transformers' `generate`, without `max_length`, since prompts have hundreds of image tokens.
        """
        self.check_generation(options)
        base = base_model(model)
        ids, lengths = batch.texts["input_ids"], batch.texts["prompt_length"]
        prompts = batch.texts["attention_mask"] * (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None])
        places = prompts.bool() & (ids == self._config.image_token_id)
        rows = self._image_rows(batch, places.sum(1).tolist())
        images = self._images(batch)
        features = base.image_features(images)
        widened = base.widen(ids, prompts, None, features, rows, left=True)
        length, end = widened.input_ids.shape[1], self._tokenizer.eos_token_id
        settings = {
            "pad_token_id": self._pad_id,
            "eos_token_id": self._end_ids(base),
            "suppress_tokens": [self._config.image_token_id],  # a placeholder without image would be an error
            "do_sample": False,
            **options,
        }
        if choices:
            known = [[t for t in self._chat.encode(Prompted("a", c)).labels if t not in (-100, end)] for c in choices]
            settings |= {"prefix_allowed_tokens_fn": one_of(known, end, skip=length)}
            settings |= {"max_new_tokens": max(map(len, known)) + 1}
        condition = base.condition_of(features, batch.image_owner, batch.text_owner, len(batch.sample_id))
        with conditioned(condition):
            ids = model.generate(
                **base.arguments(widened, features, images, rows),
                synced_gpus=in_step(base),
                **settings,
            )
        return self._spelling.decode_all(ids[:, length:].tolist(), choices)

    def as_generated(self, text: str) -> str | None:
        """`text` through the tokenizer."""
        return self._spelling.as_generated(text)

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """Each tower without a trainable, or its embeddings."""
        base = base_model(model)
        text, images = base.get_decoder(), base.get_encoder(modality="image")
        path_of = {module: path for path, module in model.named_modules()}
        towers = {path_of[text]: _first(text, text.get_input_embeddings())}
        if images is not base:
            towers |= {path_of[images]: _first(images, next(m for m in images.modules() if not list(m.children())))}
        return stock.untrained(model, towers)

    @property
    def condition_width(self) -> int | None:
        """Width of the language model, into which the projector maps; None without a condition."""
        return None if self.options.condition == "none" else self._config.get_text_config().hidden_size

    # parts

    @functools.cached_property
    def _family(self) -> Family:
        known = (registry.load(families, name, WHERE) for name in registry.names(families))
        return next((f for f in known if self._config.model_type in f.model_types), Family())

    @property
    def packs(self) -> bool:
        """Whether texts may stand in one row, which depends on the family."""
        return self._family.packs

    @functools.cached_property
    def _image_processor(self) -> Any:
        return read_image_processor(self.options.model, WHERE, self.options.max_pixels)

    @functools.cached_property
    def _processor(self) -> Any:
        o = self.options
        return read_processor(o.model, WHERE, self._config, self._family, self._image_processor, self._tokenizer)

    @functools.cached_property
    def _image_tokens(self) -> ImageTokens:
        merge = getattr(getattr(self._config, "vision_config", None), "spatial_merge_size", 1)
        build = functools.partial(self.build, on_meta=True)
        return ImageTokens(self.image_transform(False), self.collate_images, merge, build)

    @functools.cached_property
    def _image_token(self) -> str:
        number = getattr(self._config, "image_token_id", None)
        token = None if number is None else self._tokenizer.convert_ids_to_tokens(number)
        if token is None:
            raise BadInput(
                f"{WHERE}: {self.options.model!r}: its tokenizer has no token for the features of an image "
                f"(image_token_id {number} of config.json). Take both files of one checkpoint."
            )
        return token

    @functools.cached_property
    def _chat(self) -> Chat:
        o = self.options
        return Chat(
            self._tokenizer,
            read_template(o.model, WHERE, o.chat_template, self._tokenizer, self._family.template),
            self._image_token,
            self._family.mark(self._processor) if self._family.spelled else self._image_token,
            o.system,
            o.max_text_length,
        )

    @functools.cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._tokenizer)

    @functools.cached_property
    def _normalise(self) -> Affine:
        p = self._image_processor
        mean, std = (p.image_mean, p.image_std) if p.do_normalize else ([0.0] * 3, [1.0] * 3)
        return Affine(list(mean), list(std), self._family.channels, scale=p.rescale_factor)

    @property
    def _pad_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        return self._tokenizer.eos_token_id if pad is None else pad

    def _end_ids(self, base: PreTrainedModel) -> list[int]:
        """Tokens that end an answer: the checkpoint's, and the one that labels end with in training."""
        ends = base.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return sorted({*ends, self._tokenizer.eos_token_id})

    def _images(self, batch: PackedBatch) -> dict[str, Tensor]:
        images = dict(batch.images)
        if images and self._family.channels is not None:
            pixels = images["pixel_values"]
            flat = pixels.unflatten(1, (3, -1)) if pixels.dim() == 2 else pixels
            images["pixel_values"] = self._normalise(flat).view(pixels.shape)
        return images

    def _image_rows(self, batch: PackedBatch, places: list[int]) -> Tensor:
        """(R,) images as the texts read them: a text names the images of its slot in their order.

        A text of weight 0 that was cropped may name fewer than there are; the others are not seen.
        """
        runs = batch.images.get(TOKEN_RUNS)
        runs_of = [1] * len(batch.image_owner) if runs is None else (on_host(runs) > 0).sum(1).tolist()
        images: dict[int, list[int]] = {}
        for image, slot in enumerate(on_host(batch.image_owner).tolist()):
            images.setdefault(slot, []).append(image)
        owners = on_host(batch.text_owner).tolist()
        rows = []
        for slot, n in zip(owners, places, strict=True):
            for image in images.get(slot, []):
                if n >= runs_of[image] > 0:
                    rows.append(image)
                    n -= runs_of[image]
            if n:
                raise BadInput(f"backbone: a text has {n} placeholders more than its sample has images.")
        return to_device(torch.tensor(rows, dtype=torch.int64), batch.text_owner.device)

    def _refuse_unknown(self) -> None:
        """Refuse a family that lacks what most have, and say what it is. Raises BadInput."""
        kind, name = self._config.model_type, self.options.model
        stock_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(self._config), None)
        if stock_class is None:
            known = "transformers knows no image-text-to-text model of it"
        elif self._config.is_encoder_decoder:
            known = "its text tower has an encoder, which answers would not be read by"
        elif "mm_encoder_outputs" not in inspect.signature(stock_class.forward).parameters:
            known = f"{stock_class.__name__} does not take the features of images (`mm_encoder_outputs`)"
        elif not hasattr(stock_class, "get_image_features"):
            known = f"{stock_class.__name__} does not give the features of images (`get_image_features`)"
        else:
            return
        raise BadInput(f"{WHERE}: {name!r} is of family {kind!r}, and {known}.")


@functools.cache
def _mixin_of(family: Family) -> type[ImageText]:
    return type("ImageText", (ImageText,), {"family": family, "__module__": ImageText.__module__})


@functools.cache
def _logits_are_left_alone(stock_class: type[PreTrainedModel]) -> bool:
    """Whether the forward of a class sets `logits` once, to what `lm_head` returns. A source of another form is taken
    for one that changes them, which costs memory alone."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(stock_class.forward))))
    made = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {inner.id for t in targets for inner in ast.walk(t) if isinstance(inner, ast.Name)}
            made += [node.value] if "logits" in names else []
    return len(made) == 1 and isinstance(made[0], ast.Call) and ast.unparse(made[0].func) == "self.lm_head"


def _first(tower: nn.Module, module: nn.Module) -> str:
    """Path below `tower` of `module`."""
    return next(path for path, inner in tower.named_modules() if inner is module)


ENTRY = MllmBackbone
