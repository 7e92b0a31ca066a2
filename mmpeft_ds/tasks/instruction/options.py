"""Options of the task `instruction`: the loss, and how answers are generated in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.fitting import ByOption
from mmpeft_ds.tasks.common.options import TaskOptions


@dataclass
class Options(TaskOptions):
    """Keys of a source's `task` section.

    Attributes:
        loss: `token`, the mean over all tokens of the assistant in the step; or `conversation`, the mean over
            conversations of their mean over tokens, in which a long answer weighs as much as a short one.
        num_beams: beams in evaluation, 1 = greedy.
        max_new_tokens: longest answer in evaluation, in tokens; 0 = generate none, and score the given answers only.
    """

    fields: ClassVar[ByOption] = {"": ("conversations",)}
    reads: ClassVar[ByOption] = {"": ("conversation scores",)}

    loss: Literal["token", "conversation"] = "token"
    num_beams: int = 1
    max_new_tokens: int = 64
