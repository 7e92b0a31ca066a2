"""Functions for label lists and rows of predictions, shared by tasks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from mmpeft_ds.errors import BadInput

# In the row of a prediction that was chosen by scores of which some are NaN or infinite, which compare as the best.
NOT_FINITE = {"not_finite": True}


def nan_unless_finite(rows: Iterable[dict[str, Any]], scores: dict[str, float]) -> dict[str, float]:
    """`scores`, or NaN for each of them where a prediction rests on scores that are no finite numbers."""
    if any(row.get("not_finite") for row in rows):
        return dict.fromkeys(scores, math.nan)
    return scores


def check_different(labels: Sequence[str]) -> None:
    """Raises BadInput if two classes have one name: they could not be told apart in targets and results."""
    twice = [label for label, number in Counter(labels).items() if number > 1]
    if twice:
        places = [i for i, label in enumerate(labels) if label == twice[0]]
        raise BadInput(
            f"label list: {twice[0]!r} names the classes {', '.join(map(str, places))}. Prepare the data so that each "
            "class has a name of its own, such as its folder."
        )
