"""A step of DeepSpeed's engine without what it does each time for features that this project never turns on."""

from __future__ import annotations

from typing import Any


def step_directly(engine: Any) -> None:
    """Let `engine.step` do its part of an optimizer step alone.

    DeepSpeed asks some forty times a step whether timers, profilers, monitors, autotuning and memory reports are on.
    `zero.config` refuses or turns off all of them. Below stage 3 the two hooks around the forward pass of the model
    serve nothing else either; at stage 3 they let it find parameters that are used outside their modules.
    """

    def step() -> None:
        if engine.is_gradient_accumulation_boundary():
            engine._take_model_step(None)
        else:
            engine._step_applied = False
        engine.micro_steps += 1

    engine.step = step
    if engine.zero_optimization_stage() < 3:
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        engine.module_forward_pre_hook = engine.module_forward_post_hook = None
