"""Adapter arithmetic compiled by `torch.compile`: `engine.compile`.

What is compiled is the part of an adapter layer that computes on its inputs and parameters alone, not the frozen block
around it: the block also looks up the condition of its forward, keeps states for later layers and runs hooks, all of
which stays Python. So neither the condition nor recomputation reaches compiled code, and there is nothing to break
a graph.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from torch import Tensor, nn

from mmpeft_ds.errors import BadInput


class Fusable(nn.Module):
    """Base of a module whose forward is arithmetic on its arguments, options and parameters, and nothing else."""


class FusablePart:
    """Mixin of a module that does more than arithmetic, but keeps its arithmetic in one function.

    Attributes:
        arithmetic: a static method. It gets everything it needs, modules too, as arguments.
    """

    arithmetic: Callable[..., Tensor]


def fuse(model: nn.Module, backend: str = "inductor") -> int:
    """Have every `Fusable` and `FusablePart` of `model` compiled at its first call, each as one graph without a break.

    Returns:
        How many there are.

    Raises:
        BadInput: there is none, or no C++ compiler on a machine without a GPU.
    """
    import torch._dynamo

    modules = [module for module in model.modules() if isinstance(module, (Fusable, FusablePart))]
    if not modules:
        raise BadInput(
            "engine.compile: this method has no arithmetic of its own that could be compiled. Methods that have: "
            "adapter, aurora, bitfit, deep_prompt (with reparameterize), graph_lora, layer_norm, p_adapter "
            "(feed-forward), routed_adapter, routed_lora, tens_lora, uni_adapter. Set engine.compile: false."
        )
    if backend == "inductor" and next(model.parameters()).device.type == "cpu":
        check_compiler()
    # Layers of different widths and roles share the code of one forward, and each is a variant of it.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 8 * len(modules))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 64 * len(modules))
    for module in modules:
        if isinstance(module, Fusable):
            module.compile(fullgraph=True, backend=backend)
        else:
            module.arithmetic = torch.compile(type(module).arithmetic, fullgraph=True, backend=backend)
    return len(modules)


def check_compiler() -> None:
    """Refuse where torch finds no C++ compiler. Raises BadInput."""
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else ["g++", "clang++"])):
        raise BadInput(
            f"engine.compile: on a CPU torch.compile needs a C++ compiler, and {named or 'g++'} is not to be found. "
            "Install g++, name another in CXX, or set engine.compile: false."
        )
