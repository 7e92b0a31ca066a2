"""Backbone: BLIP in its three forms: captioner, question answering, retrieval.

The model is transformers' own class of that form (same parameter names) whose forward takes the packed batch.
"""

# T texts, I images, L text length, A answer length, C candidates

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import fields
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

from mmpeft_ds.backbones.blip import tokens as _blip_tokens
from mmpeft_ds.backbones.blip.contrast import Training
from mmpeft_ds.backbones.blip.model import Captioner, QuestionAnswerer
from mmpeft_ds.backbones.blip.options import Options
from mmpeft_ds.backbones.blip.retrieval import Retriever
from mmpeft_ds.backbones.common import generation as _writing
from mmpeft_ds.backbones.common import stock, tower_loading
from mmpeft_ds.backbones.common.transform import SquareTransform
from mmpeft_ds.backbones.common.vision_model import Affine
from mmpeft_ds.data.batch import GenerationOutput, PackedBatch, Prompted
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.context_enhancement import MODES

WHERE = "backbone.model"
FORMS = {
    "captioner": (Captioner, BlipForConditionalGeneration),
    "vqa": (QuestionAnswerer, BlipForQuestionAnswering),
    "retrieval": (Retriever, BlipForImageTextRetrieval),
}


class BlipBackbone:
    """The family as recipes use it; attributes as in `backbones/base.py`."""

    Options = Options
    modalities = ("image", "text")

    def __init__(self, options: Options, labels: list[str] | None):
        if options.form not in FORMS:
            raise BadInput(f"backbone.form: {options.form!r}. Use {', '.join(FORMS)}.")
        self.options = options
        self.labels = labels
        self.attention = "auto"
        self.dtype = torch.float32
        self.train_dropout = False
        if options.form != "retrieval":  # the engine asks whether a backbone has them
            self.read, self.generate, self.rank = self._read, self._generate, self._rank

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
        if self.attention not in ("auto", "eager"):
            raise BadInput(f"engine.attention: {self.attention!r}, but BLIP has only eager attention. Use auto.")
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
                raise BadInput(f"backbone.{key}: {getattr(o, key)!r} cannot be; see `Options` in backbones/blip.py.")

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The pretrained model, everything frozen."""
        o, config = self.options, copy.deepcopy(self._config)
        model_class = stock.publishing(*FORMS[o.form])
        config.enc_token_id = self._tokens.enc  # saved with the model
        model = stock.load(model_class, o.model, WHERE, config, self.dtype, "eager", o.random_weights, on_meta)
        if o.form == "retrieval":
            model.train_for(Training(**{f.name: getattr(o, f.name) for f in fields(Training)}))
        return model

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Tensor]:
        """Stretch to the square input of the tower; no augmentation."""
        o = self.options
        resample = {2: "bilinear", 3: "bicubic"}.get(self._pixels["resample"], "bicubic")
        size = o.image_size or self._config.vision_config.image_size
        return SquareTransform(size, "stretch", o.resample if o.resample != "auto" else resample)

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]:
        """Stack transformed images, uint8."""
        return {"pixel_values": torch.stack([torch.as_tensor(image) for image in images])}

    def collate_texts(self, texts: list[str | Prompted]) -> dict[str, Tensor]:
        """Token ids and masks as the form reads them, and for forms that write `labels` for `read`.

        A text that is not in two parts is to be written by the captioner; the others read it.
        """
        o, tokens = self.options, self._tokens
        if o.form == "captioner":
            given = [t if isinstance(t, Prompted) else Prompted("", t) for t in texts]
            return tokens.sequences(given, o.max_text_length)
        given = [t if isinstance(t, Prompted) else Prompted(t) for t in texts]
        questions = tokens.encoder([t.prompt for t in given], o.max_text_length, fused=o.form == "vqa")
        if o.form == "retrieval":
            return questions
        return {**questions, **tokens.answers([t.target for t in given], o.max_answer_length)}

    def dummy(self, modality: str) -> Any:
        """A black image of 8x8 pixels, or the text `a`, which forms that write also have to write."""
        text = "a" if self.options.form == "retrieval" else Prompted("a", "a")
        return {"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "text": text}[modality]

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments; pixels are normalised here, on the device of the batch."""
        texts = {name: tensor for name, tensor in batch.texts.items() if name != "labels"}
        if "pair_id" in batch.targets:
            texts |= {"pair_id": batch.targets["pair_id"], "pair_weight": batch.text_weight}
        return {**texts, **self._seen(batch)}

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """The towers without a trainable from the image on, or the embeddings of the first that has one."""
        texts = [] if self.options.form == "captioner" else ["text_encoder"]
        return stock.untrained(model, {"vision_model": "embeddings", **dict.fromkeys(texts, "embeddings")})

    @property
    def condition_width(self) -> int | None:
        """Width of the mean class token of a text's images, which is published; a text that is compared with many
        images has none (form `retrieval`)."""
        return None if self.options.form == "retrieval" else self._config.vision_config.hidden_size

    # forms that write

    def _read(self, outputs: Any, batch: PackedBatch) -> GenerationOutput:
        """Logits and the labels of the target's tokens and the [SEP] behind them."""
        return GenerationOutput(outputs.logits, batch.texts["labels"])

    def _generate(self, model: Any, batch: PackedBatch, **options: Any) -> list[str]:
        """What the model writes after each prompt, or in answer to each question.

        Args:
            options: of transformers' `generate`, and `choices`: the only texts that may come out, all ranked whole.
        """
        if choices := options.pop("choices", None):
            return self._rank(model, batch, list(choices), k=len(choices))
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        prompts = self._prompts(batch, left=True)
        written = base.generate(**prompts, **self._seen(batch), synced_gpus=_writing.in_step(base), **options)
        return self._tokens.decode(written)

    def _rank(
        self, model: Any, batch: PackedBatch, answers: list[str], k: int = 128, smoothing: float = 0.0
    ) -> list[str]:
        """Which of `answers` follows each prompt, or answers each question, best.

        Args:
            answers: at least one; the same list on all ranks.
            k: how many of them are scored whole: those with the likeliest first token.
            smoothing: label smoothing of the score.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        ids, mask = (t.to(batch.weight.device) for t in self._candidates(answers))
        prompts = self._prompts(batch, left=False)
        best = base.rank(
            **prompts, candidate_ids=ids, candidate_mask=mask, k=k, smoothing=smoothing, **self._seen(batch)
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

    _ranked: tuple[list[str], tuple[Tensor, Tensor]] | None = None

    def _seen(self, batch: PackedBatch) -> dict[str, Any]:
        images = dict(batch.images)
        if "pixel_values" in images and not images["pixel_values"].is_floating_point():
            images["pixel_values"] = self._normalise(images["pixel_values"])
        owners = {"image_owner": batch.image_owner, "text_owner": batch.text_owner}
        return {**images, **owners, "num_slots": len(batch.sample_id)}

    # what the checkpoint says

    @functools.cached_property
    def _config(self) -> PretrainedConfig:
        config = stock.read_config(self.options.model, WHERE, ("blip",))
        if self.options.dropout is not None:
            config.text_config.hidden_dropout_prob = self.options.dropout
            config.text_config.attention_probs_dropout_prob = self.options.dropout
        return config

    @functools.cached_property
    def _pixels(self) -> dict[str, Any]:
        return tower_loading.image_processor(self.options.model, self._config.vision_config, WHERE)

    @functools.cached_property
    def _normalise(self) -> Affine:
        return Affine(self._pixels["mean"], self._pixels["std"], dim=1, scale=1 / 255)

    @functools.cached_property
    def _tokens(self) -> _blip_tokens.BlipTokens:
        return _blip_tokens.BlipTokens(stock.read_tokenizer(self.options.model, WHERE), self._config.text_config)


ENTRY = BlipBackbone
