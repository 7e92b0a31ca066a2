"""Clock differences between nodes, by questions and answers over the notes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mmpeft_ds.preflight.notes import Notes

ROUNDS = 5  # questions to every node; the quickest answer counts


def now() -> float:
    """Seconds since the epoch on this node."""
    return time.time()


def offsets(notes: Notes, leaders: Sequence[int]) -> dict[int, tuple[float, float]]:
    """On rank 0: for each of `leaders` that answers, how many seconds its clock is ahead of this one, and how far that
    may be off, which is half the time of the question and its answer."""
    differences = {0: (0.0, 0.0)}
    for rank in (rank for rank in leaders if rank):
        best = None
        for i in range(ROUNDS):
            asked = now()
            notes.write(f"clock/{rank}/{i}/question", "")
            answer = notes.answer(f"clock/{rank}/{i}/answer")
            took = now() - asked
            if answer is None:
                break
            if best is None or took / 2 < best[1]:
                best = (answer - (asked + took / 2), took / 2)
        if best is not None:
            differences[rank] = best
    return differences


def answer(notes: Notes) -> None:
    """On the first rank of every other node: answer the questions of rank 0."""
    for i in range(ROUNDS):
        notes.read(f"clock/{notes.rank}/{i}/question")
        notes.write(f"clock/{notes.rank}/{i}/answer", now())
