"""What a model tells the engine: `ModelHooks`, and `HasFrozenConstants` for a module of it."""

from __future__ import annotations

from torch import Tensor, nn

from mmpeft_ds.sites.base import base_model


class ModelHooks:
    """Mixin of a model that tells the engine more than a stock model of transformers does.

    A stock model needs no mixin: `model_hooks` gives these defaults for it.

    Attributes:
        head_modules: paths of modules that are trained in full, as peft's `modules_to_save`. Default: none.
        runs_again: paths of towers that one forward runs several times; ZeRO-3 then keeps finer hooks in them.
            Default: none.
        runs_unevenly: paths of modules whose parts may run more often on one rank than on another, such as once an
            image; under ZeRO-3 those that are frozen are gathered as a whole, so that ranks stay in step. Default:
            none.
    """

    head_modules: tuple[str, ...] = ()
    runs_again: tuple[str, ...] = ()
    runs_unevenly: tuple[str, ...] = ()

    def training_state(self) -> dict[str, Tensor]:
        """Tensors beside the trainables that a checkpoint must hold, such as a queue; equal on all ranks.

        Default: none.
        """
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027 (an empty default is meant)
        """Take what `training_state` gave, on whatever device. Default: nothing."""


class HasFrozenConstants:
    """Mixin of a module with numbers that its output depends on and that are neither parameters nor buffers."""

    def frozen_constants(self) -> dict[str, Tensor]:
        """Name and tensor of each, for the fingerprint of the frozen base."""
        raise NotImplementedError


def model_hooks(model: nn.Module) -> ModelHooks:
    """The hooks of the base model that `model` is, or that peft has wrapped; the defaults for a stock model."""
    base = base_model(model)
    return base if isinstance(base, ModelHooks) else ModelHooks()
