"""BLIP's retrieval form: features for the search, a matching head that ranks its results again, and their training.

Source: BLIP, arXiv 2201.12086; as Aurora (arXiv 2305.08381) tunes it.
"""

# S slots, I images, T texts (pairs of a text and the images of its slot), L text length, k images of a slot
# m image tokens of a slot, d width, E shared width

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import ModelOutput

from mmpeft_ds.backbones.blip.contrast import Encoded, Pairs, train_step
from mmpeft_ds.backbones.blip.model import ImageStates, PackedBlip, by_slot
from mmpeft_ds.backbones.blip.momentum import Queue, Teacher
from mmpeft_ds.backbones.blip.options import Options
from mmpeft_ds.backbones.common.slots import images_per_slot
from mmpeft_ds.errors import BadInput
from mmpeft_ds.host_copies import both, on_host
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.sites.condition import Condition, conditioned

TAUGHT = ("vision_model", "text_encoder", "vision_proj", "text_proj")


@dataclass
class RetrievalOutput(ModelOutput):
    """Output of the retrieval form.

    Attributes:
        text_features: (T, E) unit vectors, at least float32.
        image_features: (S, E) unit vectors, the mean over the images of a slot projected.
        image_tokens, image_mask: (S, m, d), (S, m) what the matching head reads; see `ImageStates`.
        text_states: (T, L, d) of the text alone.
        contrast_losses: (T,), in training.
        matching_losses: (T,), in training with negatives.
        fused_positive, fused_negative: (T, L, d) and (2 T, L, d) states of matching and non-matching pairs.
        matching_inputs, matching_logits: (3 T, d) and (3 T, 2); matching pairs first, then each text with a wrong
            image, then each image with a wrong text.
    """

    text_features: Tensor | None = None
    image_features: Tensor | None = None
    image_tokens: Tensor | None = None
    image_mask: Tensor | None = None
    text_states: Tensor | None = None
    contrast_losses: Tensor | None = None
    matching_losses: Tensor | None = None
    fused_positive: Tensor | None = None
    fused_negative: Tensor | None = None
    matching_inputs: Tensor | None = None
    matching_logits: Tensor | None = None


class Retriever(PackedBlip):
    """Mixin over BlipForImageTextRetrieval, which encodes and matches; after `train_for` it also computes losses.

    Attributes:
        steps: training forwards so far; kept by `training_state`, as are the queue and the teacher's averages.
        temperature: scalar tensor, clamped at every use.
    """

    training_options: Options | None = None
    runs_again = ("text_encoder",)
    head_modules = ("vision_proj", "itm_head")

    def train_for(self, options: Options) -> None:
        """Prepare training, before or after adapters are attached.

        Args:
            options: its keys from `temperature` on are read.
        """
        self.training_options = options
        self.temperature = torch.tensor(options.temperature, dtype=torch.float64)
        self.teacher = Teacher(self, TAUGHT, options.momentum) if options.momentum else None
        self.queue = Queue(self.config.image_text_hidden_size, options.queue)
        self.steps = 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        num_slots: int | None = None,
        pair_id: Tensor | None = None,
        pair_weight: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RetrievalOutput:
        """Features of images and texts; in training (gradient is on and `pair_id` given) the losses of all pairs.

        Args:
            input_ids, attention_mask: (T, L), the first token [CLS].
            pixel_values: (I, 3, H, W), normalised.
            image_owner, text_owner: (I,) and (T,) slot of each image and text, images non-decreasing; None:
                image i and text i belong to slot i.
            num_slots: S; None: as many as needed.
            pair_id: (T,) int64, not negative; equal ids are the same picture, no negatives of each other.
            pair_weight: (T,), 0 = absent from losses, negatives and queue; so is a text without an image.
            negatives: (T,) image and (T,) text to take for each pair, of the pairs of all ranks that count, instead of
                drawing them.
            return_dict: accepted for transformers' sake; the output is always a ModelOutput.
        """
        device = input_ids.device
        text_owner = torch.arange(len(input_ids), device=device) if text_owner is None else text_owner
        if image_owner is None and pixel_values is not None:
            image_owner = torch.arange(len(pixel_values), device=device)
        slots = max(len(image_owner), len(input_ids)) if num_slots is None else num_slots
        given = input_ids, attention_mask, pixel_values, image_owner, slots
        training = self.training_options is not None and pair_id is not None and torch.is_grad_enabled()
        taught = self._teach(given) if training else None
        encoded = self.encode(*given)
        results = {
            "text_features": encoded.text,
            "image_features": encoded.image,
            "image_tokens": encoded.seen.tokens,
            "image_mask": encoded.seen.mask,
            "text_states": encoded.text_states,
        }
        if training:
            images = _images_of_texts(image_owner, text_owner, slots)
            keep = both(lambda n: n > 0, images)
            if pair_weight is not None:
                keep = both(lambda k, weight: k & (weight > 0), keep, pair_weight)
            if self.training_options.frame_aware and len(on_host(images)[on_host(keep)].unique()) > 1:
                raise BadInput("backbone.frame_aware: samples have different numbers of frames. Prepare equally many.")
            pairs = Pairs(pair_id, text_owner, keep, input_ids, attention_mask)
            results |= train_step(self, encoded, taught, pairs, negatives)
            self.steps += 1
        return RetrievalOutput(**results)

    # encoding

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None,
        image_owner: Tensor | None,
        slots: int,
    ) -> Encoded:
        """Images and texts, each alone: no text is fused with its image here."""
        states = self.encode_images(pixel_values)
        if states is None:
            parameter = next(self.vision_model.parameters())
            states = torch.zeros(
                0, 1, self.config.vision_config.hidden_size, device=input_ids.device, dtype=parameter.dtype
            )
            image_owner = torch.zeros(0, dtype=torch.int64, device=input_ids.device)
        seen = by_slot(states, image_owner, slots)
        tokens = states.shape[1]
        frames = _unit(self.vision_proj(seen.tokens[:, ::tokens]))
        with conditioned(Condition(own_mask=attention_mask.bool())):
            texts = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return Encoded(
            seen, frames, _unit(self.vision_proj(seen.pooled[:, 0])), _unit(self.text_proj(texts[:, 0])), texts
        )

    def match(self, input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """(P,) how well text p and the images of row p match: the logit of class 1 of the matching head.

        Args:
            input_ids, attention_mask: (P, L), the first token [CLS].
            tokens, mask: (P, m, d), (P, m) of `RetrievalOutput`.
        """
        states = self.fuse(input_ids, attention_mask, ImageStates(tokens, mask, tokens[:, :1]))
        return self.itm_head(states[:, 0])[:, 1]

    def fuse(
        self, input_ids: Tensor, attention_mask: Tensor, seen: ImageStates, weights: Tensor | None = None
    ) -> Tensor:
        """(R, L, d) states of texts with cross-attention to images; the first token becomes [ENC].

        Args:
            weights: (R, k) weight of each frame, for adapters that weight frames.
        """
        ids = input_ids.clone()
        ids[:, 0] = getattr(self.config, "enc_token_id", self.config.text_config.bos_token_id + 1)
        published = seen.condition(attention_mask)
        with conditioned(Condition(**{**vars(published), "frame_weights": weights})):
            return self.text_encoder(
                input_ids=ids,
                attention_mask=attention_mask,
                encoder_hidden_states=seen.tokens,
                encoder_attention_mask=seen.mask,
            ).last_hidden_state

    def _teach(self, given: tuple) -> Encoded | None:
        """The batch as the teacher encodes it, after it has followed the student; None without a teacher."""
        if self.teacher is None:
            return None
        self.teacher.update()
        with self.teacher.teaching():
            return self.encode(*given)

    def training_state(self) -> dict[str, Tensor]:
        """Steps, queue and averages, which a checkpoint keeps beside the weights; empty where nothing is trained."""
        if self.training_options is None:
            return {}
        averages = {} if self.teacher is None else self.teacher.averages
        numbers = {"steps": torch.tensor(self.steps), "pointer": torch.tensor(self.queue.pointer)}
        queue = {"image": self.queue.image, "text": self.queue.text, "ids": self.queue.ids}
        return numbers | {f"queue.{k}": v for k, v in queue.items()} | {f"teacher.{k}": v for k, v in averages.items()}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take what `training_state` gave, on whatever device."""
        if self.training_options is None or not state:
            return
        self.steps, self.queue.pointer = int(state["steps"]), int(state["pointer"])
        self.queue.image, self.queue.text = state["queue.image"].clone(), state["queue.text"].clone()
        self.queue.ids = state["queue.ids"].clone()
        if self.teacher is not None:
            kept = {k.removeprefix("teacher."): v for k, v in state.items() if k.startswith("teacher.")}
            parameters = dict(self.named_parameters())
            self.teacher.averages = {k: v.clone().to(parameters[k].device) for k, v in kept.items()}


def _images_of_texts(image_owner: Tensor | None, text_owner: Tensor, slots: int) -> Tensor:
    """(T,) int64 number of images that each text is about, known on the host where the owners are."""
    if image_owner is None:
        return both(torch.zeros_like, text_owner)
    return both(lambda images, texts: images_per_slot(images, slots)[texts], image_owner, text_owner)


def _unit(x: Tensor) -> Tensor:
    return normalize(at_least_float32(x), dim=-1)
