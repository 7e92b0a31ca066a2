"""Options of MMRL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmpeft_ds.methods.common.options import HeadOptions


@dataclass
class MMRLOptions(HeadOptions):
    """A shared space of learned tokens that enter the upper layers of both encoders. Defaults are the published ones
    for 16 shots of all classes on CLIP ViT-B/16."""

    method: ClassVar[str] = "mmrl"

    tokens: int = field(default=5, metadata={"help": "Number of representation tokens K."})
    width: int = field(default=512, metadata={"help": "Width of the representation space."})
    first_layer: int = field(
        default=6, metadata={"help": "First layer J of both towers that gets the tokens, counted from 1."}
    )
    first_text_layer: int | None = field(
        default=None, metadata={"help": "The same for the text tower, where it has another number of layers."}
    )
    alpha: float = field(
        default=0.7, metadata={"help": "Weight of the class feature, in the loss and in logits of trained classes."}
    )
    regularisation: float = field(
        default=0.5, metadata={"help": "Weight of the distances of class and text features to the frozen ones."}
    )
    template: str = field(
        default="a photo of a {}.", metadata={"help": "Text of a class; `{}` stands for its name in words."}
    )
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the space at the start."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("tokens", "width", "first_layer"):
            self._at_least(key, 1)
        if self.first_text_layer is not None:
            self._at_least("first_text_layer", 1)
        for key in ("regularisation", "init_std"):
            self._at_least(key, 0)
        self._share("alpha")
        if "{}" not in self.template:
            self._refuse("template", f"{self.template!r} has no {{}}, where the name of the class stands. Add it.")


Options = MMRLOptions
