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
        columns: which classes may be predicted: `target`, those of this data set, or of the subset that it is cut to,
            before the softmax; or `all` that the model knows.
    """

    text: Literal["none", "captions"] = "none"
    columns: Literal["target", "all"] = "target"
