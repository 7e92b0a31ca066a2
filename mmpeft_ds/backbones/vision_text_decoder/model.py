"""The composed generative model: a vision tower that runs once per image, and a causal language model after it.

Source: GPT-2 + ViT of the routing paper (arXiv 2403.09377; specs/routing.md 2.2), each of its choices an option.
"""

# S slots, I images, T texts, L text length, P prefix length, m vectors of an image, d width, V vocabulary

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from mmpeft_ds.backbones.common.composed import HeadLinear
from mmpeft_ds.backbones.common.kinds import kinds_of
from mmpeft_ds.backbones.common.text_row import TextRow
from mmpeft_ds.backbones.common.tower_loading import empty_tower
from mmpeft_ds.backbones.common.vision_model import VisionSide, VisionSideConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites.condition import Condition, conditioned


class VisionTextDecoderConfig(VisionSideConfig):
    """Both towers and how they are joined; `backbones/vision_text_decoder/options.py` explains the fields."""

    model_type = "mmpeft_vision_text_decoder"

    projection: str = "none"
    begin_token: bool = False


@dataclass
class VisionTextDecoderOutput(ModelOutput):
    """Output of the model.

    Attributes:
        logits: (T, P + L, V); position s predicts what follows it.
        past_key_values: cache, during generation.
        image_features: (I, m, d) as in `VisionTextEncoderOutput`.
        text_row: where the T texts were read as one row of N positions, prefixes included; logits are then (1, N, V).
        lengths: (T,) positions of each text with its prefix, without padding.
    """

    logits: Tensor | None = None
    past_key_values: Any = None
    image_features: Tensor | None = None
    text_row: TextRow | None = None
    lengths: Tensor | None = None


class VisionProjection(nn.Module):
    """(I, m, d) features of the vision tower into the width of the language model, (I, m, w).

    `linear`: a Linear; `mlp`: LayerNorm, Linear, GELU, Linear.
    """

    def __init__(self, kind: str, width: int, text_width: int):
        super().__init__()
        self.deep = kind == "mlp"
        if self.deep:
            self.norm = nn.LayerNorm(width)
            self.dense = HeadLinear(width, text_width)
        self.out = HeadLinear(text_width if self.deep else width, text_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.out.weight.dtype)
        if self.deep:
            x = nn.functional.gelu(self.dense(self.norm(x)))
        return self.out(x)


class VisionTextDecoder(VisionSide, GenerationMixin):
    """Vision tower and causal language model. Build from a configuration, or from two loaded towers.

    Attributes:
        head_modules: the projection of the image vectors, where there is one.
        text_row: that of the forward that is running, or was last.
    """

    text_row: TextRow | None = None

    config_class = VisionTextDecoderConfig

    def __init__(
        self,
        config: VisionTextDecoderConfig,
        vision: PreTrainedModel | None = None,
        text: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        vision = vision or empty_tower(config.vision_config, "vision", config.vision_feature == "pooler")
        self._join_towers(
            vision, text or AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        )
        widths = config.vision_config.hidden_size, config.text_config.hidden_size
        projected = config.projection != "none"
        self.vision_projection = VisionProjection(config.projection, *widths) if projected else None
        self.head_modules = ("vision_projection",) if projected else ()
        self.generation_config = copy.deepcopy(self.text_model.generation_config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.text_model.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        padding_free: bool = False,
        answers: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        condition_tokens: Tensor | None = None,
        condition_mask: Tensor | None = None,
        condition_kinds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> VisionTextDecoderOutput:
        """Logits of every text after the images of its slot.

        A text without image has the begin-of-text token in place of the prefix.

        Args:
            input_ids: (T, L), padded on the right.
            attention_mask: (T, L), 1 = keep; None keeps all. Positions count on through padding, as published.
            pixel_values: (I, 3, H, W), uint8 (normalised here) or floating point (normalised already).
            image_features: (I, m, d) or (I, d) in place of pixels.
            image_owner: (I,) slot of each image, non-decreasing; None: image i belongs to slot i.
            text_owner: (T,) slot of each text; None: text j belongs to slot j.
            num_slots: S; None: as many as texts.
            padding_free: read all texts, each after its images, as one row, one after the other and each by itself.
            answers: (T, L), -100 where nothing is asked; None: all is prompt. Only adapters that read
                `Condition.kinds` need it.
            inputs_embeds, position_ids, past_key_values, use_cache, condition_tokens, condition_mask,
                condition_kinds, logits_to_keep: of a step of `generate`, which has joined prefix and prompt itself.
            return_dict: accepted for transformers' sake; the output is always a ModelOutput.
        """
        if inputs_embeds is not None or past_key_values is not None:
            given = {"inputs_embeds": inputs_embeds} if inputs_embeds is not None else {"input_ids": input_ids}
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = _positions(attention_mask)[:, -next(iter(given.values())).shape[1] :]
            with conditioned(Condition(condition_tokens, condition_mask, kinds=condition_kinds)):
                out = self.text_model(
                    **given,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    use_cache=use_cache,
                    logits_to_keep=logits_to_keep,
                )
            return VisionTextDecoderOutput(out.logits, out.past_key_values)
        images = self.encode_images(pixel_values, image_features)
        hidden, keep, condition, prefix = self._joined(
            input_ids, attention_mask, images, image_owner, text_owner, num_slots, answers
        )
        counted = keep.clone()
        counted[:, prefix:] = 1
        arguments = {"inputs_embeds": hidden, "attention_mask": keep, "position_ids": _positions(counted)}
        row = TextRow(keep.bool()) if padding_free else None
        self.text_row = row
        if row is not None:
            arguments = {"inputs_embeds": row.of(hidden), "attention_mask": None, "position_ids": row.position_ids}
            arguments |= row.attention_arguments(self.text_model.config._attn_implementation or "eager")
            made = functools.partial(_in_row, row, condition.token_kinds)
            kinds = None if condition.kinds is None else functools.cache(made)
            condition = dataclasses.replace(condition, segments=row.segments, kinds=kinds)
        with conditioned(condition):
            out = self.text_model(**arguments, use_cache=False)
        return VisionTextDecoderOutput(out.logits, image_features=images, text_row=row, lengths=keep.sum(1))

    @torch.no_grad()
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
    ) -> Any:
        """Continuation of each prompt after the images of its slot, as transformers' `generate` returns it.

        Args:
            input_ids: (T, L) prompts; None: none, for one text an image.
            attention_mask: (T, L); padding may stand on either side.
            pixel_values, image_features, image_owner, text_owner, num_slots: as in `forward`.
            options: of transformers' `generate`. `max_length` counts the prompt with its image positions:
                20 after one pooled image vector leaves 19 new tokens.

        Returns:
            (T, new) token ids without the prompt.

        Raises:
            BadInput: if the prompt leaves no room below `max_length`.
        """
        images = self.encode_images(pixel_values, image_features)
        if input_ids is None:
            rows = 1 if images is None else len(images)
            input_ids = torch.zeros(rows, 0, dtype=torch.int64, device=self.device)
        hidden, keep, condition, _ = self._joined(
            input_ids, attention_mask, images, image_owner, text_owner, num_slots
        )
        # kept positions move to the right, where the next token follows
        kinds = condition.token_kinds()
        if kinds is not None:
            kinds, _ = _to_the_right(kinds[..., None], keep)
        hidden, keep = _to_the_right(hidden, keep)
        length = int(keep.sum(1).max())
        hidden, keep = hidden[:, -length:], keep[:, -length:]
        longest = options.get("max_length")
        if longest is not None and options.get("max_new_tokens") is None and longest <= length:
            raise BadInput(
                f"max_length: {longest} counts the prompt, which has {length} positions with its image. "
                "Give max_new_tokens, or a larger max_length."
            )
        given = {} if condition.tokens is None else {"condition_tokens": condition.tokens}
        given |= {} if condition.mask is None else {"condition_mask": condition.mask}
        given |= {} if kinds is None else {"condition_kinds": kinds[:, -length:, 0]}
        return super().generate(inputs_embeds=hidden, attention_mask=keep, **given, **options)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of a generation step; without a cache the prompt, which has no token ids, is encoded again at every
        step."""
        if past_key_values is None and inputs_embeds is not None and input_ids.shape[1]:
            inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(input_ids)], 1)
            is_first_iteration = True
        return super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _joined(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        images: Tensor | None,
        image_owner: Tensor | None,
        text_owner: Tensor | None,
        slots: int | None,
        answers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Condition, int]:
        """(T, P + L, d) prefix and embedded text, (T, P + L) which positions are kept, the condition, and P."""
        vectors = images if images is None or self.feature_norm is None else self.feature_norm(images)
        if vectors is not None and self.vision_projection is not None:
            vectors = self.vision_projection(vectors)
        vectors, keep = self._of_texts(vectors, input_ids, image_owner, text_owner, slots)
        prefix, prefix_keep = self._prefix(vectors, keep)
        embedding = self.get_input_embeddings()
        hidden = embedding(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        condition = self._condition(vectors, keep, attention_mask, prefix_keep)
        if self.config.prefix == "none":
            return hidden, attention_mask, condition, 0
        begin = embedding(input_ids.new_full((len(input_ids), 1), self._begin_id()))
        if prefix is None:
            prefix, prefix_keep = begin, torch.ones_like(begin[..., 0], dtype=torch.bool)
            media = ~prefix_keep
        else:
            # the images of a text stand next to it
            prefix, prefix_keep = _to_the_right(prefix, prefix_keep)
            media = prefix_keep
            alone = ~prefix_keep[:, -1:]
            last = torch.where(alone[..., None], begin.to(prefix.dtype), prefix[:, -1:])
            prefix = torch.cat([prefix[:, :-1], last], 1)
            prefix_keep = torch.cat([prefix_keep[:, :-1], torch.ones_like(alone)], 1)
            if self.config.begin_token:
                prefix = torch.cat([begin.to(prefix.dtype), prefix], 1)
                prefix_keep = torch.cat([~alone, prefix_keep], 1)
                media = torch.cat([torch.zeros_like(alone), media], 1)
        keep = torch.cat([prefix_keep.to(attention_mask.dtype), attention_mask], 1)
        own = None if condition.own_mask is None else keep.bool()
        kinds = functools.cache(functools.partial(_kinds, keep, media, answers))
        condition = Condition(condition.tokens, condition.mask, own_mask=own, kinds=kinds)
        return torch.cat([prefix, hidden], 1), keep, condition, prefix.shape[1]

    def _vector_width(self) -> int:
        tower = self.config.vision_config if self.vision_projection is None else self.config.text_config
        return tower.hidden_size

    def _begin_id(self) -> int:
        """The token that begins a text; where a family has none, the one that ends it."""
        config = self.config.text_config
        begin = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
        return begin[0] if isinstance(begin, list) else begin or 0


def _kinds(keep_TS: Tensor, media_TP: Tensor, answers_TL: Tensor | None) -> Tensor:
    """`Condition.kinds` of texts after their prefix, of which `media_TP` says where image vectors stand."""
    after = keep_TS.shape[1] - media_TP.shape[1]
    media = torch.nn.functional.pad(media_TP, (0, after))
    if answers_TL is not None:
        answers_TL = torch.nn.functional.pad(answers_TL, (keep_TS.shape[1] - answers_TL.shape[1], 0), value=-100)
    return kinds_of(keep_TS.bool(), media, answers_TL)


def _in_row(row: TextRow, kinds: Callable[[], Tensor]) -> Tensor:
    """Kinds of each text without the padding between its prefix and its words."""
    return row.segments.split(row.of(kinds())[..., None])[..., 0]


def _positions(keep_TS: Tensor) -> Tensor:
    """(T, S) number of kept positions before each."""
    return keep_TS.long().cumsum(1).sub(1).clamp(min=0)


def _to_the_right(hidden_TSd: Tensor, keep_TS: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the kept positions moved to the right, in their order."""
    order = keep_TS.to(torch.uint8).argsort(dim=1, stable=True)
    return hidden_TSd.gather(1, order[..., None].expand_as(hidden_TSd)), keep_TS.gather(1, order)


AutoConfig.register(VisionTextDecoderConfig.model_type, VisionTextDecoderConfig, exist_ok=True)
AutoModel.register(VisionTextDecoderConfig, VisionTextDecoder, exist_ok=True)
AutoModelForCausalLM.register(VisionTextDecoderConfig, VisionTextDecoder, exist_ok=True)
