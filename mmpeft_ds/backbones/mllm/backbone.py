"""Backbone: multimodal language models that answer in a conversation, of any family that transformers has.

The model is transformers' own class (same parameter names) whose forward takes the packed batch. What a family does
otherwise than most stands in its file in `families/`; one without a file is tried as most are.
"""

# I images, V videos, T texts, R of both as all texts read them, L text length with a placeholder for each run

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mmpeft_ds.backbones.base import ImagePrefix
from mmpeft_ds.backbones.common import stock
from mmpeft_ds.backbones.common.generation import in_step, one_of
from mmpeft_ds.backbones.common.stock_backbone import WHERE
from mmpeft_ds.backbones.mllm import agreement, attentions
from mmpeft_ds.backbones.mllm.checkpoint import Checkpoint
from mmpeft_ds.backbones.mllm.costs import Costs, patch_side
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.image_features import is_part
from mmpeft_ds.backbones.mllm.image_tokens import ImageTokens, VideoTokens, number_of_runs, owned_by_slot
from mmpeft_ds.backbones.mllm.model import ImageText, media_ids
from mmpeft_ds.backbones.mllm.options import Options
from mmpeft_ds.backbones.mllm.processing import TOKEN_RUNS, PixelTransform, SpelledTransform, not_normalising
from mmpeft_ds.backbones.mllm.video_processing import VideoTransform
from mmpeft_ds.data.batch import CollatedTexts, PackedBatch, Prompted
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.data.token_counts import TokenCounts
from mmpeft_ds.data.video import Times, evenly, stacked
from mmpeft_ds.errors import BadInput
from mmpeft_ds.host_copies import both, on_host, to_device
from mmpeft_ds.ops.finished_logits import PLAIN, Finish
from mmpeft_ds.sites.base import base_model
from mmpeft_ds.sites.condition import conditioned

# Entries of an image's tensors that the language model's positions follow from.
_SIZES = ("image_grid_thw", "image_sizes")
# Kinds of what a text names, by their number in `media` of collated texts.
MEDIA = ("", "image", "video")


class MllmBackbone(Checkpoint):
    """Multimodal language models as recipes use them."""

    Options = Options
    families = ()
    generates = True
    publishes_kinds = True
    images_differ = True

    @property
    def attentions(self) -> tuple[str, ...]:
        """Depend on the family and the configuration."""
        stock_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(self._config), None)
        return attentions.possible(self._config, self._family, stock_class)

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
        with agreement.foreign(o.model, self._config):
            self._check_processor()

    def _check_processor(self) -> None:
        """Refuse an image processor that makes other images, or of an untried family other texts, than the model
        reads."""
        name, family = self.options.model, self._family
        see = self.image_transform(False)
        black = see(self.dummy("image"), torch.Generator())
        agreement.refuse_other_sizes(name, family, self._config, self._image_processor, black)
        if family.spelled:
            self._image_tokens.check(black)
        else:
            self._image_tokens(*self.dummy("image").shape[1:])
        if type(family) is Family:
            stock_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self._config)]
            classes, seen = (stock_class, self._inner_class(stock_class)), (see.picture(self.dummy("image")), black)
            parts = self._processor, self._chat, self._kind_ids
            agreement.refuse_other_conversations(name, classes, *parts, seen)

    def build(self, on_meta: bool = False, attention: str = "") -> PreTrainedModel:
        """The pretrained model, everything frozen; `attention`: another than the recipe's."""
        o, config = self.options, copy.deepcopy(self._config)
        config.condition = o.condition  # saved with the model
        if self._kind_ids:
            config.image_kind_ids = self._kind_ids
        if self._family.part_side:
            config.image_part_side = getattr(self._image_processor, self._family.part_side)
        if self._channels is not None:
            config.pixel_statistics = self._normalise.arguments()
        model_class = stock.publishing(_mixin_of(self._family), MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)])
        chosen = self.attentions[0] if self.attention == "auto" and self.attentions else self.attention
        load = (model_class, o.model, WHERE, config, self.dtype, attention or chosen)
        model = stock.load(*load, o.random_weights, on_meta, self.device, o.quantise)
        self._family.adjust(model)
        return model

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], dict[str, Tensor]]:
        """The checkpoint's image processor, without normalising where that can come later; no augmentation."""
        if self._family.spelled:
            processor, patches = self._processor, self._channels is not None
            alone = self._family.alone(processor)
            return SpelledTransform(
                not_normalising(processor) if patches else processor, alone, self._tokens, patches=patches
            )
        side = self._family.min_side(self._image_processor)
        return PixelTransform(self._image_processor, (side, side) if side else None)

    def video_transform(self) -> VideoTransform | None:
        """The checkpoint's video processor, which takes all frames of a video; None: frames are images."""
        if "video" not in self.modalities:
            return None
        alone = self._family.video_alone(self._processor)
        return VideoTransform(self._processor, alone, self._tokens, self.options.max_pixels)

    def collate_videos(self, videos: list[Any]) -> dict[str, Tensor]:
        """Like `collate_images`; frames of fixed size are padded to the longest video."""
        return self._family.together(videos)

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]:
        """Processed images as one batch in the form of the family: images, tiles of all images, tiles padded to their
        largest number, or patches of all images (N, values of a patch), and sizes or grids."""
        return self._family.together(images)

    def collate_texts(self, texts: list[str | Prompted]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` (T, L); `prompt_length` (T,), tokens before the last answer;
        `placeholders` (T,), tokens that stand for features of images and videos; and `media` (T, at least 2), 1 for an
        image and 2 for a video, in the order of the text."""
        encoded = [self._chat.encode(text) for text in texts]

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
            return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)

        tensors = {
            "input_ids": padded([e.ids for e in encoded], self._pad_id),
            "attention_mask": padded([[1] * len(e.ids) for e in encoded], 0),
            "labels": padded([e.labels for e in encoded], -100),
            "prompt_length": torch.tensor([e.prompt_length for e in encoded]),
            "placeholders": torch.tensor([sum(map(e.ids.count, self._media_ids)) for e in encoded]),
            # two places at least, for what a rank without images and videos is given of either
            "media": padded([[MEDIA.index(kind) for kind in e.media] for e in encoded] + [[0, 0]], 0)[:-1],
        }
        return CollatedTexts(tensors, torch.tensor([[e.cut, e.cut_answer, e.control] for e in encoded]))

    def dummy(self, modality: str) -> Any:
        """A black image of 28 x 56 pixels (two tokens of Qwen's or Mistral's), two of them as a video, or a
        conversation of one word each."""
        black = torch.zeros(3, 28, 56, dtype=torch.uint8)
        if modality == "video":
            return stacked([black, black], evenly(2))
        return black if modality == "image" else super().dummy(modality)

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments; the model normalises pixels, on the device of the batch."""
        texts = {name: batch.texts[name] for name in ("input_ids", "attention_mask", "labels")}
        texts["attention_mask"], rows = self._named(batch, texts["attention_mask"])
        return {
            **texts,
            "images": batch.images,
            "videos": batch.videos,
            "media_rows": rows,
            "image_owner": batch.image_owner,
            "video_owner": batch.video_owner,
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
        """transformers' output embeddings where it is known what is done to what they return."""
        return None if self._finish is None else super().output_layer(model)

    @property
    def logit_finish(self) -> Finish:
        """Some families scale their logits, or cap them."""
        return self._finish or PLAIN

    def labels_at(self, model: Any, batch: PackedBatch, positions: int) -> Tensor:
        """The token that follows each of the last positions, image tokens counted; nothing follows the last."""

        def following(labels: Tensor) -> Tensor:
            return nn.functional.pad(labels[:, labels.shape[1] - positions + 1 :], (0, 1), value=-100)

        return both(following, model.widened_labels)

    def tokens(
        self,
        texts: list[str | Prompted],
        image_sizes: list[tuple[int, int]],
        videos: Sequence[tuple[int, int, Times]] = (),
    ) -> TokenCounts:
        """Token counts of all conversations of a sample, each of which reads its images and videos."""
        of_images = [self._image_tokens(*size) for size in image_sizes]
        of_videos = [self._video_tokens(*video) for video in videos]
        counted = of_images + of_videos
        media = sum(medium.tokens for medium in counted)
        marks = sum(sum(map(m.spelling.count, self._tokens)) if m.spelling else 1 for m in counted)
        spelled = {
            "spellings": tuple(image.spelling for image in of_images if image.spelling),
            "video_spellings": tuple(video.spelling for video in of_videos),
        }
        texts = [dataclasses.replace(t, **spelled) if isinstance(t, Prompted) else t for t in texts]
        read = [len(self._chat.encode(text).ids) + media - marks for text in texts]
        patches, pairs = (sum(medium[i] for medium in counted) for i in (2, 3))
        return TokenCounts(sum(read), media, sum(n * n for n in read), patches, pairs)

    def costs(self, counts: TokenCounts) -> np.ndarray:
        """Operations of a frozen model: of its weights and of attention, which grows with squares, in both towers."""
        return self._costs.total(counts)

    def tokens_key(self) -> str:
        """Hash of tokenizer, template, limits, and the processors of images and videos."""
        o, processor = self.options, self._image_processor.to_dict()
        video = self._processor.video_processor.to_dict() if "video" in self.modalities else {}
        words = self._tokenizer.backend_tokenizer.to_str()
        limits = [o.max_text_length, o.max_pixels, o.system, self._chat.template, o.videos]
        read = [{k: str(v) for k, v in settings.items()} for settings in (processor, video)]
        config = {k: v for k, v in self._config.to_dict().items() if k != "_name_or_path"}
        return stock.short_hash([words, limits, config, *read])

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
        prompts, rows = self._named(batch, prompts)
        images = batch.images
        features = base.media_features(images, batch.videos)
        widened = base.widen(ids, prompts, None, features, rows, left=True, answers=batch.texts["labels"])
        length, end = widened.input_ids.shape[1], self._tokenizer.eos_token_id
        settings = {
            "pad_token_id": self._pad_id,
            "eos_token_id": self._end_ids(base),
            "suppress_tokens": media_ids(self._config),  # a placeholder without image would be an error
            "do_sample": False,
            **options,
        }
        if choices:
            known = [[t for t in self._chat.encode(Prompted("a", c)).labels if t not in (-100, end)] for c in choices]
            settings |= {"prefix_allowed_tokens_fn": one_of(known, end, skip=length)}
            settings |= {"max_new_tokens": max(map(len, known)) + 1}
        owners = batch.image_owner, batch.video_owner, batch.text_owner
        condition = base.condition_of(features, *owners, len(batch.sample_id))
        with conditioned(dataclasses.replace(condition, kinds=widened.kinds)):
            ids = model.generate(
                **base.arguments(widened, features, images, batch.videos, rows),
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

    def image_prefix(self, model: nn.Module) -> ImagePrefix | None:
        """All before the language model, the projector included."""
        base = base_model(model)
        text, outer = base.get_decoder(), base.inner
        before = [(name, child) for name, child in outer.named_children() if text not in child.modules()]
        inside = [(name, list(child.parameters())) for name, child in before]
        inside += [(name, [parameter]) for name, parameter in outer.named_parameters(recurse=False)]
        if any(p.requires_grad for _, parameters in inside for p in parameters):
            return None
        processor = {key: str(value) for key, value in self._image_processor.to_dict().items()}
        prefix = "" if outer is base else "model."
        choice = {"processor": processor, "config": stock.arithmetic(self._config, self._config.get_text_config())}
        choice["videos"] = "video" in self.modalities  # whose frames are then no images of their sample
        return ImagePrefix(tuple(f"{prefix}{name}" for name, _ in inside), choice)

    def collate_apart(self, images: list[Any]) -> dict[str, Tensor]:
        """Each image for itself, since families put them together in ways of their own."""
        return {f"{i}.{name}": tensor for i, image in enumerate(images) for name, tensor in image.items()}

    def some_images(self, images: dict[str, Tensor], chosen: Sequence[int]) -> dict[str, Tensor]:
        """The chosen images of a batch, as `collate_images` returns them."""
        apart: dict[str, dict[str, Tensor]] = {}
        for key, tensor in images.items():
            number, _, name = key.partition(".")
            apart.setdefault(number, {})[name] = tensor
        return self.collate_images([apart[str(i)] for i in chosen])

    @torch.no_grad()
    def image_values(self, model: Any, images: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Features of one image after the projector, and what the text needs to know of it."""
        features = base_model(model).image_features(images)
        kept = {name: tensor for name, tensor in images.items() if name in (TOKEN_RUNS, *_SIZES)}
        return [kept | features.values(0)]

    def collate_values(self, values: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Features of each image under names of its own, the rest as `collate_images` puts it together."""
        images = {f"{i}.{n}": tensor for i, value in enumerate(values) for n, tensor in value.items() if is_part(n)}
        for name in (n for n in values[0] if not is_part(n)):
            images[name] = self._family.known([value[name] for value in values])
        return images

    @property
    def condition_width(self) -> int | None:
        """Width of the language model, into which the projector maps; None without a condition."""
        return None if self.options.condition == "none" else self._family.width(self._config)

    # parts that need the model or its transforms

    @functools.cached_property
    def _image_tokens(self) -> ImageTokens:
        vision = getattr(self._config, "vision_config", None)
        sizes = getattr(vision, "spatial_merge_size", 1), patch_side(vision)
        build = functools.partial(self.build, on_meta=True, attention="eager")  # kernels may know no such device
        return ImageTokens(self.image_transform(False), self.collate_images, *sizes, build)

    @functools.cached_property
    def _video_tokens(self) -> VideoTokens:
        return VideoTokens(self.video_transform(), patch_side(getattr(self._config, "vision_config", None)))

    @functools.cached_property
    def _costs(self) -> Costs:
        return Costs.of(self.build(on_meta=True))

    def _end_ids(self, base: PreTrainedModel) -> list[int]:
        """Tokens that end an answer: the checkpoint's, and the one that labels end with in training."""
        ends = base.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return sorted({*ends, self._tokenizer.eos_token_id})

    def _named(self, batch: PackedBatch, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`mask`, and (R,) images and videos as the texts read them, see `ImageText.forward`: a text names those of
        its slot in their order.

        A text of weight 0 that was cropped may name fewer than there are; the others are not seen. What it kept of the
        placeholders of one that was cut through is taken out of its mask.

        Args:
            mask: (T, L), 1 for what is read of each text.
        """
        weights, rows, cut = on_host(batch.text_weight).tolist(), [], None
        whole = mask is batch.texts["attention_mask"] and all(weights)
        numbers = on_host(batch.texts["placeholders"]) if whole else self._places(batch, mask).sum(1)
        owned = [owned_by_slot(owner) for owner in (batch.image_owner, batch.video_owner)]
        first = 0, len(batch.image_owner)  # images are numbered before videos
        runs_of = [number_of_runs(m, len(o)) for m, o in self._kinds(batch)]
        read = zip(
            on_host(batch.text_owner).tolist(), numbers.tolist(), on_host(batch.texts["media"]).tolist(), strict=True
        )
        for text, (slot, n, named) in enumerate(read):
            left = iter(owned[0].get(slot, ())), iter(owned[1].get(slot, ()))
            for kind in filter(None, named):
                kind -= 1
                number = next(left[kind], None)
                if number is None or not runs_of[kind][number]:
                    continue
                if n < runs_of[kind][number]:
                    break
                rows.append(number + first[kind])
                n -= runs_of[kind][number]
            if n and weights[text]:
                raise BadInput(f"backbone: a text has {n} placeholders more than its sample has images and videos.")
            if n:
                places = self._places(batch, mask)
                cut = torch.zeros_like(places) if cut is None else cut
                cut[text, places[text].nonzero()[-n:, 0]] = True
        if cut is not None:
            mask = to_device(on_host(mask) * ~cut, mask.device)
        return mask, to_device(torch.tensor(rows, dtype=torch.int64), batch.text_owner.device)

    def _places(self, batch: PackedBatch, mask: Tensor) -> Tensor:
        """(T, L) bool on the host: which of the tokens that are read are placeholders."""
        ids = on_host(batch.texts["input_ids"])
        return on_host(mask).bool() & torch.isin(ids, torch.tensor(self._media_ids))

    @staticmethod
    def _kinds(batch: PackedBatch) -> tuple[tuple[dict[str, Tensor], Tensor], ...]:
        return (batch.images, batch.image_owner), (batch.videos, batch.video_owner)


@functools.cache
def _mixin_of(family: Family) -> type[ImageText]:
    return type("ImageText", (ImageText,), {"family": family, "__module__": ImageText.__module__})


def _first(tower: nn.Module, module: nn.Module) -> str:
    """Path below `tower` of `module`."""
    return next(path for path, inner in tower.named_modules() if inner is module)


ENTRY = MllmBackbone
