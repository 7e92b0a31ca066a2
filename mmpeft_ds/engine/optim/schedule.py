"""Learning rate as a pure function of the optimizer step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from mmpeft_ds.recipe.options import OptimOptions


def warmup_steps(options: OptimOptions, total: int) -> int:
    """Warm-up steps: `warmup` itself if >= 1, else that share of `total`, rounded up."""
    return int(options.warmup) if options.warmup >= 1 else math.ceil(options.warmup * total)


def learning_rate(options: OptimOptions, step: int, total: int, steps_per_epoch: int = 0) -> float:
    """Learning rate of optimizer step `step` (counted from 0) of `total`.

    Schedules per step are those of transformers: warm-up starts at 0, and the last step is one before the end.
    `cosine_epoch` is that of CoOp's code (Zhou et al., arXiv 2109.01134): of E epochs the first has `warmup_lr`, and
    the cosine over E epochs starts in the second, so that its last two values are not reached.

    Args:
        steps_per_epoch: needed by `cosine_epoch` alone.

    Raises:
        ValueError: `cosine_epoch` without `steps_per_epoch`.
    """
    if options.schedule == "cosine_epoch":
        if steps_per_epoch < 1:
            raise ValueError("cosine_epoch needs the number of steps per epoch")
        epoch, epochs = step // steps_per_epoch, math.ceil(total / steps_per_epoch)
        if epoch == 0:
            return options.warmup_lr
        return _decayed(options, _cosine(min(1.0, (epoch - 1) / epochs)))
    warmup = warmup_steps(options, total)
    if step < warmup:
        return options.lr * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    if options.schedule == "constant":
        return options.lr
    return _decayed(options, 1.0 - progress if options.schedule == "linear" else _cosine(progress))


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _decayed(options: OptimOptions, shape: float) -> float:
    return options.lr * (options.min_lr_ratio + (1.0 - options.min_lr_ratio) * shape)
