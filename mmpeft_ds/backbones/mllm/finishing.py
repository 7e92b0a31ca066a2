"""What families of multimodal language models make of the logits of their output layer.

Losses are computed inside this layer, so it must be known here what the model's forward would do to the logits
afterwards.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PretrainedConfig

from mmpeft_ds.ops.finished_logits import PLAIN, Finish

Finishes = Mapping[str, Callable[[Any], Finish]]


def capped(text: Any) -> Finish:
    """The logits by the configuration of a language model that caps them."""
    return Finish(cap=text.final_logit_softcapping)


def divided(text: Any) -> Finish:
    """The logits by the configuration of a language model that divides them."""
    return Finish(1 / text.logits_scaling)


def finish_of(config: PretrainedConfig, finishes: Finishes, stock_class: type) -> Finish | None:
    """What `stock_class` makes of its logits; None where that is not known, so that all logits have to exist.

    Args:
        finishes: of the family, as `Family.finishes`.
    """
    if finish := finishes.get(config.model_type):
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
