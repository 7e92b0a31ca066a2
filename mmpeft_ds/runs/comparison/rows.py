"""Rows of a comparison: a method with its options, as wide as the budget of trained parameters allows.

The budget counts what the method itself trains (its `peft`, `norm` and `bias` parameters). The task's head trains in
every row alike and is left out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch

from mmpeft_ds import methods
from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import frozen_images, plan
from mmpeft_ds.engine.assembly.resolve import attach, resolve
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.options import Route
from mmpeft_ds.recipe.parse import parse_yaml

WIDTHS = ("r", "length")  # options that say how much a method trains, the first that it has
SCALES = ("alpha", "lora_alpha")  # divided by the width in the scale of what is added
PLACES = ("tower", "layers")  # options of the recipe's method that hold for every row
WIDEST = 4096
TRIED = 16  # widths around the middle of a range, where a layer takes only some


@dataclass(frozen=True)
class Fitted:
    """A method's section of a recipe, with a width near the budget.

    Attributes:
        name: of the row, such as `routed_lora-mul`.
        method: section of the recipe.
        trained: parameters that the method trains, without the task's head.
        width: option that was chosen and its value, such as `r 24`; empty where the method has none, or it was given.
        within: whether `trained` is within the tolerance of the budget.
        cached: whether `engine.cache_frozen` of the recipe works with it; not where it trains below the cached values.
    """

    name: str
    method: dict[str, Any]
    trained: int
    width: str
    within: bool
    cached: bool = True


def usual() -> list[str]:
    """Every method that attaches inside a model, `routed_lora` once for each route; `peft` needs a type."""
    rows = []
    for name in methods.names(heads=False):
        if name == "routed_lora":
            rows += [f"routed_lora:route={route}" for route in get_args(Route)]
        elif name != "peft":
            rows.append(name)
    return rows


def section(spec: str, own: dict[str, Any]) -> dict[str, Any]:
    """The recipe's `method` section for a row.

    Args:
        spec: `NAME`, or `NAME:option=value,option=value`, such as `peft:type=loha`.
        own: that section of the user's recipe. A row of its method keeps its options; others keep where it attaches.

    Raises:
        BadInput: no such method or option, or an option without a value.
    """
    name, _, given = spec.partition(":")
    known = methods.options(name, "--methods").own_fields()
    if methods.options(name).scores_features:
        raise BadInput(f"--methods {name}: a head on stored features; launchers/few_shot.py compares those.")
    kept = own if name == own["name"] else {key: own[key] for key in PLACES if key in own and key in known}
    made = {**copy.deepcopy(kept), "name": name}
    for part in re.split(r",(?![^\[{]*[\]}])", given) if given else []:
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            raise BadInput(f"--methods {spec}: {part!r} is no option=value of {name}. Known: {', '.join(known)}.")
        made[key] = parse_yaml(value, f"--methods {spec}")
    return made


def named(spec: str) -> str:
    """Name of a row, which also names its files."""
    name, _, given = spec.partition(":")
    values = [part.rpartition("=")[2] for part in given.split(",")] if given else []
    return "-".join([name, *(re.sub(r"[^A-Za-z0-9.]+", "_", value).strip("_") for value in values)])


def trained_of(recipe: recipes.Recipe, method: dict[str, Any]) -> int:
    """Number of parameters that the method trains on the recipe's backbone, counted without weights. Raises BadInput
    if it does not fit."""
    resolved = resolve(with_method(recipe, method, cached=False))
    with torch.device("meta"):
        model = attach(resolved, resolved.backbone.build(on_meta=True))
    counts = plan.trainable_by_kind(resolved, model)
    return sum(counts.values()) - counts["head"]


def with_method(recipe: recipes.Recipe, method: dict[str, Any], cached: bool) -> recipes.Recipe:
    """A copy of the recipe with another method, and without its cache of frozen values unless `cached`."""
    made = copy.deepcopy(recipe)
    made.method = copy.deepcopy(method)
    made.engine.cache_frozen.on = made.engine.cache_frozen.on and cached
    return made


def _cached(recipe: recipes.Recipe, method: dict[str, Any]) -> bool:
    """Whether the values that the recipe wants to keep stay the same while the method trains."""
    try:
        frozen_images.check(resolve(with_method(recipe, method, cached=True)))
    except BadInput:
        return False
    return True


def fit(spec: str, recipe: recipes.Recipe, budget: int, tolerance: float) -> Fitted:
    """The row of `spec` with the width whose number of trained parameters is nearest to the budget.

    Args:
        tolerance: share of the budget by which the number may differ.

    Raises:
        BadInput: the method does not fit the recipe's backbone, or an option is wrong.
    """
    method = section(spec, recipe.method)
    options = methods.options(method["name"])
    given = {part.partition("=")[0] for part in spec.partition(":")[2].split(",")}
    width = next((key for key in WIDTHS if key in options.own_fields()), None)
    chosen = ""
    if width is None or width in given:
        trained = trained_of(recipe, method)
    else:
        defaults = options()
        scales = [key for key in SCALES if key in options.own_fields() and key not in given]
        start = method.get(width, getattr(defaults, width))
        if not isinstance(start, int):
            raise BadInput(f"--methods {spec}: {width} is {start}. Give one number, or name it in the row.")

        def sized(value: int) -> dict[str, Any]:
            made = {**method, width: value}
            for key in scales:
                ratio = method.get(key, getattr(defaults, key)) / start
                made[key] = type(getattr(defaults, key))(round(ratio * value, 6))
            return made

        best, trained = nearest(lambda value: trained_of(recipe, sized(value)), start, budget)
        method, chosen = sized(best), f"{width} {best}"
    within = abs(trained - budget) <= tolerance * budget
    return Fitted(named(spec), method, trained, chosen, within, _cached(recipe, method))


def nearest(count: Callable[[int], int], start: int, budget: int) -> tuple[int, int]:
    """The width whose count is nearest to the budget, and that count; counts rise, or fall, with the width.

    Args:
        count: raises BadInput for widths that cannot be, such as those that a layer does not divide by.
        start: a width that can be.

    Raises:
        BadInput: `start` cannot be.
    """
    counts: dict[int, int | None] = {start: count(start)}

    def of(width: int) -> int | None:
        if width not in counts:
            try:
                counts[width] = count(width)
            except BadInput:
                counts[width] = None
        return counts[width]

    def best() -> tuple[int, int]:
        there = {width: number for width, number in counts.items() if number is not None}
        width = min(there, key=lambda w: (abs(there[w] - budget), w))
        return width, there[width]

    wider, narrower = of(2 * start), of(max(1, start // 2))
    falls = wider < counts[start] if wider is not None else narrower is not None and narrower > counts[start]
    up = (counts[start] < budget) != falls  # whether the budget lies beyond greater widths
    inner, outer = start, WIDEST + 1 if up else 0  # the nearest width is between both, or one of them
    step = 2 * start if up else start // 2
    while 1 <= step <= WIDEST:
        number = of(step)
        if number is not None and (number < budget) != (counts[start] < budget):
            outer = step
            break
        inner, step = inner if number is None else step, 2 * step if up else step // 2
    while abs(outer - inner) > 1 and (middle := _valid(of, *sorted((inner, outer)))) is not None:
        if (counts[middle] < budget) == (counts[start] < budget):
            inner = middle
        else:
            outer = middle
    return best()


def _valid(of: Callable[[int], int | None], low: int, high: int) -> int | None:
    """A width between both that can be, near their middle; None if none of the `TRIED` nearest ones can."""
    middle = (low + high) // 2
    between = sorted(range(low + 1, high), key=lambda w: abs(w - middle))
    return next((w for w in between[:TRIED] if of(w) is not None), None)
