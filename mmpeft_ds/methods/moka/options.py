"""Options of MokA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmpeft_ds.methods.common.options import PROJECTIONS, SiteOptions

TARGETS = (*PROJECTIONS, "up", "gate", "down")


@dataclass
class MokaOptions(SiteOptions):
    """LoRA with a `down` for text and one for image tokens, which read the question in the bottleneck; one `up`.

    Source: Wei, Miao, Zhou, Hu, NeurIPS 2025, arXiv 2506.05191.
    """

    r: int = field(default=8, metadata={"help": "Width of the bottleneck."})
    alpha: float = field(default=16.0, metadata={"help": "The low-rank term is scaled by alpha / r."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the input of the low-rank term."})
    attention: float = field(
        default=1.0, metadata={"help": "Weight of what image tokens read of the question; 0: they read nothing."}
    )
    read: Literal["question", "prompt"] = field(
        default="question",
        metadata={
            "help": "What image tokens read: the text between the last image of the prompt and the first answer, as "
            "published, or all text of the prompt."
        },
    )
    targets: list[str] = field(
        default_factory=lambda: list(TARGETS),
        metadata={
            "help": "Which projections: q, k, v, out of attention, up, gate, down of feed-forward blocks; the gate "
            "where there is one."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("r", 1)
        self._at_least("attention", 0)
        self._share("dropout", below=True)
        self._some_of("targets", TARGETS)


Options = MokaOptions
