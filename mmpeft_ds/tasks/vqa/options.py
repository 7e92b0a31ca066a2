"""Options of the task `vqa`: the loss, and the number of answers and questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.fitting import ByOption
from mmpeft_ds.metrics.vqa import Measure
from mmpeft_ds.tasks.common.options import TaskOptions


@dataclass
class Options(TaskOptions):
    """Keys of a source's `task` section.

    Attributes:
        loss: `bce`, binary cross-entropy against soft targets, the mean over the answers; or `ce`, cross-entropy on
            the answer that most annotators gave.
        num_answers: use the first n answers of the label list, 0 = all.
        max_questions: questions of a sample in one visit, drawn again every epoch, 0 = all.
        vqa_measure: how answers are scored: `official`, VQA's evaluator as it stands; `2017`, its earlier state, which
            LAVIS, VL-T5 and VL-Adapter carry; `exact`, without normalisation, as GQA's and p-Adapter's.
    """

    fields: ClassVar[ByOption] = {"": ("questions",)}
    reads: ClassVar[ByOption] = {"": ("answer scores",)}

    loss: Literal["bce", "ce"] = "bce"
    num_answers: int = 0
    max_questions: int = 0
    vqa_measure: Measure = "official"
