"""Forecast of micro-batches planned by tokens, for several rank counts; printed by `train.py --check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from mmpeft_ds.data.assumed import is_assumed
from mmpeft_ds.data.manifest import local_path
from mmpeft_ds.data.token_plan import forecast
from mmpeft_ds.engine import token_counts
from mmpeft_ds.engine.assembly.resolve import Resolved, ResolvedSource
from mmpeft_ds.engine.text_check import places_of

COUNTED = 500  # samples of a source, evenly over the split, where the counts are not there yet
STEPS = 20


def make(resolved: Resolved, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each training source that lies on this machine and each number of ranks; none without `data.pack`."""
    data = resolved.recipe.data
    here = [s for s in resolved.train if not is_assumed(s.manifest) and local_path(s.manifest.dir) is not None]
    rows = []
    for source in here if data.pack else ():
        counts = _counts(resolved, source)
        lengths = token_counts.as_lengths(resolved, counts)
        for number in ranks if len(counts) else ():
            expected = forecast(lengths, data.pack, data.global_batch, number, STEPS)
            facts = {"dir": source.options.dir, "counted": len(counts), "ranks": number}
            facts |= {"longest": int(counts[:, 0].max()), "beyond": float((counts[:, 0] > data.pack).mean())}
            rows.append(facts | dataclasses.asdict(expected))
    return rows


def remarks(resolved: Resolved, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines for the user: samples beyond the budget."""
    pack, lines = resolved.recipe.data.pack, []
    for row in rows:
        line = (
            f"data.pack: {pack:,} tokens, but {row['beyond']:.1%} of the samples of {row['dir']} have more (up to "
            f"{row['longest']:,}). Each has a micro-batch to itself and needs its memory."
        )
        if row["beyond"] and line not in lines:
            lines.append(line)
    return lines


def tables(rows: Sequence[dict[str, Any]], pack: int) -> list[Table]:
    """The rows as a table for each source."""
    made = []
    for source in dict.fromkeys(row["dir"] for row in rows):
        title = f"{source}: micro-batches of at most {pack:,} tokens, expected"
        table = Table(title=title, title_justify="left")
        for column in ("ranks", "micro-steps", "tokens/row", "padding", "else", "slowest rank", "waiting", "moved"):
            table.add_column(column, justify="right")
        for row in rows:
            if row["dir"] == source:
                table.add_row(
                    str(row["ranks"]),
                    f"{row['micro_steps']:.1f}",
                    f"{row['row']:,.0f}",
                    "0%",  # a row ends with its last token
                    f"{row['padded']:.0%}",
                    f"{row['slowest']:.2f}",
                    f"{row['waiting']:.0%}",
                    f"{row['moved']:.0%}",
                )
        table.caption = (
            "else: padding without pack; slowest rank: over the median; waiting: for it, share of the time; moved: "
            "samples read by another rank than the one whose slots they are of"
        )
        made.append(table)
    return made


def _counts(resolved: Resolved, source: ResolvedSource) -> np.ndarray:
    known = token_counts.read(token_counts.file_of(resolved, source), source.samples)
    if known is not None:
        return known
    places = places_of(source)
    some = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, min(COUNTED, len(places))).astype(int))]
    return token_counts.count(resolved, source, some)
