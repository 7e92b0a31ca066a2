"""A backbone without images, to show that nothing of the contract assumes one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.errors import BadInput


@dataclass
class Options:
    text: str = ""


class TextOnly:
    Options = Options
    modalities = ("text",)
    condition_width = None

    def __init__(self, options: Options, labels: list[str] | None):
        self.options, self.labels = options, labels

    def check(self) -> None:
        if not self.labels:
            raise BadInput("backbone: no labels. Prepare the data set with a label list.")

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(self.options.text, num_labels=len(self.labels))
        if on_meta:
            with torch.device("meta"):
                return AutoModelForSequenceClassification.from_config(config)
        return AutoModelForSequenceClassification.from_pretrained(self.options.text, config=config).eval()

    def image_transform(self, train: bool) -> Callable[[Tensor, Any], Any]:
        return functools.partial(_unchanged)

    def collate_images(self, images: list[Any]) -> dict[str, Tensor]:
        return {}

    def collate_texts(self, texts: list[str]) -> dict[str, Tensor]:
        out = self._tokenizer(texts, padding=True, return_tensors="pt")
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.options.text)

    def dummy(self, modality: str) -> Any:
        return {"text": "a"}[modality]

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        return dict(batch.texts)

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        return []


def _unchanged(image: Tensor, generator: Any) -> Tensor:
    return image


ENTRY = TextOnly
