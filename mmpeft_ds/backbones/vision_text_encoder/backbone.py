"""Backbone: any ViT-like vision tower and any BERT- or RoBERTa-like text encoder, joined for classification.

The defaults are the RoBERTa + ViT wiring of the routing paper (arXiv 2403.09377; specs/routing.md 2.1).
"""

# T texts, I images, L text length, d width

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mmpeft_ds.backbones.common import tower_loading
from mmpeft_ds.backbones.common.texts import collated
from mmpeft_ds.backbones.common.vision_backbone import VisionBackbone
from mmpeft_ds.backbones.vision_text_encoder.model import VisionTextEncoder, VisionTextEncoderConfig
from mmpeft_ds.backbones.vision_text_encoder.options import Options
from mmpeft_ds.errors import BadInput

# A checkpoint of a masked language model has no trained pooler: the paper's frozen pooler is a random projection in
# effect. A fixed seed makes it the same projection in every run, on every rank and when an adapter is loaded.
POOLER_SEED = 0


class VisionTextEncoderBackbone(VisionBackbone):
    """A vision tower, a text encoder and a head as recipes use them."""

    Options = Options

    def check(self) -> None:
        """Refuse what cannot work, from configurations only."""
        self._check_vision()
        o, text = self.options, self._text_config
        room = text.max_position_embeddings - (0 if text.model_type == "bert" else text.pad_token_id + 1)
        used = o.max_text_length + self._prefix_length
        if o.max_text_length < 3 or used > room:
            raise BadInput(
                f"backbone.max_text_length: {o.max_text_length} with prefix {o.prefix} needs {used} positions; "
                f"{o.text!r} has {room} (at least 3 are needed for one word)."
            )
        if o.head_layers not in (1, 2) or o.head_multiple < 1 or not 0 <= o.head_dropout < 1:
            raise BadInput("backbone.head_layers is 1 or 2, head_multiple at least 1, head_dropout in [0, 1).")
        if self._num_labels < 1:
            raise BadInput(
                "backbone.num_labels: 0, and the data set has no label list. Say how many answers the head has."
            )
        if o.num_labels and self.labels and o.num_labels < len(self.labels):
            raise BadInput(
                f"backbone.num_labels: {o.num_labels}, but the data has {len(self.labels)} labels. Use 0 or more."
            )

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The model with frozen pretrained towers and a fresh head."""
        config = self._config(on_meta)
        if on_meta:
            with torch.device("meta"):
                model = VisionTextEncoder(config).with_towers_in(self.dtype)
        else:
            vision = self._load_vision(config.vision_config)
            text = self._load_text(config)
            with torch.random.fork_rng():
                # The same head on every rank and at every ZeRO stage, however many draws loading the towers took.
                torch.manual_seed(torch.initial_seed())
                model = VisionTextEncoder(config, vision, text)
        model.vision_model.requires_grad_(False)
        model.text_model.requires_grad_(False)
        return self._quantised(model.train())

    def collate_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and mask, as long as the longest text of this batch; longer ones lose their middle."""
        room = self.options.max_text_length - self._texts.frame_length
        words = [one.without_middle(room) for one in self._texts.words(texts)]
        return collated(self._texts.padded(words), words)

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """The vision tower and the text embeddings, up to the first that has a trainable."""
        at, base = next((n, m) for n, m in model.named_modules() if isinstance(m, VisionTextEncoder))
        dot = f"{at}." if at else ""
        frozen = []
        for path, module in (
            ("vision_model", base.vision_model),
            ("text_model.embeddings", base.text_model.embeddings),
        ):
            if any(p.requires_grad for p in module.parameters()):
                break
            frozen.append(dot + path)
        return frozen

    # configurations and parts

    @functools.cached_property
    def _text_config(self) -> PretrainedConfig:
        return tower_loading.load_config(self.options.text, "backbone.text", "text")

    @property
    def _num_labels(self) -> int:
        return self.options.num_labels or len(self.labels or [])

    def _config(self, on_meta: bool) -> VisionTextEncoderConfig:
        o = self.options
        names = {i: str(label) for i, label in enumerate(self.labels)} if self.labels else None
        if names is not None and len(names) < self._num_labels:
            names.update({i: f"LABEL_{i}" for i in range(len(names), self._num_labels)})
        labels = (
            {"id2label": names, "label2id": {n: i for i, n in names.items()}}
            if names
            else {"num_labels": self._num_labels}
        )
        config = VisionTextEncoderConfig(
            **self._side_config(on_meta),
            embed_twice=o.embed_twice,
            head_input=o.head_input,
            head_layers=o.head_layers,
            head_multiple=o.head_multiple,
            head_dropout=o.head_dropout,
            **labels,
        )
        config._attn_implementation = tower_loading.choose_attention(self.attention, self.dtype)
        return config

    def _load_text(self, config: VisionTextEncoderConfig) -> PreTrainedModel:
        pooler = self.options.head_input == "pooler"
        if self.options.random_weights:
            return self._random_tower(config.text_config, "text", pooler)
        loading = self._loading() | tower_loading.pooler_argument(config.text_config, "text", pooler)
        if pooler:
            loading.pop("device_map", None)  # a pooler that the checkpoint lacks is drawn, so on the host
        with torch.random.fork_rng():
            torch.manual_seed(POOLER_SEED)
            return tower_loading.load_tower(
                self.options.text,
                "backbone.text",
                config.text_config,
                may_miss=("pooler.",),
                **loading,
            )


ENTRY = VisionTextEncoderBackbone
