"""A backbone without images that gives only what the contract requires: all else is the default of `BackboneBase`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.backbones.common.options import BackboneOptions
from mmpeft_ds.data.batch import PackedBatch


@dataclass
class Options(BackboneOptions):
    text: str = ""


class TextOnly(BackboneBase):
    Options = Options
    modalities = ("text",)

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(self.options.text, num_labels=len(self.labels))
        if on_meta:
            with torch.device("meta"):
                return AutoModelForSequenceClassification.from_config(config)
        return AutoModelForSequenceClassification.from_pretrained(self.options.text, config=config).eval()

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Any]:
        return functools.partial(_unchanged)

    def collate_texts(self, texts: list[str]) -> dict[str, Tensor]:
        out = self._tokenizer(texts, padding=True, return_tensors="pt")
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        return dict(batch.texts)  # a stock model takes no owners

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.options.text)


def _unchanged(image: Tensor, generator: Any) -> Tensor:
    return image


ENTRY = TextOnly
