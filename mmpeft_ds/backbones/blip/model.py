"""BLIP's generative forms: transformers' own classes whose forward takes the packed batch.

Source: BLIP, arXiv 2201.12086, as p-Adapter (AAAI 2024) and Aurora (arXiv 2305.08381) tune it.
"""

# S slots, I images, T texts, L text length, n tokens of an image, k most images of a slot, m = k n, d width
# U different questions, A length of answers, C candidates

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.utils import ModelOutput

from mmpeft_ds.backbones.common.slots import images_per_slot, most_images
from mmpeft_ds.backbones.common.stock import Publishing
from mmpeft_ds.host_copies import nonzero, on_host
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.sites.condition import Condition, conditioned

# Candidates scored at a time: a constant, so that ranks with different numbers of questions make as many passes.
RANK_CHUNK = 8


@dataclass
class ImageStates:
    """Last states of the vision tower for the images that each row of the text side sees.

    Attributes:
        tokens: (T, m, d) tokens of the row's images, one image after the other.
        mask: (T, m) bool; a row without an image has one token of zeros instead, so that its answer does not depend
            on the rest of the batch.
        pooled: (T, 1, d) mean over the images of their class tokens; zeros without an image.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def rows(self, index: Tensor) -> ImageStates:
        """These rows, in this order."""
        return ImageStates(self.tokens[index], self.mask[index], self.pooled[index])

    def condition(self, own_mask: Tensor | None = None) -> Condition:
        """The condition for adapters of a text tower that reads these images."""
        own = None if own_mask is None else own_mask.bool()
        return Condition(self.pooled, own_mask=own, encoder=self.tokens, encoder_mask=self.mask)


@dataclass
class GenerativeBlipOutput(ModelOutput):
    """Output of a generative form.

    Attributes:
        logits: (T, L, vocabulary); position s predicts token s + 1 of what the decoder read.
    """

    logits: Tensor | None = None


def mend_cross_attention(model: nn.Module) -> None:
    """Let the mask of cross-attention act, which stock BLIP ignores.

    transformers 5.23 passes it to `BlipTextSelfAttention` as `attention_mask`, which is read there in self-attention
    only, so padding of questions and of images would be attended to. The hooks stay in place when adapters wrap parts
    of the module, and run again in recomputation.
    """
    for module in model.modules():
        if type(module).__name__ == "BlipTextSelfAttention":
            module.register_forward_pre_hook(_name_the_mask, with_kwargs=True)


def _name_the_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    if kwargs.get("encoder_hidden_states") is None or kwargs.get("encoder_attention_mask") is not None:
        return None
    return args, {**kwargs, "encoder_attention_mask": kwargs.get("attention_mask")}


class PackedBlip(Publishing):
    """Mixin over a class of BLIP: images and their owners as the packed batch has them."""

    def __init__(self, config: Any):
        super().__init__(config)
        mend_cross_attention(self)

    def encode_images(self, pixel_values: Tensor | None) -> Tensor | None:
        """(I, n, d) last states, class token first; None without images. Each image goes through the tower once.

        Args:
            pixel_values: (I, 3, H, W), normalised, or what this function has returned for them.
        """
        if pixel_values is None or len(pixel_values) == 0:
            return None
        if pixel_values.dim() == 3:
            return pixel_values
        # a partitioned parameter keeps its dtype under ZeRO-3, but not its shape
        pixels = pixel_values.to(next(self.vision_model.parameters()).dtype)
        other_size = pixels.shape[-1] != self.config.vision_config.image_size
        return self.vision_model(pixels, interpolate_pos_encoding=other_size).last_hidden_state

    def image_states(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_owner: Tensor | None,
        text_owner: Tensor | None,
        num_slots: int | None,
    ) -> ImageStates:
        """Image states of every text; owners as in the packed batch, None: image and text i belong to slot i."""
        states, device = self.encode_images(pixel_values), input_ids.device
        if text_owner is None:
            text_owner = torch.arange(len(input_ids), device=device)
        if states is None:
            width, dtype = self.config.vision_config.hidden_size, next(self.vision_model.parameters()).dtype
            states = torch.zeros(0, 1, width, device=device, dtype=dtype)
        if image_owner is None:
            image_owner = torch.arange(len(states), device=device)
        slots = max(len(states), len(input_ids)) if num_slots is None else num_slots
        return by_slot(states, image_owner, slots).rows(text_owner)


def by_slot(states_Ind: Tensor, image_owner: Tensor, slots: int) -> ImageStates:
    """Image states of every slot, one row per slot.

    Args:
        states_Ind: states of the images.
        image_owner: (I,) slot of each image, non-decreasing.
        slots: S.
    """
    images, tokens, width = states_Ind.shape
    device = states_Ind.device
    counts, most = images_per_slot(image_owner, slots), most_images(image_owner) or 1
    place = torch.arange(images, device=device) - (counts.cumsum(0) - counts)[image_owner]
    packed = states_Ind.new_zeros(slots, most, tokens, width).index_put((image_owner, place), states_Ind)
    keep = torch.arange(most, device=device) < counts[:, None]
    mask = keep.repeat_interleave(tokens, 1)
    mask[:, 0] = True
    pooled = packed[:, :, 0].sum(1, keepdim=True) / counts.clamp(min=1)[:, None, None].to(states_Ind.dtype)
    return ImageStates(packed.flatten(1, 2), mask, pooled)


class Captioner(PackedBlip):
    """Mixin over BlipForConditionalGeneration: prompt and target in one causal sequence with cross-attention to the
    images."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> GenerativeBlipOutput:
        """Logits of every text.

        Args:
            input_ids, attention_mask: (T, L), the first token [DEC].
            pixel_values: (I, 3, H, W), normalised.
            image_owner, text_owner: (I,) and (T,) slot of each image and text, images non-decreasing; None:
                image i and text i belong to slot i.
            num_slots: S; None: as many as needed.
            return_dict: accepted for transformers' sake; the output is always a ModelOutput.
        """
        seen = self.image_states(input_ids, pixel_values, image_owner, text_owner, num_slots)
        return GenerativeBlipOutput(logits=self._decode(input_ids, attention_mask, seen))

    def _decode(self, input_ids: Tensor, attention_mask: Tensor | None, seen: ImageStates) -> Tensor:
        with conditioned(seen.condition(attention_mask)):
            return self.text_decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                encoder_hidden_states=seen.tokens,
                encoder_attention_mask=seen.mask,
                use_cache=False,
            ).logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Token ids (T, new) generated after prompts that are padded on the LEFT; arguments as in `forward`."""
        seen = self.image_states(input_ids, pixel_values, image_owner, text_owner, num_slots)
        ids = _generate(self, input_ids, attention_mask, seen.condition(), options)
        return ids[:, input_ids.shape[1] :]

    @torch.no_grad()
    def rank(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        candidate_ids: Tensor,
        candidate_mask: Tensor,
        k: int,
        smoothing: float = 0.0,
        pixel_values: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
    ) -> Tensor:
        """(T,) which candidate fits each prompt best.

        The k candidates with the likeliest first token are scored in full, by the sum of their tokens' losses.

        Args:
            input_ids, attention_mask: (T, L) prompts padded on the right, without [SEP].
            candidate_ids, candidate_mask: (C, A), [SEP] at the end, nothing before the first word.
            smoothing: label smoothing of the score, as the published evaluation had it.

        Source: p-Adapter, AAAI 2024; ALBEF's and BLIP's answer ranking.
        """
        seen = self.image_states(input_ids, pixel_values, image_owner, text_owner, num_slots)
        length = attention_mask.sum(1)
        last = self._decode(input_ids, attention_mask, seen)[torch.arange(len(input_ids)), length - 1]
        prompts, answers = input_ids.shape[1], candidate_ids.shape[1]

        def losses(which_TC: Tensor) -> Tensor:
            texts, tried = which_TC.shape
            rows = torch.arange(texts, device=which_TC.device).repeat_interleave(tried)
            ids, mask = candidate_ids[which_TC.flatten()], candidate_mask[which_TC.flatten()]
            at = length[rows, None] + torch.arange(answers, device=ids.device)
            whole = input_ids.new_zeros(len(rows), prompts + answers)
            whole[:, :prompts] = input_ids[rows]
            kept = torch.zeros_like(whole)
            kept[:, :prompts] = attention_mask[rows]
            whole, kept = whole.scatter(1, at, ids), kept.scatter(1, at, mask.to(kept.dtype))
            logits = self._decode(whole, kept, seen.rows(rows))
            logits = logits.gather(1, (at - 1)[:, :, None].expand(-1, -1, logits.shape[2]))
            return _summed_loss(logits, ids, mask, smoothing).view(texts, tried)

        return _best(last, candidate_ids[:, 0], k, losses)


class QuestionAnswerer(PackedBlip):
    """Mixin over BlipForQuestionAnswering: an encoder reads question and image, a decoder generates the answer."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> GenerativeBlipOutput:
        """Logits of every answer.

        Args:
            input_ids, attention_mask: (T, L) questions, the first token [ENC]; a question that stands several times in
                a row, once for each of its answers, is encoded once.
            answer_ids, answer_mask: (T, A), the first token [DEC].
            pixel_values: (I, 3, H, W), normalised.
            image_owner, text_owner, num_slots, return_dict: as in `Captioner`.
        """
        states, mask, seen, back = self._questions(
            input_ids, attention_mask, pixel_values, image_owner, text_owner, num_slots
        )
        return GenerativeBlipOutput(
            logits=self._answer(answer_ids, answer_mask, states[back], mask[back], seen.pooled[back])
        )

    def _questions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None,
        image_owner: Tensor | None,
        text_owner: Tensor | None,
        num_slots: int | None,
    ) -> tuple[Tensor, Tensor, ImageStates, Tensor]:
        """States (U, L, d), masks (U, L) and images of the different questions, and (T,) the question of each text."""
        if text_owner is None:
            text_owner = torch.arange(len(input_ids), device=input_ids.device)
        parts = (text_owner, input_ids, attention_mask)
        first = _differs_from_above(*parts)
        count = int(_differs_from_above(*map(on_host, parts)).sum())
        owner, ids, mask = (part[nonzero(first, count)[:, 0]] for part in parts)
        back = first.cumsum(0) - 1
        seen = self.image_states(ids, pixel_values, image_owner, owner, num_slots)
        with conditioned(seen.condition(mask)):
            states = self.text_encoder(
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=seen.tokens,
                encoder_attention_mask=seen.mask,
            ).last_hidden_state
        return states, mask, seen, back

    def _answer(
        self, answer_ids: Tensor, answer_mask: Tensor | None, states: Tensor, mask: Tensor, pooled: Tensor
    ) -> Tensor:
        own = None if answer_mask is None else answer_mask.bool()
        with conditioned(Condition(pooled, own_mask=own, encoder=states, encoder_mask=mask.bool())):
            return self.text_decoder(
                input_ids=answer_ids,
                attention_mask=answer_mask,
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                use_cache=False,
            ).logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Token ids of the answers, (T, new); arguments as in `forward`."""
        states, mask, seen, back = self._questions(
            input_ids, attention_mask, pixel_values, image_owner, text_owner, num_slots
        )
        start = torch.full((len(states), 1), self.config.text_config.bos_token_id, device=states.device)
        condition = Condition(seen.pooled, encoder=states, encoder_mask=mask.bool())
        return _generate(self, start, torch.ones_like(start), condition, options)[back, 1:]

    @torch.no_grad()
    def rank(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        candidate_ids: Tensor,
        candidate_mask: Tensor,
        k: int,
        smoothing: float = 0.0,
        pixel_values: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
    ) -> Tensor:
        """(T,) which candidate answers each question best; as `Captioner.rank`, with questions for prompts.

        Source: Aurora, arXiv 2305.08381; ALBEF's and BLIP's answer ranking.
        """
        states, mask, seen, back = self._questions(
            input_ids, attention_mask, pixel_values, image_owner, text_owner, num_slots
        )
        start = torch.full((len(states), 1), self.config.text_config.bos_token_id, device=states.device)
        first = self._answer(start, None, states, mask, seen.pooled)[:, 0]

        def losses(which_UC: Tensor) -> Tensor:
            questions, tried = which_UC.shape
            rows = torch.arange(questions, device=which_UC.device).repeat_interleave(tried)
            ids, kept = candidate_ids[which_UC.flatten()], candidate_mask[which_UC.flatten()]
            whole = torch.cat([start[rows], ids[:, :-1]], 1)
            read = torch.cat([torch.ones_like(start[rows]), kept[:, :-1].to(start.dtype)], 1)
            logits = self._answer(whole, read, states[rows], mask[rows], seen.pooled[rows])
            return _summed_loss(logits, ids, kept, smoothing).view(questions, tried)

        return _best(first, candidate_ids[:, 0], k, losses)[back]


def _differs_from_above(text_owner: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(T,) bool, whether the question of a text is another one than that of the text before it."""
    keys = torch.cat([text_owner[:, None], input_ids, attention_mask], 1)
    first = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
    first[1:] = (keys[1:] != keys[:-1]).any(1)
    return first


def _generate(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, condition: Condition, options: dict[str, Any]
) -> Tensor:
    text = model.config.text_config
    with conditioned(condition):
        return model.text_decoder.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=condition.encoder,
            encoder_attention_mask=condition.encoder_mask.long(),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            **options,
        )


def _best(first_UV: Tensor, first_token_C: Tensor, k: int, losses: Any) -> Tensor:
    """(U,) the candidate of least loss among the k with the likeliest first token; ties go to the earlier one."""
    likely = torch.softmax(first_UV.double(), 1)[:, first_token_C]
    chosen = likely.sort(dim=1, descending=True, stable=True).indices[:, :k]
    scores = torch.cat([losses(part) for part in chosen.split(RANK_CHUNK, 1)], 1)
    return chosen.gather(1, scores.argmin(1, keepdim=True))[:, 0]


def _summed_loss(logits: Tensor, ids: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """(R,) loss of the tokens `ids`, each predicted at its own position of `logits`, summed where `mask`."""
    labels = ids.masked_fill(mask == 0, -100)
    return cross_entropy(
        at_least_float32(logits).transpose(1, 2), labels, reduction="none", label_smoothing=smoothing
    ).sum(1)
