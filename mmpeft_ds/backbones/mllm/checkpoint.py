"""The parts of a checkpoint of a multimodal language model: its family, tokenizer, chat template and processors, each
read once and only where it is asked for."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

from mmpeft_ds import registry
from mmpeft_ds.backbones.common import tower_loading
from mmpeft_ds.backbones.common.affine import Affine
from mmpeft_ds.backbones.common.spelling import Spelling
from mmpeft_ds.backbones.common.stock_backbone import WHERE, StockBackbone
from mmpeft_ds.backbones.mllm import families, finishing
from mmpeft_ds.backbones.mllm.chat import Chat
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.model import media_ids, takes_videos_apart
from mmpeft_ds.backbones.mllm.processing import processor_class, read_image_processor, read_processor
from mmpeft_ds.backbones.mllm.rendering import read_template
from mmpeft_ds.backbones.mllm.video_processing import has_video_processor, read_video_processor, spells_videos
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.finished_logits import Finish


class Checkpoint(StockBackbone):
    """Base of the backbone `mllm` that reads these parts. Each may raise BadInput."""

    @functools.cached_property
    def _family(self) -> Family:
        known = (registry.load(families, name, WHERE) for name in registry.names(families))
        return next((f for f in known if self._config.model_type in f.model_types), Family())

    @property
    def unpackable(self) -> str:
        """Reason why texts may not stand in one row, which depends on the family."""
        why = self._family.unpackable
        return why and f"reads a model of family {self._config.model_type!r}, which {why}"

    @property
    def row_attention(self) -> str:
        """Attention of texts in one row, which depends on the family."""
        return self._family.row_attention

    @functools.cached_property
    def _finish(self) -> Finish | None:
        """What the stock class makes of its logits; None where that is not known."""
        stock_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self._config)]
        return finishing.finish_of(self._config, self._family.finishes, stock_class)

    @functools.cached_property
    def _media_ids(self) -> list[int]:
        return media_ids(self._config)

    @functools.cached_property
    def _image_processor(self) -> Any:
        return read_image_processor(self.options.model, WHERE, self.options.max_pixels, self.options.image_backend)

    @functools.cached_property
    def _processor(self) -> Any:
        o, video = self.options, None
        if "video" in self.modalities:
            video = read_video_processor(o.model, WHERE, self._config)
        parts = self._image_processor, self._tokenizer, video
        return read_processor(o.model, WHERE, self._config, self._family, *parts)

    @functools.cached_property
    def modalities(self) -> tuple[str, ...]:
        """With videos where the family has them and they are wanted."""
        return ("image", "text") if self.options.videos == "images" or self._no_videos else ("image", "video", "text")

    @property
    def no_videos(self) -> str:
        """Reason why the family takes no videos, with what to do."""
        if self.options.videos == "images" or not self._no_videos:
            return ""
        return f"{self._no_videos}. Set backbone.videos: images to read each frame as an image"

    @functools.cached_property
    def _no_videos(self) -> str:
        """Reason why the family takes no videos; empty where it does."""
        o, family = self.options, self._config.model_type
        name, stock, _ = processor_class(o.model, self._config, self._family, WHERE)
        numbers = media_ids(self._config)
        apart = takes_videos_apart(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self._config)])
        if self._family.no_videos:
            return self._family.no_videos
        if stock is None or not spells_videos(stock):
            return f"processor {name} does not say how a video is spelled in the text (`replace_video_token`)"
        if not has_video_processor(o.model, WHERE, self._config):
            return f"transformers has no video processor for family {family!r}"
        if apart and None in self._tokenizer.convert_ids_to_tokens(numbers):
            return f"the tokenizer has no token for the features of a video ({numbers[-1]})"
        return ""

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
    def _tokens(self) -> tuple[str, ...]:
        """That stand for features of an image, and of a video where it has others."""
        numbers = media_ids(self._config) if "video" in self.modalities else media_ids(self._config)[:1]
        others = [self._tokenizer.convert_ids_to_tokens(number) for number in numbers[1:]]
        return (self._image_token, *filter(None, others))

    @functools.cached_property
    def _chat(self) -> Chat:
        o = self.options
        template = read_template(o.model, WHERE, o.chat_template, self._tokenizer, self._family.template)
        return Chat(
            self._tokenizer,
            template,
            self._tokens,
            self._family.mark(self._processor) if self._family.spelled else self._image_token,
            o.system,
            video_mark=self._family.video_mark(self._processor) if "video" in self.modalities else "",
            opening=self._family.opening(self._tokenizer),
            numbered=self._family.numbered,
            one_turn=self._one_turn,
            thinking=o.thinking,
            max_length=o.max_text_length,
        )

    @property
    def _one_turn(self) -> str:
        """Why the family reads one question alone; empty where it reads conversations."""
        why = self._family.one_turn
        return why and f"a model of family {self._config.model_type!r} reads one question alone: {why}"

    @property
    def one_turn(self) -> str:
        """Why conversations of several turns cannot be read, because of the family or of the chat template."""
        return self._one_turn or self._chat.unmarked

    @property
    def _kind_ids(self) -> list[int]:
        """Tokens that the processor counts to an image beside those that stand for its features."""
        if not self._family.spelled:
            return []
        counted = getattr(self._processor, "image_token_ids", None) or []
        return sorted({*counted} - {*media_ids(self._config)})

    @functools.cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._tokenizer)

    @functools.cached_property
    def _normalise(self) -> Affine:
        p = self._image_processor
        mean, std = (p.image_mean, p.image_std) if p.do_normalize else ([0.0] * 3, [1.0] * 3)
        return Affine(list(mean), list(std), self._channels, scale=p.rescale_factor)

    @functools.cached_property
    def _channels(self) -> int | None:
        """Where the channels stand in pixels that stay whole numbers; None where the processor normalises them."""
        family, p = self._family, self._image_processor
        if self._config.model_type not in family.patches:
            return family.channels
        return 1 if p.do_rescale and p.do_normalize and len(p.image_mean) == len(p.image_std) == 3 else None

    @property
    def _pad_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        return self._tokenizer.eos_token_id if pad is None else pad

    def _inner_class(self, stock_class: type) -> type:
        """Class of the model below the output layer."""
        inner = MODEL_MAPPING.get(type(self._config), stock_class)
        return inner[0] if isinstance(inner, tuple) else inner

    def _refuse_unknown(self) -> None:
        """Refuse a family that lacks what most have, and say what it is. Raises BadInput."""
        kind, name = self._config.model_type, self.options.model
        tower_loading.refuse_quantised(name, WHERE, self._config)
        stock_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(self._config), None)
        if stock_class is None:
            known = "transformers knows no image-text-to-text model of it"
        elif self._config.is_encoder_decoder:
            known = "its text tower has an encoder, which answers would not be read by"
        elif "mm_encoder_outputs" not in inspect.signature(stock_class.forward).parameters:
            known = f"{stock_class.__name__} does not take the features of images (`mm_encoder_outputs`)"
        elif not hasattr(self._inner_class(stock_class), "get_image_features"):
            known = f"{stock_class.__name__} does not give the features of images (`get_image_features`)"
        elif not (known := self._family.unreadable(self._config)):
            return
        raise BadInput(f"{WHERE}: {name!r} is of family {kind!r}, and {known}.")
