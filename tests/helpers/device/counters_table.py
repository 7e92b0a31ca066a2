"""The tables of docs/device_counts.md, and their comparison with what is counted.

`python -m tests.helpers.device.counters_table` counts and rewrites them, in some minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.helpers import ROOT
from tests.helpers.device import counters_models, counters_steps, matrix

PAGE = ROOT / "docs" / "device_counts.md"
MORE, LESS = 1.1, 0.75  # of a number: above or below, the table is wrong
HOW = "If that is meant, run python -m tests.helpers.device.counters_table and say why in the commit message."
HEADS = (matrix.STORED, matrix.LIVE)
MODELS = tuple(column for column in matrix.COLUMNS if column not in HEADS)
STEP_COLUMNS = ("kernels", "reads", "collectives", "collectives of a checkpoint")
Table = dict[str, dict[str, tuple[int, ...]]]  # row -> column -> numbers


def of_models(columns: Iterable[str], folder: Path) -> Table:
    """Kernels and waits of the rows that fit each column."""
    rows: Table = {}
    for column in columns:
        for row, numbers in counters_models.on_stand_in(column, folder).items():
            rows.setdefault(row, {})[column] = numbers["kernels"], numbers["waits"]
    return rows


def of_steps(counted: dict[str, list[dict[str, Any]]]) -> Table:
    """Rows of cases of `counters_steps.run`, of rank 0."""
    rows = {}
    for name, (first, _) in counted.items():
        calls = sum(first["collectives"].values()), sum(first["saving"].values())
        rows[name] = dict(zip(STEP_COLUMNS, ((n,) for n in (first["kernels"], first["reads"], *calls)), strict=True))
    return rows


def markdown(table: Table, columns: Iterable[str]) -> str:
    """The table; a number that there is none of is a dash."""
    columns = list(columns)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in table.items():
        shown = [" / ".join(map(str, cells[c])) if c in cells else "-" for c in columns]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def written(number: int) -> Table:
    """Table 0 (models), 1 (heads) or 2 (steps) of the page."""
    lines = PAGE.read_text("utf-8").partition(f"<!-- table {number}: begin -->\n")[2].partition("<!--")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in lines.strip().splitlines()]
    columns = head[1:] if len(head) == len(rows[0]) else head
    table: Table = {}
    for name, *cells in rows:
        found = zip(columns, cells, strict=True)
        table[name] = {c: tuple(map(int, cell.split(" / "))) for c, cell in found if cell != "-"}
    return table


def differences(found: Table, page: Table) -> list[str]:
    """A line for each number that has grown by more than a tenth or shrunk by more than a quarter, or is not there."""
    lines = []
    for row, cells in found.items():
        for column, numbers in cells.items():
            before = page.get(row, {}).get(column)
            if before is None:
                lines.append(f"{row}, {column}: {numbers}, not on the page. {HOW}")
                continue
            if any(n > MORE * b for n, b in zip(numbers, before, strict=True)):
                lines.append(f"{row}, {column}: grew from {before} to {numbers}. {HOW}")
            elif any(n < LESS * b for n, b in zip(numbers, before, strict=True)):
                lines.append(f"{row}, {column}: shrank from {before} to {numbers}. {HOW}")
    return lines


def main() -> None:
    """Count everything and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        counted = counters_steps.run([*counters_steps.quickstart(Path(folder)), *counters_steps.TINY], Path(folder))
        models, heads = (of_models(columns, Path(folder)) for columns in (MODELS, HEADS))
        tables = (models, MODELS), (heads, HEADS), (of_steps(counted), STEP_COLUMNS)
    page = PAGE.read_text("utf-8")
    for number, made in enumerate(markdown(*table) for table in tables):
        begin, end = f"<!-- table {number}: begin -->", f"<!-- table {number}: end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(page, "utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
