"""Options of the task `answering`: the prompt, the target, and how answers are generated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mmpeft_ds.fitting import ByOption
from mmpeft_ds.metrics.vqa import Measure
from mmpeft_ds.tasks.common.options import TaskOptions


@dataclass
class Options(TaskOptions):
    """Keys of a source's `task` section.

    Attributes:
        prompt: stands before every question, such as "vqa: ".
        target: which of the annotators' answers is the target: one drawn in proportion to its soft score, again
            every epoch (`sample`), or the one that most gave (`best`).
        listed_only: take only answers of the data's label list, as published for VQAv2.
        score_weight: weight the loss of a question by the soft score of its target, as published for VQAv2; the sum
            is still divided by the number of questions.
        choices: the only answers that may be generated; empty = any words.
        num_beams: beams in evaluation, 1 = greedy.
        max_new_tokens: longest answer in tokens.
        max_questions: questions of a sample in one visit, drawn again every epoch, 0 = all.
        vqa_measure: how answers are scored: `official`, VQA's evaluator as it stands; `2017`, its earlier state, which
            LAVIS, VL-T5 and VL-Adapter carry; `exact`, without normalisation, as GQA's and p-Adapter's.
    """

    fields: ClassVar[ByOption] = {"": ("questions",)}
    reads: ClassVar[ByOption] = {"": ("generated text",)}

    prompt: str = ""
    target: Literal["sample", "best"] = "sample"
    listed_only: bool = False
    score_weight: bool = False
    choices: list[str] = field(default_factory=list)
    num_beams: int = 1
    max_new_tokens: int = 10
    max_questions: int = 0
    vqa_measure: Measure = "official"
