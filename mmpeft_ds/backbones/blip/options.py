"""Options of the backbone `blip`: a checkpoint, its form, and how its retrieval form is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.backbones.common.options import BackboneOptions, Quantise
from mmpeft_ds.fitting import ByOption


@dataclass
class Options(BackboneOptions):
    """Keys of the recipe's `backbone` section.

    Attributes:
        model: hub name or local directory of a BLIP checkpoint of the chosen form.
        form: `captioner`, image -> text decoder, prompt and target in one sequence; `vqa`, image -> question encoder
            -> answer decoder; `retrieval`, image and text features and a matching head.
        random_weights: take only its configuration and tokenizer; for tests and measurements.
        quantise: weights of the frozen linear layers in blocks of all towers: `nf4` (bitsandbytes), `int8` or `fp8`
            (torchao); `none`: as engine.dtype says. Below ZeRO stage 3; docs/quantised.md.
        image_size: side of the square input in pixels, a multiple of the patch size; 0 = the checkpoint's.
        resample: `bilinear`, `bicubic`, or `auto` = as the checkpoint was trained.
        max_text_length: tokens with [DEC] or [ENC] and [SEP]: of prompt and target together (captioner), of a question
            (vqa), of a text (retrieval). Longer prompts and questions lose their middle, other texts their end.
        max_answer_length: tokens of an answer with its special tokens, form `vqa`; longer ones lose their end.
        dropout: dropout of the text towers, in hidden states and attention; None = as the checkpoint says. It acts
            only with engine.train_dropout.
        temperature: temperature of the contrastive loss. This and all keys below act when the form `retrieval` trains.
        momentum: share of the teacher's averages of the trained parameters that is kept at each step; 0 = no teacher.
        queue: pairs of earlier steps that are kept as negatives, 0 = none.
        alpha: share of the teacher in the targets of the contrast.
        alpha_ramp: steps over which alpha rises from 0; published: those of the first epoch.
        negatives: where the wrong pairs of the matching head, and the keys of the contrast beside the queue, come
            from: `all` ranks, or each rank's own (`local`, with which the loss depends on the number of ranks).
            `none`: no matching head.
        frame_aware: weight the frames of a video by their fit to the text in adapted cross-attention.
        context_enhancement: add the mean text state of the step to the matching pairs (`official`, which reveals
            the label), to `all_pairs`, or to none (`off`).
    """

    gives: ClassVar[ByOption] = {
        "form: captioner": ("generated text", "ranked answers"),
        "form: vqa": ("generated text", "ranked answers"),
        "form: retrieval": ("image and text features",),
        "form: retrieval, negatives: all": ("matching scores",),
        "form: retrieval, negatives: local": ("matching scores",),
    }

    model: str = "Salesforce/blip-image-captioning-base"
    form: Literal["captioner", "vqa", "retrieval"] = "captioner"
    random_weights: bool = False
    quantise: Quantise = "none"
    image_size: int = 0
    resample: Literal["auto", "bilinear", "bicubic"] = "auto"
    max_text_length: int = 40
    max_answer_length: int = 20
    dropout: float | None = None
    temperature: float = 0.07
    momentum: float = 0.995
    queue: int = 57600
    alpha: float = 0.4
    alpha_ramp: int = 0
    negatives: Literal["all", "local", "none"] = "all"
    frame_aware: bool = False
    context_enhancement: Literal["off", "official", "all_pairs"] = "off"

    @property
    def least_slots(self) -> int:
        """Two where wrong pairs come from the rank's own samples."""
        return 2 if self.form == "retrieval" and self.negatives == "local" else 1
