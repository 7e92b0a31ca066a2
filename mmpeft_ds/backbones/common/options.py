"""Base of the options of backbones: what a backbone gives tasks to read, known before torch is imported."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mmpeft_ds.fitting import ByOption

# Forms of a quantised base, and the package that each needs.
QUANTISED = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
Quantise = Literal["none", "nf4", "int8", "fp8"]


class BackboneOptions:
    """Base of a backbone's options, which are what the recipe's `backbone` section may set.

    A subclass is a dataclass of plain values; its module imports neither torch nor transformers.

    Attributes:
        gives: what tasks may read of the model's output, by the setting that it depends on (see `fitting`). Empty:
            not declared, so that no task is refused. Words in use: "answer scores" of a closed list for each text,
            "class scores" for each sample, "generated text", "ranked answers", "conversation scores" of every token
            that the assistant says, "image and text features", "matching scores" of image and text.
        random_weights: the configuration of the checkpoint alone is loaded, not its weights.
        quantise: form in which the frozen linear layers hold their weights; backbones whose options lack it have none.
        former: option -> the value that runs and adapters from before it existed were made with, where that is not
            its default.
    """

    gives: ClassVar[ByOption] = {}
    random_weights = False
    quantise: Quantise = "none"
    former: ClassVar[dict[str, Any]] = {}

    def checkpoints(self) -> list[str]:
        """Pretrained checkpoints that are loaded: hub names, folders, `packaged:` names. Default: what the options
        `model`, `vision` and `text` name."""
        given = vars(self)
        return [name for option in ("model", "vision", "text") if (name := given.get(option))]

    @property
    def least_slots(self) -> int:
        """Samples of a step that a rank has to hold for a loss that tells them from each other. More than 1 where each
        rank forms a set of its own, so that others' samples do not count. Default: 1."""
        return 1
