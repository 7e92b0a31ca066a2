"""Options of Tip-Adapter and Tip-Adapter-F."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmpeft_ds.methods.common.options import HeadOptions


@dataclass
class TipAdapterOptions(HeadOptions):
    """Defaults are those published for ImageNet; docs/methods/few_shot_baselines.md has the other data sets."""

    method: ClassVar[str] = "tip_adapter"

    train_keys: bool = field(default=False, metadata={"help": "Train the keys of the cache (Tip-Adapter-F)."})
    text: bool = field(default=True, metadata={"help": "Add the votes to zero-shot logits; false: the cache alone."})
    alpha: float = field(default=1.17, metadata={"help": "Weight of the cache before the search, and in training."})
    beta: float = field(default=1.0, metadata={"help": "Sharpness of the votes before the search, and in training."})
    search: bool = field(
        default=True, metadata={"help": "Search alpha and beta on the validation split, after training the keys."}
    )
    max_alpha: float = field(default=3.0, metadata={"help": "End of the grid of alpha, never reached."})
    max_beta: float = field(default=7.0, metadata={"help": "End of the grid of beta, never reached."})
    alpha_steps: int = field(default=20, metadata={"help": "Values of alpha, from 0.1."})
    beta_steps: int = field(default=200, metadata={"help": "Values of beta, from 0.1."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("alpha", "beta"):
            self._at_least(key, 0)
            self._at_least(f"max_{key}", 0.1)
            self._at_least(f"{key}_steps", 1)

    @property
    def gradient_free(self) -> bool:
        return not self.train_keys

    @property
    def needs_validation(self) -> bool:
        return self.search


Options = TipAdapterOptions
