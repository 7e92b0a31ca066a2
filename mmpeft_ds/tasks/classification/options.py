"""Options of the task `classification`: whether captions help, and which classes may be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class Options:
    """Keys of a source's `task` section.

    Attributes:
        text: `none`; or `captions`, one caption of the sample goes with its image: drawn in training, the first one in
            evaluation. Nothing about it depends on the label.
        columns: classes that may be predicted: `target`, those of this data set or of its subset, with a softmax over
            these alone; or `all` classes of the training data.
    """

    text: Literal["none", "captions"] = "none"
    columns: Literal["target", "all"] = "target"
