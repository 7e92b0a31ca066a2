"""Options of CLIP-Adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmpeft_ds.methods.common.options import HeadOptions


@dataclass
class ClipAdapterOptions(HeadOptions):
    """Two maps without bias, D -> D / reduction -> D, a ReLU after each."""

    method: ClassVar[str] = "clip_adapter"

    ratio: float = field(
        default=0.2, metadata={"help": "Share of the adapted feature; the published code has 0.2, the paper tunes it."}
    )
    reduction: int = field(default=4, metadata={"help": "Feature width over width of the bottleneck."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._share("ratio")
        self._at_least("reduction", 1)


Options = ClipAdapterOptions
