"""Learning rate as a pure function of the optimizer step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from mmpeft_ds.engine.options import OptimOptions


def warmup_steps(options: OptimOptions, total: int) -> int:
    """Warm-up steps: `warmup` itself if >= 1, else that share of `total`, rounded up."""
    return int(options.warmup) if options.warmup >= 1 else math.ceil(options.warmup * total)


def learning_rate(options: OptimOptions, step: int, total: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0) of `total`.

    The curves are those of transformers' schedulers: warm-up starts at 0 and the last step is one short of the end.
    """
    warmup = warmup_steps(options, total)
    if step < warmup:
        return options.lr * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    floor = options.min_lr_ratio if options.schedule != "constant" else 0.0
    return options.lr * (floor + (1.0 - floor) * shape[options.schedule])
