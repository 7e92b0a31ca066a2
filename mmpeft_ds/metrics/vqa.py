"""Accuracy of short answers: the official VQA measure for ten annotators, in its two versions, and plain comparison.

The VQA measure gives full marks when three annotators agree, min(n / 3, 1), averaged over the ten ways to leave one of
them out. Published evaluators differ in what they normalise.

`official` is the evaluator as it stands since 2021: it normalises both sides, but nothing where all annotators agree
exactly. `2017` is its earlier state, which LAVIS, VL-T5 and VL-Adapter carry: the prediction always and wholly,
the annotators' answers by punctuation alone, and only where they do not all agree. `exact` normalises nothing; n of
ten annotators give min(0.3 n, 1): p-Adapter's score, and GQA's for one answer.

Source: the evaluation tools of VQA (Antol et al. 2015; visualqa.org/evaluation); specs/datasets.md 2.1 and 2.4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

Measure = Literal["official", "2017", "exact"]
MEASURES: tuple[Measure, ...] = ("official", "2017", "exact")
ANNOTATORS = 10  # of a question in VQA v1 and v2, for whom the official measure is made

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# A period that no digit follows: "2.5" keeps its point, "p.m." loses both.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # at most so many go: the evaluator passes a flag of this value where the count stands
_THOUSANDS = re.compile(r"\d,\d")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ONE_APOSTROPHE = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could I might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "": "I'm ma'am o'clock 'twas y'all",
}
_TWO_APOSTROPHES = {
    "'d've": "he I it she somebody someone something there they we who you",
    "n't've": "could had might should would",
    "'ll": "y'all",
}


def _contractions() -> dict[str, str]:
    """Spelling -> contraction: the 120 entries of the evaluator's table, no rule beyond them ("hell" stays)."""
    table = {}
    for ending, words in _ONE_APOSTROPHE.items():
        table |= {(word + ending).replace("'", ""): word + ending for word in words.split()}
    for ending, words in _TWO_APOSTROPHES.items():
        for whole in (word + ending for word in words.split()):
            first, middle, last = whole.split("'")
            table |= {f"{first}{middle}'{last}": whole, f"{first}'{middle}{last}": whole}
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    return table | {"somebody'd": "somebodyd", "let's": "let's", "she's": "she's"}


CONTRACTIONS = _contractions()


def normalize_answer(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers up to ten as digits, apostrophes restored.

    Every step and its oddities are those of the official evaluator (specs/datasets.md 2.1).
    """
    words = (_NUMBERS.get(word, word) for word in without_marks(answer).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def without_marks(answer: str) -> str:
    """An answer without punctuation: the first half of the normalisation."""
    thousands = _THOUSANDS.search(answer) is not None
    cleaned = answer
    for mark in _PUNCTUATION:
        # At a word's edge, and everywhere in "1,000", a mark disappears; inside a word it parts two words.
        at_edge = f"{mark} " in answer or f" {mark}" in answer or thousands
        cleaned = cleaned.replace(mark, "" if at_edge else " ")
    return _PERIOD.sub("", cleaned, count=_PERIODS)


def vqa_accuracy(prediction: str, answers: Sequence[str], measure: Measure = "official") -> float:
    """Accuracy of one prediction against the answers of several annotators (ten in VQA v1 and v2), in [0, 1].

    Args:
        measure: which evaluator, see the head of this file.

    Raises:
        ValueError: with fewer than two answers, since one of them is always left out.
    """
    if len(answers) < 2:
        raise ValueError("the VQA measure needs at least two annotators")
    if measure == "exact":
        return min(0.3 * sum(answer == prediction for answer in answers), 1.0)
    said = _one_line(prediction)
    if measure == "2017":
        said = normalize_answer(said)
        theirs = [without_marks(answer) for answer in answers] if len(set(answers)) > 1 else answers
    else:
        theirs = [_one_line(answer) for answer in answers]
        if len(set(theirs)) > 1:
            said, theirs = normalize_answer(said), [normalize_answer(answer) for answer in theirs]
    agree = sum(answer == said for answer in theirs)
    # Leaving one out removes a vote for the prediction in `agree` of the cases.
    left_out = [min((agree - (i < agree)) / 3, 1.0) for i in range(len(theirs))]
    return sum(left_out) / len(left_out)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def answer_score(
    prediction: str, answers: Sequence[str] | Mapping[str, float], measure: Measure = "official"
) -> float:
    """The measure that fits the data: equality for one answer, the VQA measure for several annotators.

    Equality is without regard to case and outer blanks, except under `exact`. Where a data set publishes a score for
    each answer in place of annotators, it is that of the prediction, or 0.
    """
    if isinstance(answers, Mapping):
        return float(answers.get(prediction, 0.0))
    if len(answers) == 1:
        if measure == "exact":
            return float(prediction == answers[0])
        return float(prediction.strip().lower() == answers[0].strip().lower())
    return vqa_accuracy(prediction, answers, measure)


def any_score(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is one of the answers, once all are normalised: for lists of accepted alternatives, and
    for fewer than four annotators, with whom the VQA measure cannot reach 1."""
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def soft_score(count: int, annotators: int) -> float:
    """Training target of an answer that `count` annotators gave: 1 for the only one, else 0.3 a vote up to 1."""
    return 1.0 if annotators == 1 else min(0.3 * count, 1.0)
