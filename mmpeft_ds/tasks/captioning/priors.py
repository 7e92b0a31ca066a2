"""Captions without a model: what a description of pictures that were not looked at is worth.

Also which samples show the same picture, whose captions are then references of one.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from mmpeft_ds.data.identity import PICTURE
from mmpeft_ds.metrics.captions import caption_scores

# Keys of a record that say which picture it shows. Published protocols count each id, also of byte-equal pictures, and
# parts of one video have its id.
WHICH = ("image_id", "video_id", PICTURE)


def by_picture(items: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Records, or rows, of each picture together, in the order of the first; one without `PICTURE` stands alone."""
    same: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for number, item in enumerate(items):
        same[str([item.get(name) for name in WHICH]) if PICTURE in item else number].append(item)
    return list(same.values())


def priors(train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Scores of two guesses; empty where one of the splits holds no caption.

    Args:
        train, test: records with `captions`.

    Returns:
        `majority_METRIC`, where every picture gets the most usual caption of training; `random_METRIC`, where each
        gets one of them that is drawn, the same in every evaluation.
    """
    counts = Counter(text.strip() for record in train for text in record.get("captions", []) if text.strip())
    described = by_picture(record for record in test if record.get("captions"))
    references = [[text for record in same for text in record["captions"]] for same in described]
    if not counts or not references:
        return {}
    usual, texts = most_usual(counts), sorted(counts)
    draw = random.Random(0)
    guesses = {"majority": [usual] * len(references), "random": [draw.choice(texts) for _ in references]}
    return {
        f"{name}_{metric}": value
        for name, guess in guesses.items()
        for metric, value in caption_scores(guess, references).items()
    }


def most_usual(counts: Counter[str]) -> str:
    """The most frequent caption; of equally frequent ones that whose words are in most captions on average.

    Most data sets have no caption twice, or hardly one, so the words decide.
    """
    most = max(counts.values())
    words = {text: text.casefold().split() for text in counts}
    within: Counter[str] = Counter()
    for text, number in counts.items():
        for word in set(words[text]):
            within[word] += number
    tied = (text for text, number in counts.items() if number == most)
    return min(tied, key=lambda text: (-sum(within[word] for word in words[text]) / len(words[text]), text))
