"""Options of zero-shot classification."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mmpeft_ds.methods.common.options import HeadOptions


@dataclass
class ZeroShotOptions(HeadOptions):
    """Nothing is trained."""

    method: ClassVar[str] = "zero_shot"

    ensemble: Literal["unit", "raw"] | None = field(
        default=None,
        metadata={
            "help": "How templates become one class text: `unit` averages unit vectors (Tip-Adapter), `raw` vectors "
            "as they are (TaskRes); default the backbone's."
        },
    )

    @property
    def gradient_free(self) -> bool:
        return True


Options = ZeroShotOptions
