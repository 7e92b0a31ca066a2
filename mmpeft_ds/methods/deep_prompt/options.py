"""Options of deep prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.options import SiteOptions


@dataclass
class DeepPromptOptions(SiteOptions):
    """Trained prompts inside the layers.

    `prefix`: trained keys and values stand before those of the tokens (Li & Liang, ACL 2021, arXiv 2101.00190).
    `vpt`: trained tokens stand before the input of a layer and are cut off its output (Jia et al., ECCV 2022,
    arXiv 2203.12119). A prompt takes attention from the tokens, so the model does not start as the frozen one.
    """

    style: Literal["prefix", "vpt"] = field(
        default="prefix", metadata={"help": "Trained keys and values in attention, or trained tokens before layers."}
    )
    length: int = field(default=16, metadata={"help": "How many keys and values, or tokens."})
    attention: list[str] | None = field(
        default=None,
        metadata={"help": "prefix: which attention gets one: self, cross; default all that the layers have."},
    )
    depth: Literal["deep", "shallow"] = field(
        default="deep",
        metadata={
            "help": "vpt: new tokens in every chosen layer, or one set that enters before the first chosen layer and "
            "is cut off after the last."
        },
    )
    shared: bool = field(
        default=False,
        metadata={"help": "The same prompts in all chosen layers (of equal width), not new ones in each."},
    )
    reparameterize: int | None = field(
        default=None,
        metadata={
            "help": "Train vectors of this width and a perceptron that makes the prompts from them; default the "
            "prompts themselves."
        },
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the prompts."})
    init_std: float = field(default=0.02, metadata={"help": "Prompts start from N(0, init_std)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("length", 1)
        if self.reparameterize is not None:
            self._at_least("reparameterize", 1)
        self._share("dropout", below=True)
        self._at_least("init_std", 0)
        if self.attention is not None:
            self._some_of("attention", ("self", "cross"))
            if self.style == "vpt":
                raise BadInput(
                    "attention: tokens (style: vpt) enter a whole layer. Leave it out, or use style: prefix."
                )
        if self.depth == "shallow" and self.style == "prefix":
            raise BadInput("depth: a prefix stands in every chosen layer. Choose layers: [0], or style: vpt.")
        if self.depth == "shallow" and self.shared:
            raise BadInput("shared: there is one set of tokens already (depth: shallow). Leave it out.")


Options = DeepPromptOptions
