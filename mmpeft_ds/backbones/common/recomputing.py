"""Gradient checkpointing of models that publish a condition."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from mmpeft_ds.sites import condition as condition_context


class RecomputesUnderCondition:
    """Mixin before a `PreTrainedModel`: layers that are recomputed see the condition of their own forward."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, **kwargs: Any
    ) -> None:
        # transformers hands over a partial of torch's checkpoint; its keywords, such as use_reentrant, are kept
        partial = isinstance(gradient_checkpointing_func, functools.partial)
        keywords = gradient_checkpointing_func.keywords if partial else {}
        function = functools.partial(condition_context.checkpoint, **keywords)
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=function, **kwargs)
