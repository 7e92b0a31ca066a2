"""The meaning of the rows of stored features: a square grid, or the regions of a detector."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mmpeft_ds.data.formats import REGION_COUNTS
from mmpeft_ds.errors import BadInput


def number_of(path: Path) -> int:
    """Rows of an array that has two dimensions; 0 of any other. Raises OSError or ValueError."""
    shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    return shape[0] if len(shape) == 2 else 0


def check(arrays: Mapping[int, Path], declared: str) -> None:
    """Ask for the meaning of the rows if it is needed and was not given. Raises BadInput.

    Args:
        arrays: number of rows -> the first array that has so many.
        declared: `grid`, `regions`, or empty where the user has not said it.
    """
    if declared == "regions" or not arrays:
        return
    odd = next((rows for rows in arrays if math.isqrt(rows) ** 2 != rows), None)
    if odd is not None:
        raise BadInput(
            f"{arrays[odd]}: {odd} rows are no square grid. Store whole grids, without a row for the whole picture, "
            "or say --features-are regions."
        )
    if declared:
        return
    either = next((rows for rows in arrays if rows in REGION_COUNTS), None)
    if either is not None:
        raise BadInput(
            f"{arrays[either]}: {either} rows, which can be a square grid or the regions of a detector. Say which: "
            "--features-are grid or --features-are regions."
        )
    rows, path = next(iter(arrays.items()))
    print(f"note: {path}: {rows} rows are taken for a grid; --features-are says it for sure", file=sys.stderr)
