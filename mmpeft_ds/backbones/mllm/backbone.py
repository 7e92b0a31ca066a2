"""Backbone: multimodal language models (LLaVA-1.5, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL) that answer in a conversation.

The model is transformers' own class (same parameter names) whose forward takes the packed batch. Image processor,
tokenizer and chat template are read one by one, since a processor as a whole may need packages that are not needed.
"""

# I images, T texts, R placeholders, L text length with one placeholder per image

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mmpeft_ds.backbones.common import stock, tower_loading
from mmpeft_ds.backbones.common.affine import Affine
from mmpeft_ds.backbones.common.generation import in_step, one_of
from mmpeft_ds.backbones.common.spelling import Spelling
from mmpeft_ds.backbones.common.stock_backbone import WHERE, StockBackbone
from mmpeft_ds.backbones.mllm.chat import Chat, read_template
from mmpeft_ds.backbones.mllm.image_tokens import ImageTokens
from mmpeft_ds.backbones.mllm.model import ImageText
from mmpeft_ds.backbones.mllm.options import Options
from mmpeft_ds.data.batch import CollatedTexts, GenerationOutput, PackedBatch, Prompted
from mmpeft_ds.data.transform import ImageTransform
from mmpeft_ds.errors import BadInput
from mmpeft_ds.host_copies import both, on_host, to_device
from mmpeft_ds.sites.base import base_model
from mmpeft_ds.sites.condition import conditioned

QWEN = ("qwen2_vl", "qwen2_5_vl")
FAMILIES = ("llava", "llava_next", *QWEN)
# Where the channels stand in the pixels of an image batch; Qwen's patches are flat, channels first.
CHANNELS = {"llava": 1, "llava_next": 2, "qwen2_vl": 1, "qwen2_5_vl": 1}


@dataclass(frozen=True)
class ProcessorTransform(ImageTransform):
    """uint8 (3, H, W) -> output of the family's image processor, still uint8: normalising comes on the device.

    Attributes:
        processor: the image processor, which resizes, crops and cuts into tiles or patches.
        min_size: (height, width) that a decoder at reduced scale must not go below; None: the full image is needed.
    """

    processor: Any
    min_size: tuple[int, int] | None = None

    def __call__(self, image: Tensor, generator: Any = None) -> dict[str, Tensor]:
        out = self.processor(
            images=[image.numpy()],
            do_rescale=False,
            do_normalize=False,
            input_data_format="channels_first",
            return_tensors="pt",
        )
        tensors = {name: out[name] for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in out}
        # Pillow has rounded to whole numbers, so nothing is lost.
        tensors["pixel_values"] = tensors["pixel_values"].to(torch.uint8)
        return tensors


class MllmBackbone(StockBackbone):
    """Multimodal language models as recipes use them."""

    Options = Options
    families = FAMILIES
    generates = True
    packs = True

    def check(self) -> None:
        """Refuse what cannot work, from configurations, tokenizer and chat template."""
        o = self.options
        if o.max_text_length < 16:
            raise BadInput(f"backbone.max_text_length: {o.max_text_length}. A conversation needs 16 tokens at least.")
        if o.max_pixels and self._config.model_type not in QWEN:
            raise BadInput(f"backbone.max_pixels: {o.model!r} sees images at sizes of its own. Leave it 0.")
        if o.max_pixels < 0 or 0 < o.max_pixels < 28 * 28:
            raise BadInput(f"backbone.max_pixels: {o.max_pixels}. Use 0, or at least 784 (one token).")
        if not self._tokenizer.is_fast or self._tokenizer.eos_token is None:
            raise BadInput(f"{WHERE}: {o.model!r} needs a fast tokenizer (tokenizer.json) with an end token.")
        self._chat.check()
        self._check_processor()

    def _check_processor(self) -> None:
        """Refuse an image processor that makes other patches or images than the vision tower reads."""
        vision, processor = self._config.vision_config, self._processor
        pairs = {}
        if self._config.model_type in QWEN:
            for ours, theirs in (
                ("patch_size",) * 2,
                ("merge_size", "spatial_merge_size"),
                ("temporal_patch_size",) * 2,
            ):
                pairs[ours, theirs] = getattr(processor, ours), getattr(vision, theirs)
        elif vision.model_type in ("clip_vision_model", "siglip_vision_model"):  # which take one size alone
            black = self.image_transform(False)(self.dummy("image"), torch.Generator())
            pairs["crop_size", "image_size"] = (
                self.collate_images([black])["pixel_values"].shape[-1],
                vision.image_size,
            )
        for (ours, theirs), (made, read) in pairs.items():
            if made != read:
                raise BadInput(
                    f"{WHERE}: {self.options.model!r}: preprocessor_config.json has {ours} {made}, but the vision "
                    f"tower of config.json has {theirs} {read}. Take both files of one checkpoint."
                )

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The pretrained model, everything frozen."""
        o, config = self.options, copy.deepcopy(self._config)
        config.condition = o.condition  # saved with the model
        stock_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        model_class = stock.publishing(ImageText, stock_class)
        load = (model_class, o.model, WHERE, config, self.dtype, self.attention)
        return stock.load(*load, o.random_weights, on_meta, self.device)

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], dict[str, Tensor]]:
        """The checkpoint's image processor without normalising; no augmentation."""
        side = None
        if self._config.model_type == "llava":
            size = self._processor.size
            side = size.get("shortest_edge") or size.get("height")
        return ProcessorTransform(self._processor, (side, side) if side else None)

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]:
        """LLaVA (I, 3, H, W); LLaVA-NeXT tiles (I, most tiles, 3, H, W) and `image_sizes` (I, 2); Qwen patches of all
        images (N, values of a patch) and `image_grid_thw` (I, 3)."""
        names = [name for name in images[0] if name != "pixel_values"]
        sizes = {name: torch.cat([image[name] for image in images]) for name in names}
        pixels = [image["pixel_values"] for image in images]
        if self._config.model_type == "llava_next":
            tiles = [p[0] for p in pixels]  # tiles that only pad the number are left out by the model
            return {"pixel_values": nn.utils.rnn.pad_sequence(tiles, batch_first=True), **sizes}
        return {"pixel_values": torch.cat(pixels), **sizes}

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
        """A black image of 28 x 28 pixels (one token of Qwen's), or a conversation of one word each."""
        return torch.zeros(3, 28, 28, dtype=torch.uint8) if modality == "image" else super().dummy(modality)

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments; pixels are normalised here, on the device of the batch."""
        texts = {name: batch.texts[name] for name in ("input_ids", "attention_mask", "labels")}
        ids, mask = (on_host(texts[name]) for name in ("input_ids", "attention_mask"))
        places = mask.bool() & (ids == self._config.image_token_id)
        return {
            **texts,
            **self._images(batch),
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

    def labels_at(self, model: Any, batch: PackedBatch, positions: int) -> Tensor:
        """The token that follows each of the last positions, image tokens counted; nothing follows the last."""

        def following(labels: Tensor) -> Tensor:
            return nn.functional.pad(labels[:, labels.shape[1] - positions + 1 :], (0, 1), value=-100)

        return both(following, model.widened_labels)

    def tokens(self, texts: list[str | Prompted], image_sizes: list[tuple[int, int]]) -> tuple[int, int]:
        """Of all conversations of a sample, each of which reads its images."""
        images = sum(self._image_tokens(*size) for size in image_sizes)
        added = images - len(image_sizes)  # beside the placeholders
        return sum(len(self._chat.encode(text).ids) + added for text in texts), images

    def costs(self, tokens: np.ndarray, of_images: np.ndarray) -> np.ndarray:
        """Of the language model, whose attention grows with the square, and of the vision tower."""
        # Of 24 d^2 + 2 t d operations a token and layer, t tokens under a causal mask, the first are those of weights.
        width = self._config.text_config.hidden_size
        return tokens * (1 + tokens / (12 * width)) + of_images * self._image_tokens.relative_cost

    def tokens_key(self) -> str:
        """Of tokenizer, template, limits and image processor."""
        o, processor = self.options, self._processor.to_dict()
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
                **base.arguments(widened, features, images.get("image_grid_thw"), rows),
                synced_gpus=in_step(base),
                **settings,
            )
        return self._spelling.decode_all(ids[:, length:].tolist(), choices)

    def as_generated(self, text: str) -> str | None:
        """`text` through the tokenizer."""
        return self._spelling.as_generated(text)

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """Each tower without a trainable, or its embeddings."""
        vision = ("visual", "patch_embed") if self._config.model_type in QWEN else ("vision_tower", "embeddings")
        towers = {f"model.{vision[0]}": vision[1], "model.language_model": "embed_tokens"}
        return stock.untrained(model, towers)

    @property
    def condition_width(self) -> int | None:
        """Width of the language model, into which the projector maps; None without a condition."""
        return None if self.options.condition == "none" else self._config.text_config.hidden_size

    # parts

    @functools.cached_property
    def _processor(self) -> Any:
        """The image processor in its Pillow form, which gives the same pixels whether or not torchvision is there."""
        changes: dict[str, Any] = {}
        place = tower_loading.locate(self.options.model, WHERE)
        try:
            processor = AutoImageProcessor.from_pretrained(place, backend="pil", trust_remote_code=False)
            if self.options.max_pixels:
                least = min(processor.size["shortest_edge"], self.options.max_pixels)
                changes["size"] = {"shortest_edge": least, "longest_edge": self.options.max_pixels}
                # Where the checkpoint's file has these keys, as those on the hub do, they win over `size`.
                changes |= {"min_pixels": least, "max_pixels": self.options.max_pixels}
                processor = AutoImageProcessor.from_pretrained(
                    place, backend="pil", **changes, trust_remote_code=False
                )
        except (OSError, ValueError, ImportError) as error:
            reason = tower_loading.first_line(error)
            raise BadInput(
                f"{WHERE}: cannot read the image processor of {self.options.model!r} ({reason}). "
                "Its directory needs preprocessor_config.json."
            ) from error
        return processor

    @functools.cached_property
    def _image_tokens(self) -> ImageTokens:
        merge = getattr(self._config.vision_config, "spatial_merge_size", 1)
        build = functools.partial(self.build, on_meta=True)
        return ImageTokens(self.image_transform(False), self.collate_images, merge, build)

    @functools.cached_property
    def _chat(self) -> Chat:
        o = self.options
        return Chat(
            self._tokenizer,
            read_template(o.model, WHERE, o.chat_template, self._tokenizer),
            self._tokenizer.convert_ids_to_tokens(self._config.image_token_id),
            o.system,
            o.max_text_length,
        )

    @functools.cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._tokenizer)

    @functools.cached_property
    def _normalise(self) -> Affine:
        p = self._processor
        mean, std = (p.image_mean, p.image_std) if p.do_normalize else ([0.0] * 3, [1.0] * 3)
        return Affine(list(mean), list(std), CHANNELS[self._config.model_type], scale=p.rescale_factor)

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
        if images:
            pixels = images["pixel_values"]
            flat = pixels.unflatten(1, (3, -1)) if self._config.model_type in QWEN else pixels
            images["pixel_values"] = self._normalise(flat).view(pixels.shape)
        return images

    def _image_rows(self, batch: PackedBatch, places: list[int]) -> Tensor:
        """(R,) image of each placeholder: a text names the images of its slot in their order.

        A text of weight 0 that was cropped may name fewer than there are; the others are not seen.
        """
        images: dict[int, list[int]] = {}
        for image, slot in enumerate(on_host(batch.image_owner).tolist()):
            images.setdefault(slot, []).append(image)
        owners = on_host(batch.text_owner).tolist()
        rows = [i for slot, n in zip(owners, places, strict=True) for i in images.get(slot, [])[:n]]
        if len(rows) != sum(places):
            raise BadInput(
                f"backbone: texts of this batch hold {sum(places)} placeholders, but their samples {len(rows)} images."
            )
        return to_device(torch.tensor(rows, dtype=torch.int64), batch.text_owner.device)


ENTRY = MllmBackbone
