"""Options of the task `captioning`: the prompt, the loss, and how captions are generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.fitting import ByOption
from mmpeft_ds.tasks.common.options import TaskOptions


@dataclass
class Options(TaskOptions):
    """Keys of a source's `task` section.

    Attributes:
        prompt: text before every caption, which the model does not generate.
        loss: `token`, the mean over all target tokens of the step, as published; or `caption`, the mean
            over captions of their mean over tokens, in which a long caption weighs as much as a short one.
        smoothing: label smoothing, in [0, 1).
        num_beams: beams in evaluation, 1 = greedy.
        max_length: longest text in positions, prompt included (after one image vector 20 leaves 19 new tokens);
            0 = as `max_new_tokens` says.
        max_new_tokens: longest caption in tokens, 0 = as `max_length` says.
        length_penalty: exponent of the length that a beam's score is divided by.
    """

    fields: ClassVar[ByOption] = {"": ("captions",)}
    reads: ClassVar[ByOption] = {"": ("generated text",)}

    prompt: str = ""
    loss: Literal["token", "caption"] = "token"
    smoothing: float = 0.0
    num_beams: int = 5
    max_length: int = 20
    max_new_tokens: int = 0
    length_penalty: float = 1.0
