"""Lines for the user about ranks that get no samples of a step, or too few for their loss."""

from __future__ import annotations

from typing import Any

from mmpeft_ds.engine.assembly.resolve import Resolved
from mmpeft_ds.recipe import Recipe


def idle_notes(resolved: Resolved, ranks: int) -> list[str]:
    """Notes about ranks that get no samples of a step, or too few for their loss: one about the batch, and of each
    train source one if its samples are too few for the ranks, and one if the sets that ranks compare are too small."""
    recipe, options = resolved.recipe, resolved.backbone.options
    notes = _of_batch(recipe, ranks)
    for number, source in enumerate(resolved.train):
        key = f"data.sources.{number}"
        held = samples_per_rank(recipe.data.global_batch, source.samples, ranks)
        notes += _of_source(recipe, key, source, held, told=bool(notes))
        if source.task.couples_samples:
            notes += _of_sets(recipe, key, held, options.least_slots)
    return notes


def samples_per_rank(slots: int, samples: int, ranks: int) -> list[int]:
    """Samples that each rank has of the first step of an epoch, where `slots` slots take `samples` samples.

    Ranks own consecutive slots; where there are more slots than samples, the empty ones are spread evenly.
    """
    filled = [slot * min(samples, slots) // slots for slot in range(slots + 1)]
    bounds = [filled[rank * slots // ranks] for rank in range(ranks + 1)]
    return [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]


def _of_batch(recipe: Recipe, ranks: int) -> list[str]:
    """A note if the parts of a step have fewer slots than there are ranks."""
    batch, accumulation = recipe.data.global_batch, recipe.optim.accumulation
    per_pass = batch // accumulation
    if ranks <= per_pass:
        return []
    parts = f" in optim.accumulation: {accumulation} parts" if accumulation > 1 else ""
    return [
        f"data.global_batch: {batch:,}{parts} has samples for {per_pass:,} of {ranks:,} ranks at a "
        f"time; {ranks - per_pass:,} compute on padding. Use fewer ranks or a larger batch."
    ]


def _of_source(recipe: Recipe, key: str, source: Any, held: list[int], told: bool) -> list[str]:
    """A note if a step holds the whole source, and that is less than one sample per rank."""
    idle = held.count(0)
    if not idle or (told and source.samples >= recipe.data.global_batch):
        return []
    return [
        f"{key}: a step holds all of its {source.samples:,} samples, for {len(held) - idle:,} of {len(held):,} ranks; "
        f"{idle:,} compute on padding. Use fewer ranks or more data."
    ]


def _of_sets(recipe: Recipe, key: str, held: list[int], least: int) -> list[str]:
    """A note if some ranks have too few samples of a step, where each compares its own samples only."""
    alone = sum(0 < count < least for count in held)
    if not alone:
        return []
    most = min(recipe.data.global_batch, sum(held)) // least
    return [
        f"{key}: each rank tells its samples from its own others alone, and {alone:,} of {len(held):,} ranks hold "
        f"fewer than {least} of a step. Use at most {most:,} ranks, a larger data.global_batch, or negatives of all "
        "ranks."
    ]
