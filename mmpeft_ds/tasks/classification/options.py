"""Options of the task `classification`: whether captions help, and which classes may be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmpeft_ds.fitting import ByOption
from mmpeft_ds.tasks.common.options import TaskOptions


@dataclass
class Options(TaskOptions):
    """Keys of a source's `task` section.

    Attributes:
        text: `none`; or `captions`, one caption of the sample goes with its image: drawn in training, the first one in
            evaluation. Nothing about it depends on the label.
        columns: classes that may be predicted: `target`, those of this data set or of its subset, with a softmax over
            these alone; or `all` classes of the training data.
    """

    fields: ClassVar[ByOption] = {"": ("label",), "text: captions": ("captions",)}
    reads: ClassVar[ByOption] = {"": ("class scores",)}

    text: Literal["none", "captions"] = "none"
    columns: Literal["target", "all"] = "target"
