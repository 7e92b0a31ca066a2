"""The composed generative model: CLIP grid features after BART's embedded text, the answer from BART's decoder.

Source: the frame of VL-Adapter that the routing paper took over (arXiv 2403.09377; specs/routing.md 2.3). It is not
published what adapters route on there: the condition is our choice, and an option.
"""

# S slots, I images, T texts, L text length, n grid features of an image, k most images of a slot, N = k n, F feature
# width, d width of BART

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    BartForConditionalGeneration,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput

from mmpeft_ds.backbones.common.composed import ComposedConfig, ComposedModel, HeadLinear
from mmpeft_ds.backbones.common.slots import images_per_slot, most_images
from mmpeft_ds.backbones.common.tower_loading import VISION, empty_tower
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.ops.scored_head import biased_logits
from mmpeft_ds.sites.condition import Condition, conditioned


class ClipBartConfig(ComposedConfig):
    """BART and where its visual tokens come from; `backbones/clip_bart/options.py` explains the fields.

    Without `vision_config` the grid features are given. The last `order_tokens` rows of BART's token table name places
    in the grid.
    """

    model_type = "mmpeft_clip_bart"
    is_encoder_decoder = True

    feature_width: int = 2048
    vision_norm: bool = True
    grid: int = 6
    max_images: int = 2
    order_tokens: int = 200
    condition: str = "visual"

    def __post_init__(self, **kwargs: Any) -> None:
        self._read_sub_configs()
        if self.text_config is not None:
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
                kwargs.setdefault(name, getattr(self.text_config, name))
        super().__post_init__(**kwargs)
        self.is_encoder_decoder = True


@dataclass
class Encoded(ModelOutput):
    """Input of the decoder from the encoder; every tensor has a row per text, so all follow beam expansion.

    Attributes:
        last_hidden_state: (T, L + N, d), text first.
        mask: (T, L + N) bool, True = keep.
        visual: (T, L + N) bool, True = a visual token that is there.
        condition: (T, m, d) vectors that the encoder layers routed on, None without a condition.
    """

    last_hidden_state: Tensor | None = None
    mask: Tensor | None = None
    visual: Tensor | None = None
    condition: Tensor | None = None


@dataclass
class ClipBartOutput(Seq2SeqLMOutput):
    """Output of the model: that of every sequence-to-sequence model of transformers, and

    Attributes:
        image_features: (I, n, F) grid features before pooling, to be passed back instead of pixels; None without.
    """

    image_features: Tensor | None = None


class OrderEmbedding(nn.Embedding):
    """Embedding that starts from N(0, 0.02), initialised before ZeRO-3 partitions it."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=HeadLinear.std)


class VisualEmbedding(nn.Module):
    """Grid features to BART's width: LN(Linear(feature)) + LN(Linear(box)) + image order + place in the grid.

    Grid cells have no boxes: the four corners and the area are zero, as published, so the second term is one
    trained vector.
    """

    def __init__(self, feature_width: int, width: int, max_images: int):
        super().__init__()
        self.feature = HeadLinear(feature_width, width)
        self.feature_norm = nn.LayerNorm(width)
        self.box = HeadLinear(5, width)
        self.box_norm = nn.LayerNorm(width)
        self.image_order = OrderEmbedding(max_images, width)

    def forward(self, features_InF: Tensor, places_nd: Tensor, order_I: Tensor) -> Tensor:
        """(I, n, d), in float32 (float64 where the weights are).

        Args:
            features_InF: grid features.
            places_nd: vector of each place in the grid; frozen rows of the token table.
            order_I: number of each image within its slot.
        """
        dtype = self.feature.weight.dtype
        boxes = torch.zeros(1, 1, 5, dtype=dtype, device=features_InF.device)
        features = self.feature_norm(self.feature(features_InF.to(dtype)))
        return features + self.box_norm(self.box(boxes)) + self.image_order(order_I)[:, None] + places_nd.to(dtype)


class ClipBart(ComposedModel, GenerationMixin):
    """Optional vision tower, visual embedding, BART. Build from a configuration, or from loaded parts."""

    config_class = ClipBartConfig
    head_modules = ("visual_embedding",)

    def __init__(
        self,
        config: ClipBartConfig,
        vision: PreTrainedModel | None = None,
        text: BartForConditionalGeneration | None = None,
    ):
        super().__init__(config)
        if vision is None and config.vision_config is not None:
            vision = empty_tower(config.vision_config, "vision", False)
        text = text or BartForConditionalGeneration._from_config(config.text_config)
        self._join(vision, text, text_follows_mode=True)
        self.visual_embedding = VisualEmbedding(config.feature_width, config.text_config.d_model, config.max_images)
        self.post_init()
        self.generation_config = copy.deepcopy(text.generation_config)

    def get_output_embeddings(self) -> nn.Module:
        return self.text_model.get_output_embeddings()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.text_model.model.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: Encoded | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ClipBartOutput:
        """Logits of the target of every text, which the decoder generates from the text and the images of its slot.

        Args:
            input_ids: (T, L); not needed with `encoder_outputs`.
            attention_mask: (T, L), 1 = keep; None keeps all.
            pixel_values: (I, 3, H, W), uint8 (normalised here) or floating point (normalised already).
            image_features: (I, n, F) grid features in row order in place of pixels, n a square number.
            image_owner: (I,) slot of each image, non-decreasing; None: image i belongs to slot i.
            text_owner: (T,) slot of each text; None: text j belongs to slot j.
            num_slots: S; None: as many as texts.
            decoder_input_ids: (T, S) tokens so far, beginning with the start token; None: from `labels`.
            labels: (T, S) token ids, -100 = not asked; they give `loss`, the mean over the asked tokens.
            encoder_outputs: what `encode` returned.
            return_dict: accepted for transformers' sake; the output is always a ModelOutput.
        """
        if encoder_outputs is None:
            image_features = self.encode_images(pixel_values, image_features)
            encoder_outputs = self.encode(
                input_ids, attention_mask, None, image_features, image_owner, text_owner, num_slots
            )
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.text_model.prepare_decoder_input_ids_from_labels(labels)
        with conditioned(self._decoder_condition(encoder_outputs)):
            decoded = self.text_model.model.decoder(
                input_ids=decoder_input_ids,
                attention_mask=decoder_attention_mask,
                encoder_hidden_states=encoder_outputs.last_hidden_state,
                encoder_attention_mask=encoder_outputs.mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )
        bart = self.text_model
        logits = biased_logits(bart.lm_head, decoded.last_hidden_state, bart.final_logits_bias)
        loss = None if labels is None else functional.cross_entropy(at_least_float32(logits).transpose(1, 2), labels)
        return ClipBartOutput(
            loss=loss,
            logits=logits,
            past_key_values=decoded.past_key_values,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            image_features=image_features,
        )

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        **options: Any,
    ) -> Tensor:
        """(T * sequences, length) token ids, beginning with the start token; `options` as transformers' `generate`."""
        with torch.no_grad():
            encoded = options.pop("encoder_outputs", None) or self.encode(
                input_ids, attention_mask, pixel_values, image_features, image_owner, text_owner, num_slots
            )
            return super().generate(encoder_outputs=encoded, attention_mask=encoded.mask.long(), **options)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
    ) -> Encoded:
        """Run BART's encoder over text and visual tokens; arguments as `forward`."""
        encoder = self.text_model.model.encoder
        hidden = encoder.embed_tokens(input_ids)
        hidden = encoder.layernorm_embedding(hidden + encoder.embed_positions(input_ids))
        features = self.encode_images(pixel_values, image_features)
        visual, keep = self._visual_tokens(features, input_ids, image_owner, text_owner, num_slots)
        visual = visual.to(hidden.dtype)
        words = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([words.bool(), keep], 1)
        # Joined after the LayerNorm of the embeddings: visual tokens have norms of their own.
        hidden = torch.cat([hidden, visual], 1)
        hidden = functional.dropout(hidden, p=encoder.dropout, training=encoder.training)
        attend = create_bidirectional_mask(config=encoder.config, inputs_embeds=hidden, attention_mask=mask)
        routed, routed_keep = self._routed(visual, keep)
        with conditioned(Condition(routed, routed_keep, own_mask=mask)):
            for layer in encoder.layers:
                hidden = layer(hidden, attend)
        only_visual = torch.cat([torch.zeros_like(words, dtype=torch.bool), keep], 1)
        return Encoded(hidden, mask, only_visual, routed)

    def encode_images(self, pixel_values: Tensor | None, image_features: Tensor | None = None) -> Tensor | None:
        """(I, n, F) grid features: those given, or the patches of the vision tower; None without images."""
        if image_features is not None:
            return image_features if len(image_features) else None
        if pixel_values is None or len(pixel_values) == 0:
            return None
        if self.vision_model is None:
            raise BadInput("pixels were given, but this model has no vision tower. Give image_features, or a tower.")
        tokens = self._through_vision_tower(pixel_values, "mean", with_tokens=True)
        return tokens[:, 1 + VISION[self.config.vision_config.model_type].summary_tokens :]

    def pooled_images(self, pixel_values: Tensor) -> Tensor:
        """(I, n, F) features of the grid that the model reads, as `image_features` takes them."""
        return self._pooled(self.encode_images(pixel_values))

    def _visual_tokens(
        self,
        features: Tensor | None,
        input_ids: Tensor,
        image_owner: Tensor | None,
        text_owner: Tensor | None,
        slots: int | None,
    ) -> tuple[Tensor, Tensor]:
        """(T, N, d) visual tokens of the images that each text sees, zeros where its slot has fewer, (T, N) keep."""
        texts, device = len(input_ids), input_ids.device
        text_owner = torch.arange(texts, device=device) if text_owner is None else text_owner
        if features is None:
            nothing = torch.zeros(texts, 0, self.config.text_config.d_model, device=device)
            return nothing, torch.zeros(texts, 0, dtype=torch.bool, device=device)
        image_owner = torch.arange(len(features), device=device) if image_owner is None else image_owner
        counts = images_per_slot(image_owner, texts if slots is None else slots)
        number = torch.arange(len(features), device=device) - (counts.cumsum(0) - counts)[image_owner]
        most = most_images(image_owner)
        if most > self.config.max_images:
            raise BadInput(
                f"backbone.max_images: a sample has {most} images, the model numbers {self.config.max_images}. "
                "Raise it, or prepare the data with fewer images per sample."
            )
        pooled = self._pooled(features)
        tokens = self.visual_embedding(pooled, self._places(pooled.shape[1], device), number)
        spread = tokens.new_zeros(len(counts), most, *tokens.shape[1:]).index_put((image_owner, number), tokens)
        keep = torch.arange(most, device=device) < counts[:, None]
        keep = keep[:, :, None].expand(-1, -1, tokens.shape[1])
        return spread[text_owner].flatten(1, 2), keep[text_owner].flatten(1, 2)

    def _pooled(self, features_InF: Tensor) -> Tensor:
        """Adaptive max pooling of the square grid to `grid` x `grid`; 0 leaves it as it is."""
        side, wanted = round(features_InF.shape[1] ** 0.5), self.config.grid
        if side * side != features_InF.shape[1]:
            raise BadInput(f"image features: {features_InF.shape[1]} places are no square grid. Store a whole grid.")
        if features_InF.shape[2] != self.config.feature_width:
            raise BadInput(
                f"image features: {features_InF.shape[2]} wide, backbone.feature_width is {self.config.feature_width}."
            )
        if wanted in (0, side):
            return features_InF
        maps = features_InF.transpose(1, 2).unflatten(2, (side, side))
        return functional.adaptive_max_pool2d(maps, wanted).flatten(2).transpose(1, 2)

    def _places(self, n: int, device: torch.device) -> Tensor:
        """(n, d) rows of the token table from its end: the first place is the last row."""
        table = self.text_model.model.shared
        if n > self.config.order_tokens:
            raise BadInput(f"backbone.grid: {n} places, but backbone.order_tokens is {self.config.order_tokens}.")
        rows = self.config.text_config.vocab_size - 1 - torch.arange(n, device=device)
        return table(rows) / table.embed_scale

    def _routed(self, visual: Tensor, keep: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Vectors that encoder layers route on, and which count: the mean of the visual tokens, or all of them."""
        if self.config.condition == "none":
            return None, None
        if self.config.condition == "tokens" and visual.shape[1]:
            return visual, keep
        return _mean(visual, keep), None

    def _decoder_condition(self, encoded: Encoded) -> Condition:
        """Vectors that decoder layers route on: encoder outputs at the visual tokens, computed again in every pass."""
        states, visual, tokens = encoded.last_hidden_state, encoded.visual, encoded.condition
        mask = None
        if self.config.condition == "visual":
            tokens = _mean(states, visual)
        elif self.config.condition == "tokens" and tokens is not None and tokens.shape[1] > 1:
            mask = visual[:, -tokens.shape[1] :]
        return Condition(tokens, mask, encoder=states, encoder_mask=visual)


def _mean(x_TNd: Tensor, keep_TN: Tensor) -> Tensor:
    """(T, 1, d) mean over the positions that are kept; zeros where none is."""
    kept = torch.where(keep_TN[:, :, None], x_TNd, 0).sum(1, keepdim=True)
    return kept / keep_TN.sum(1).clamp(min=1).to(x_TNd.dtype)[:, None, None]


AutoConfig.register(ClipBartConfig.model_type, ClipBartConfig, exist_ok=True)
AutoModel.register(ClipBartConfig, ClipBart, exist_ok=True)
AutoModelForSeq2SeqLM.register(ClipBartConfig, ClipBart, exist_ok=True)
