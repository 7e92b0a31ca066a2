"""What families of multimodal language models make of the logits of their output layer.

Losses are computed inside this layer, so it must be known here what the model's forward would do to the logits
afterwards.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from mmpeft_ds.ops.finished_logits import PLAIN, Finish


def _capped(text: Any) -> Finish:
    return Finish(cap=text.final_logit_softcapping)


def _scaled_and_capped(text: Any) -> Finish:
    return Finish(text.output_multiplier, text.final_logit_softcapping)


def _divided(text: Any) -> Finish:
    return Finish(1 / text.logits_scaling)


# By `model_type`, from the configuration of the language model; a test compares losses with those of all logits.
_FINISHES: dict[str, Callable[[Any], Finish]] = {
    "cohere_compass": lambda text: Finish(1.0 if text.logit_scale is None else text.logit_scale),
    "gemma3n": _capped,
    "gemma4": _capped,
    "gemma4_unified": _capped,
    "granite4_vision": _divided,
    "granite_docling": _divided,
    "hyperclovax_vision_v2": lambda text: Finish(text.logits_scaling),
    "inkling2": lambda text: Finish(cap=text.final_logit_softcapping, tokens=text.unpadded_vocab_size),
    "llama4": lambda text: PLAIN,  # of the model inside
    "mistral_large4": _capped,
    "muse_glimmer": _scaled_and_capped,
    "muse_spark": _scaled_and_capped,
    "paligemma": lambda text: Finish(cap=getattr(text, "final_logit_softcapping", None)),
}


def finish_of(config: PretrainedConfig, stock_class: type) -> Finish | None:
    """What `stock_class` makes of its logits; None where that is not known, so that all logits have to exist."""
    if finish := _FINISHES.get(config.model_type):
        return finish(config.get_text_config())
    return PLAIN if _are_left_alone(stock_class) else None


@functools.cache
def _are_left_alone(stock_class: type) -> bool:
    """Whether the forward of a class sets `logits` once, to what `lm_head` returns. A source of another form is taken
    for one that changes them, which costs memory alone."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(stock_class.forward))))
    made = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {inner.id for t in targets for inner in ast.walk(t) if isinstance(inner, ast.Name)}
            made += [node.value] if "logits" in names else []
    return len(made) == 1 and isinstance(made[0], ast.Call) and ast.unparse(made[0].func) == "self.lm_head"
