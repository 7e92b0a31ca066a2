"""Backbone: BLIP in its three forms: captioner, question answering, retrieval.

The model is transformers' own class of that form (same parameter names) whose forward takes the packed batch.
"""

# T texts, I images, L text length, A answer length, C candidates

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PretrainedConfig,
    PreTrainedModel,
)

from mmpeft_ds.backbones.base import ImagePrefix
from mmpeft_ds.backbones.blip.model import Captioner, QuestionAnswerer
from mmpeft_ds.backbones.blip.options import Options
from mmpeft_ds.backbones.blip.retrieval import Retriever
from mmpeft_ds.backbones.blip.tokens import BlipTokens
from mmpeft_ds.backbones.common import stock, tower_loading
from mmpeft_ds.backbones.common.generation import in_step
from mmpeft_ds.backbones.common.stock_backbone import WHERE, StockBackbone
from mmpeft_ds.backbones.common.texts import pairs
from mmpeft_ds.backbones.common.transform import SquareTransform
from mmpeft_ds.data.batch import CollatedTexts, PackedBatch, Prompted
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.context_enhancement import MODES
from mmpeft_ds.sites.base import base_model

FORMS = {
    "captioner": (Captioner, BlipForConditionalGeneration),
    "vqa": (QuestionAnswerer, BlipForQuestionAnswering),
    "retrieval": (Retriever, BlipForImageTextRetrieval),
}


class BlipBackbone(StockBackbone):
    """BLIP as recipes use it; the forms `captioner` and `vqa` generate text, the form `retrieval` does not."""

    Options = Options
    families = ("blip",)
    attentions = ("eager",)  # transformers has no other for it

    def __init__(self, options: Options, labels: list[str] | None):
        if options.form not in FORMS:
            raise BadInput(f"backbone.form: {options.form!r}. Use {', '.join(FORMS)}.")
        super().__init__(options, labels)
        self._ranked: tuple[list[str], tuple[Tensor, Tensor]] | None = None

    def check(self) -> None:
        """Refuse what cannot work, from configurations only."""
        o, config = self.options, self._config
        patch, positions = config.vision_config.patch_size, config.text_config.max_position_embeddings
        if o.image_size < 0 or o.image_size % patch:
            raise BadInput(f"backbone.image_size: {o.image_size} is no multiple of the patch size {patch}.")
        for key in ("max_text_length", "max_answer_length"):
            if not 3 <= getattr(o, key) <= positions:
                raise BadInput(f"backbone.{key}: {getattr(o, key)}, but {o.model!r} takes 3 to {positions} tokens.")
        if o.dropout is not None and not 0 <= o.dropout < 1:
            raise BadInput(f"backbone.dropout: {o.dropout} must lie in [0, 1).")
        self._check_training()
        vision, text = config.vision_config.hidden_size, config.text_config
        if text.encoder_hidden_size != vision:
            raise BadInput(
                f"{WHERE}: {o.model!r} has images {vision} wide, but cross-attention takes "
                f"{text.encoder_hidden_size}. Mend encoder_hidden_size in its config.json."
            )
        if max(self._tokens.dec, self._tokens.enc) >= text.vocab_size:
            raise BadInput(
                f"{WHERE}: {o.model!r} has {text.vocab_size} token embeddings, too few for [DEC] "
                f"{self._tokens.dec} and [ENC] {self._tokens.enc}. Mend bos_token_id in its config.json."
            )

    def _check_training(self) -> None:
        o = self.options
        for key, good in (
            ("temperature", o.temperature > 0),
            ("momentum", 0 <= o.momentum < 1),
            ("queue", o.queue >= 0),
            ("alpha", 0 <= o.alpha <= 1),
            ("alpha_ramp", o.alpha_ramp >= 0),
            ("negatives", o.negatives in ("all", "local", "none")),
            ("context_enhancement", o.context_enhancement in MODES),
        ):
            if not good:
                raise BadInput(f"backbone.{key}: {getattr(o, key)!r} cannot be; see backbones/blip/options.py.")

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The pretrained model, everything frozen."""
        o, config = self.options, copy.deepcopy(self._config)
        model_class = stock.publishing(*FORMS[o.form])
        config.enc_token_id = self._tokens.enc  # saved with the model
        load = (model_class, o.model, WHERE, config, self.dtype, "eager")
        model = stock.load(*load, o.random_weights, on_meta, self.device, o.quantise)
        if o.form == "retrieval":
            model.train_for(o)
        return model

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Tensor]:
        """Stretch to the square input of the tower; no augmentation."""
        o = self.options
        size = o.image_size or self._config.vision_config.image_size
        return SquareTransform(size, "stretch", tower_loading.interpolation(o.resample, self._pixels))

    def collate_texts(self, texts: list[str | Prompted]) -> dict[str, Tensor]:
        """Token ids and masks as the form reads them, and for forms that generate `labels` for `read`.

        A text without a prompt is the target of the captioner, and the prompt of the other forms.
        """
        o, tokens = self.options, self._tokens
        if o.form == "captioner":
            given = [t if isinstance(t, Prompted) else Prompted("", t) for t in texts]
            return tokens.sequences(pairs(given), o.max_text_length)
        given = pairs(texts)
        questions = tokens.encoder([t.prompt for t in given], o.max_text_length, fused=o.form == "vqa")
        if o.form == "retrieval":
            return questions
        answers = tokens.answers([t.target for t in given], o.max_answer_length)
        return CollatedTexts({**questions, **answers}, questions.changes + answers.changes)

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments; pixels are normalised here, on the device of the batch."""
        pairs = {}
        if "pair_id" in batch.targets:
            pairs = {"pair_id": batch.targets["pair_id"], "pair_weight": batch.text_weight}
        return super().inputs(batch) | pairs

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """The towers without a trainable from the image on, or the embeddings of the first that has one."""
        texts = [] if self.options.form == "captioner" else ["text_encoder"]
        return stock.untrained(model, {"vision_model": "embeddings", **dict.fromkeys(texts, "embeddings")})

    def image_prefix(self, model: nn.Module) -> ImagePrefix | None:
        """The vision tower."""
        if any(p.requires_grad for p in base_model(model).vision_model.parameters()):
            return None
        choice = {key: self._pixels[key] for key in ("mean", "std")}
        return ImagePrefix(("vision_model",), choice | {"config": stock.arithmetic(self._config.vision_config)})

    @torch.no_grad()
    def image_values(self, model: Any, images: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """(n, d) last states of each image."""
        pixels = self._normalised(images)["pixel_values"]
        return [{"pixel_values": x} for x in base_model(model).encode_images(pixels)]

    @property
    def condition_width(self) -> int | None:
        """Width of the mean class token of a text's images, which is published; a text that is compared with many
        images has none (form `retrieval`)."""
        return None if self.options.form == "retrieval" else self._config.vision_config.hidden_size

    @property
    def target_limit(self) -> str:
        """Answers of form `vqa` have a limit of their own."""
        return "max_answer_length" if self.options.form == "vqa" else "max_text_length"

    # forms that generate text

    @property
    def generates(self) -> bool:
        """Not in form `retrieval`."""
        return self.options.form != "retrieval"

    @property
    def ranks_answers(self) -> bool:
        """Whether this form can rank answers; see `generates`."""
        return self.generates

    def output_layer(self, model: Any) -> Any:
        """That of the text decoder."""
        return model.text_decoder.get_output_embeddings()

    def read(self, outputs: Any, batch: PackedBatch) -> Any:
        """Logits and the labels of the target's tokens and the [SEP] after them; the outputs of form `retrieval`."""
        return GenerationOutput(outputs.logits, batch.texts["labels"]) if self.generates else outputs

    def generate(self, model: Any, batch: PackedBatch, **options: Any) -> list[str]:
        """The text generated after each prompt, or in answer to each question.

        Args:
            options: of transformers' `generate`, and `choices`: the only texts that may come out, all ranked in full.
        """
        if choices := options.pop("choices", None):
            return self.rank(model, batch, list(choices), k=len(choices))
        base = base_model(model)
        prompts = self._prompts(batch, left=True)
        ids = base.generate(**prompts, **self._sides(batch), synced_gpus=in_step(base), **options)
        return self._tokens.decode(ids)

    def as_generated(self, text: str) -> str | None:
        """`text` through the tokenizer."""
        return self._tokens.spelling.as_generated(text)

    def rank(
        self, model: Any, batch: PackedBatch, answers: list[str], k: int = 128, smoothing: float = 0.0
    ) -> list[str]:
        """The best of `answers` after each prompt, or to each question.

        Args:
            answers: at least one; the same list on all ranks.
            k: how many of them are scored in full: those with the likeliest first token.
            smoothing: label smoothing of the score.
        """
        ids, mask = (t.to(batch.weight.device) for t in self._candidates(answers))
        prompts = self._prompts(batch, left=False)
        best = base_model(model).rank(
            **prompts, candidate_ids=ids, candidate_mask=mask, k=k, smoothing=smoothing, **self._sides(batch)
        )
        return [answers[i] for i in best.tolist()]

    def _prompts(self, batch: PackedBatch, left: bool) -> dict[str, Tensor]:
        o = self.options
        if o.form == "vqa":
            return {name: batch.texts[name] for name in ("input_ids", "attention_mask")}
        prompts = [t.prompt if isinstance(t, Prompted) else t for t in batch.raw_texts]
        return {
            k: t.to(batch.weight.device) for k, t in self._tokens.prompts(prompts, o.max_text_length, left).items()
        }

    def _candidates(self, answers: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids of the answers, once for a list."""
        if self._ranked is None or self._ranked[0] != answers:
            self._ranked = (list(answers), self._tokens.candidates(answers, self.options.max_answer_length))
        return self._ranked[1]

    def _sides(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments without the texts."""
        return {name: value for name, value in self.inputs(batch).items() if name not in batch.texts}

    # configurations and parts

    @functools.cached_property
    def _config(self) -> PretrainedConfig:
        config = stock.read_config(self.options.model, WHERE, self.families)
        if self.options.dropout is not None:
            config.text_config.hidden_dropout_prob = self.options.dropout
            config.text_config.attention_probs_dropout_prob = self.options.dropout
        return config

    @functools.cached_property
    def _tokens(self) -> BlipTokens:
        return BlipTokens(self._tokenizer, self._config.text_config)


ENTRY = BlipBackbone
