"""Skipping the last blocks of a vision tower, whose output the language model does not read.

LLaVA and related models read the hidden states of an inner block of the tower, such as the last but one. The output of
the blocks after it is unused, so a frozen one returns its input while features are computed: the features stay the
same bit for bit, and the model still gets the number of hidden states that it expects.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


class UnreadBlocks:
    """The last blocks of a vision tower, whose output enters no feature.

    Args:
        config: of the whole model; its `vision_feature_layer`, one number or several, selects the hidden states that
            are read: 0 is the input of the first block, -1 the output of the last.
        tower: the vision tower. Its blocks must be one ModuleList of `num_hidden_layers` modules.

    Attributes:
        blocks: the unread blocks; empty if the model has no such option or the ModuleList is not unique.
    """

    def __init__(self, config: PretrainedConfig, tower: nn.Module):
        named = getattr(config, "vision_feature_layer", None)
        layers = [named] if isinstance(named, int) else list(named or ())
        of_tower = tower.config if isinstance(tower, PreTrainedModel) else None
        count = getattr(of_tower, "num_hidden_layers", 0)
        stacks = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        self.blocks: list[nn.Module] = []
        if layers and len(stacks) == 1:
            last = max(layer if layer >= 0 else count + 1 + layer for layer in layers)
            self.blocks = list(stacks[0][last:])
        self._returns_tensor: bool | None = None  # some blocks return a tuple

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Context in which the frozen blocks return their first argument. In the first one all blocks still run."""
        if not self.blocks:
            yield
        elif self._returns_tensor is None:
            hook = self.blocks[0].register_forward_hook(self._look)
            try:
                yield
            finally:
                hook.remove()
        else:
            blocks = [block for block in self.blocks if self._returns_tensor and _may_be_left_out(block)]
            for block in blocks:
                block.forward = _first
            try:
                yield
            finally:
                for block in blocks:
                    del block.forward

    def _look(self, block: nn.Module, args: tuple, output: Any) -> None:
        self._returns_tensor = isinstance(output, Tensor) and bool(args) and isinstance(args[0], Tensor)


def _may_be_left_out(block: nn.Module) -> bool:
    """Whether a block is frozen, not compiled, and has the forward of its class."""
    replaced = "forward" in vars(block) or block._compiled_call_impl is not None
    return not replaced and not any(p.requires_grad for p in block.parameters())


def _first(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
