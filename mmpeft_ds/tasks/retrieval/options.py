"""Options of the task `retrieval`: the losses, the captions of a visit, and the matching head in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.fitting import ByOption
from mmpeft_ds.tasks.common.options import TaskOptions


@dataclass
class Options(TaskOptions):
    """Keys of a source's `task` section.

    Attributes:
        loss: `contrast`, the contrastive loss that the model computes itself (BLIP, with queue and teacher), or else
            that of all pairs of the step over all ranks; `contrast_match`, that plus the loss of the matching head.
        captions: captions of a sample in one visit in training, drawn again each time; 0 = all. Evaluation takes all.
        rerank: how many of each list the matching head ranks again in evaluation, 0 = none.
        similarity_weight: share of the cosine in the score of what was ranked again: 0 for images, 1 for videos, as
            published.
        id_field: json field (of the record, or of its `extra`) that tells which samples show the same picture. Empty:
            samples whose images are equal to the byte do, however many lines of a file name them. Each picture is one
            candidate with the captions of all its samples; each caption is a candidate of its own, also where another
            picture has the same words, and only its own picture counts as right. In training, samples of one picture
            are no negatives of each other.
    """

    fields: ClassVar[ByOption] = {"": ("captions",)}
    reads: ClassVar[ByOption] = {"": ("image and text features",)}
    reads_in_training: ClassVar[ByOption] = {"loss: contrast": (), "loss: contrast_match": ("matching scores",)}

    loss: Literal["contrast", "contrast_match"] = "contrast_match"
    captions: int = 1
    rerank: int = 128
    similarity_weight: float = 0.0
    id_field: str = ""
