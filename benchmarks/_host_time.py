"""Parts of the time of one optimizer step on one rank.

Timers stand around the forward pass of the model, torch's autograd engine, the step of the wrapped torch optimizer,
and the normalising of pixels where the weights of a patch embedding do not contain it: the arithmetic, which a GPU
would do. What is left of the step is time of the host:
agreeing, completing and unpacking batches, DeepSpeed around the passes, norms and clipping, the row of metrics.jsonl.
What DeepSpeed does inside the model and inside autograd is taken out of them by timers of its own, and counts as time
of the host: the fetch and release of parameters at ZeRO-3, and hooks that reduce gradients. What its engine and
optimizer do besides, around the passes and in the step, is the part `deepspeed` of the host's time, without the
functions that this project has put in their place. Waiting for data is not part of a step. All times are processor
time of the thread that steps, on a CPU autograd's too; other programs disturb it less.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from mmpeft_ds.sites.base import base_model

INSIDE_BACKWARD = ("reduce_ready_partitions_and_remove_grads", "reduce_independent_p_g_buckets_and_remove_grads")
FETCHES = [f"{when}_sub_module_{way}_function" for when in ("pre", "post") for way in ("forward", "backward")]
# Functions of DeepSpeed's optimizer in whose place `engine.zero` puts its own.
REPLACED = ("reduce_gradients", "independent_gradient_partition_epilogue", "_update_model_bit16_weights")
REPLACED += ("_prepare_fp32_grad_for_sub_group", "_unflatten_partitioned_parameters", "unscale_and_clip_grads")
ARITHMETIC = ("forward", "backward", "optimizer", "pixels")


class Split:
    """Seconds of a step by part, `host` among them.

    Args:
        built: `engine.assembly.build.Built`.
    """

    def __init__(self, built: Any):
        self.seconds: dict[str, float] = defaultdict(float)
        self._began = 0.0
        self._inside = [0.0]  # seconds of parts within each part that runs
        optimizer = built.engine.optimizer
        built.model.forward = self._timed("forward", built.model.forward)
        torch.autograd.backward = self._timed("backward", torch.autograd.backward)
        inner = getattr(optimizer, "optimizer", optimizer)
        inner.step = self._timed("optimizer", inner.step)
        if (raw := base_model(built.model).raw_pixels) is not None:
            raw.normalise.forward = self._timed("pixels", raw.normalise.forward)
        for name in INSIDE_BACKWARD:  # of ZeRO-1 and 2, and of ZeRO-3; the second may be called by the first
            if (function := getattr(optimizer, name, None)) is not None:
                setattr(optimizer, name, self._timed("hooks", function))
                break
        for name in ("forward", "backward", "step"):
            setattr(built.engine, name, self._timed("deepspeed", getattr(built.engine, name)))
        for name in REPLACED:
            if name in vars(optimizer):
                setattr(optimizer, name, self._timed("ours", getattr(optimizer, name)))
        for name in FETCHES if hasattr(optimizer, "parameter_offload") else ():
            offload = optimizer.parameter_offload
            setattr(offload, name, self._timed("fetch", getattr(offload, name)))

    def begin(self) -> None:
        """Before a step."""
        self.seconds.clear()
        self._began = time.thread_time()

    def end(self) -> dict[str, float]:
        """After a step: processor seconds of each part, without those of parts within it."""
        whole = time.thread_time() - self._began
        parts = dict.fromkeys((*ARITHMETIC, "hooks", "fetch", "deepspeed"), 0.0) | self.seconds
        return {"step": whole, **parts, "host": whole - sum(parts[name] for name in ARITHMETIC)}

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.thread_time() - began
                self.seconds[part] += seconds - self._inside.pop()
                self._inside[-1] += seconds

        return timed
