"""The composed classifier: a vision tower that runs once per image, a text encoder after it, and a head.

Source: RoBERTa + ViT of the routing paper (arXiv 2403.09377; specs/routing.md 2.1), each of its choices an option.
"""

# S slots, I images, T texts, L text length, k most images of a slot, m vectors of an image, P prefix length, d width

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput

from mmpeft_ds.backbones.common.composed import HeadLinear
from mmpeft_ds.backbones.common.tower_loading import empty_tower
from mmpeft_ds.backbones.common.vision_model import VisionSide, VisionSideConfig
from mmpeft_ds.backbones.vision_text_encoder import positions as unread
from mmpeft_ds.host_copies import on_host
from mmpeft_ds.sites.condition import conditioned


class VisionTextEncoderConfig(VisionSideConfig):
    """Both towers, how they are joined, and the head; `backbones/vision_text_encoder/options.py` explains the
    fields. `num_labels` and `id2label` mean what they mean everywhere in transformers.
    """

    model_type = "mmpeft_vision_text_encoder"

    embed_twice: bool = True
    head_input: str = "pooler"
    head_layers: int = 2
    head_multiple: int = 2
    head_dropout: float = 0.0


@dataclass
class VisionTextEncoderOutput(ModelOutput):
    """Output of the model.

    Attributes:
        logits: (T, num_labels).
        image_features: (I, m, d) as the tower gave them, before `feature_norm`, to be passed back instead of pixels;
            row 0 of an image is its pooled vector. None without images.
        last_hidden_state: (T, P + L, d), if it was asked for.
    """

    logits: Tensor | None = None
    image_features: Tensor | None = None
    last_hidden_state: Tensor | None = None


class Head(nn.Module):
    """Classifier on one vector per text: dropout, Linear; or Linear, LayerNorm, GELU, dropout, Linear."""

    def __init__(self, config: VisionTextEncoderConfig):
        super().__init__()
        width = config.text_config.hidden_size
        inner = width * config.head_multiple
        self.deep = config.head_layers == 2
        if self.deep:
            self.dense = HeadLinear(width, inner)
            self.norm = nn.LayerNorm(inner, eps=1e-5)
        self.dropout = nn.Dropout(config.head_dropout)
        self.out = HeadLinear(inner if self.deep else width, config.num_labels)

    def forward(self, x: Tensor) -> Tensor:
        # trained in float32 also where the base is bfloat16
        x = x.to(self.out.weight.dtype)
        if self.deep:
            x = nn.functional.gelu(self.norm(self.dense(x)))
        return self.out(self.dropout(x))


class VisionTextEncoder(VisionSide):
    """Vision tower, text encoder, head. Build from a configuration, or from two loaded towers."""

    config_class = VisionTextEncoderConfig
    head_modules = ("head",)

    def __init__(
        self,
        config: VisionTextEncoderConfig,
        vision: PreTrainedModel | None = None,
        text: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        vision = vision or empty_tower(config.vision_config, "vision", config.vision_feature == "pooler")
        text = text or empty_tower(config.text_config, "text", config.head_input == "pooler")
        self._join_towers(vision, text)
        self.head = Head(config)
        unread.leave_out_unread(self.text_model.encoder.layer)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        return_last_hidden_state: bool = False,
        return_dict: bool | None = None,
    ) -> VisionTextEncoderOutput:
        """Answer every text from the images of its slot.

        Args:
            input_ids: (T, L).
            attention_mask: (T, L), 1 = keep; None keeps all.
            pixel_values: (I, 3, H, W), uint8 (normalised here) or floating point (normalised already).
            image_features: (I, m, d) or (I, d) in place of pixels, as an earlier call returned them, or feature
                shards hold them; `feature_norm` is applied here.
            image_owner: (I,) slot of each image, non-decreasing; None: image i belongs to slot i.
            text_owner: (T,) slot of each text; None: text j belongs to slot j.
            num_slots: S; None: as many as texts.
            return_last_hidden_state: compute all positions to the end, and return them. Otherwise only those that
                the head reads go through the last feed-forward block, and padding only through the projections of
                queries, keys and values.
            return_dict: accepted for transformers' sake; the output is always a ModelOutput.
        """
        images = self.encode_images(pixel_values, image_features)
        normed = images if images is None or self.feature_norm is None else self.feature_norm(images)
        vectors, keep = self._of_texts(normed, input_ids, image_owner, text_owner, num_slots)
        prefix, prefix_keep = self._prefix(vectors, keep)
        hidden, mask = self._embed(input_ids, attention_mask, prefix, prefix_keep)
        condition = self._condition(vectors, keep, attention_mask, prefix_keep)
        read = None  # the position that the head reads; None: all of them
        layers = self.text_model.encoder.layer
        if self.config.head_input != "mean":
            read = unread.first_position(prefix_keep, hidden.shape[1])
            if not return_last_hidden_state and unread.tokenwise(layers[-1]):
                condition = dataclasses.replace(condition, read=read)
        if condition.own_mask is not None and not return_last_hidden_state and all(map(unread.rowless, layers)):
            count = int(on_host(attention_mask).sum()) + self._kept_prefix(prefix_keep, keep, image_owner, text_owner)
            condition = dataclasses.replace(condition, kept=unread.kept_positions(condition.own_mask, count))
        with conditioned(condition):
            hidden = self.text_model.encoder(hidden, attention_mask=mask).last_hidden_state
        logits = self.head(self._head_input(hidden, attention_mask, prefix_keep, read))
        return VisionTextEncoderOutput(
            logits=logits, image_features=images, last_hidden_state=hidden if return_last_hidden_state else None
        )

    def _embed(
        self, input_ids: Tensor, attention_mask: Tensor | None, prefix: Tensor | None, prefix_keep: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Input of the first layer (T, P + L, d) and the attention mask in the form that the implementation needs.

        Positions count the prefix tokens that a text really has, so that its answer does not depend on how many images
        other texts of the batch have.
        """
        embeddings = self.text_model.embeddings
        hidden = embeddings(input_ids=input_ids)
        if prefix is not None:
            hidden = torch.cat([prefix, hidden], 1)
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            attention_mask = torch.cat([prefix_keep.to(attention_mask.dtype), attention_mask], 1)
        if self.config.prefix != "none" and self.config.embed_twice:
            # also where no text has an image: otherwise the answer would depend on the rest of the batch
            steps = torch.ones_like(input_ids)
            positions = torch.cat([prefix_keep.to(steps.dtype), steps], 1).cumsum(1).sub(1).clamp(min=0)
            # RoBERTa counts from padding_idx + 1, BERT from 0
            first = getattr(embeddings, "padding_idx", -1) + 1
            hidden = embeddings(inputs_embeds=hidden, position_ids=positions + first)
        if attention_mask is not None:
            attention_mask = create_bidirectional_mask(
                config=self.text_model.config, inputs_embeds=hidden, attention_mask=attention_mask
            )
        return hidden, attention_mask

    def _head_input(
        self, hidden: Tensor, attention_mask: Tensor | None, prefix_keep: Tensor, read: Tensor | None
    ) -> Tensor:
        """(T, d): the position that is read, raw or through the frozen pooler, or the mean of all that count."""
        length = prefix_keep.shape[1]
        if read is None:
            words = torch.ones(hidden.shape[0], hidden.shape[1] - length, device=hidden.device)
            keep = torch.cat(
                [prefix_keep.to(words.dtype), words if attention_mask is None else attention_mask.to(words.dtype)], 1
            )
            keep = keep.to(hidden.dtype).unsqueeze(2)
            return (hidden * keep).sum(1) / keep.sum(1)
        first = unread.take(hidden, read) if hidden.shape[1] == read.shape[1] else hidden
        return self.text_model.pooler(first) if self.config.head_input == "pooler" else first[:, 0]


AutoConfig.register(VisionTextEncoderConfig.model_type, VisionTextEncoderConfig, exist_ok=True)
AutoModel.register(VisionTextEncoderConfig, VisionTextEncoder, exist_ok=True)
