"""Options of the task `vqa_generative`: the prompt, the weights of answers, and how evaluation answers."""

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
        prompt: what the model reads; `{}` stands for the question.
        clean: put questions into lower case without . ! " ( ) * # : ; ~, as BLIP was trained.
        answer_weight: weight of every distinct answer; 0 = the share of annotators who gave it.
        listed_only: leave out answers that are not among the choices or in the data's label list.
        smoothing: label smoothing of the loss, and of the score by which answers are ranked.
        evaluate: `rank` the choices or the label list, or `write`: generate freely.
        choices: the answers to rank; empty = the data's label list.
        k: how many of them are scored in full: those with the likeliest first token.
        num_beams: beams of `write`, 1 = greedy.
        max_new_tokens: longest answer of `write` in tokens.
        max_questions: questions of a sample in one visit, drawn again every epoch, 0 = all.
        vqa_measure: how answers are scored: `official`, VQA's evaluator as it stands; `2017`, its earlier state, which
            LAVIS, VL-T5 and VL-Adapter carry; `exact`, without normalisation, as GQA's and p-Adapter's.
    """

    fields: ClassVar[ByOption] = {"": ("questions",)}
    reads: ClassVar[ByOption] = {"evaluate: rank": ("ranked answers",), "evaluate: write": ("generated text",)}

    prompt: str = "{}"
    clean: bool = True
    answer_weight: float = 0.0
    listed_only: bool = False
    smoothing: float = 0.0
    evaluate: Literal["rank", "write"] = "rank"
    choices: list[str] = field(default_factory=list)
    k: int = 128
    num_beams: int = 1
    max_new_tokens: int = 10
    max_questions: int = 0
    vqa_measure: Measure = "official"
