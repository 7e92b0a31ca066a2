"""Accuracy of short answers: the official VQA measure for ten annotators, plain accuracy for one answer.

The VQA measure gives full marks when three annotators agree, min(n / 3, 1), averaged over the ten ways to leave one of
them out. Answers are normalised first, unless all annotators agree to the letter.

Source: the rules published with the VQA evaluation (Antol et al. 2015; visualqa.org/evaluation).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# A period that no digit follows: "2.5" keeps its point, "p.m." loses both.
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# Words that are unambiguous without their apostrophe ("well" and "were" are words of their own).
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll you'd you'd've you'll you're you've
"""


def _without_apostrophes(word: str) -> list[str]:
    """Every spelling of `word` with some of its apostrophes left out."""
    pieces = word.split("'")
    joins = itertools.product(("'", ""), repeat=len(pieces) - 1)
    return ["".join(p + j for p, j in zip(pieces, (*join, ""), strict=True)) for join in joins if "" in join]


_RESTORE = {spelling: word for word in _CONTRACTIONS.split() for spelling in _without_apostrophes(word)}


def normalize_answer(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers up to ten as digits, apostrophes restored."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    thousands = _THOUSANDS.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        # At a word's edge, and everywhere in "1,000", a mark disappears; inside a word it parts two words.
        at_edge = f"{mark} " in text or f" {mark}" in text or thousands
        cleaned = cleaned.replace(mark, "" if at_edge else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split())
    return " ".join(_RESTORE.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official accuracy of one prediction against the answers of several annotators (ten in VQA v1 and v2).

    Raises:
        ValueError: with fewer than two answers, since one of them is always left out.
    """
    if len(answers) < 2:
        raise ValueError("the VQA measure needs at least two annotators")
    said = " ".join(prediction.split())
    theirs = [" ".join(answer.split()) for answer in answers]
    if len(set(theirs)) > 1:
        said, theirs = normalize_answer(said), [normalize_answer(answer) for answer in theirs]
    agree = sum(answer == said for answer in theirs)
    # Leaving one out removes a vote for the prediction in `agree` of the cases.
    left_out = [min((agree - (i < agree)) / 3, 1.0) for i in range(len(theirs))]
    return sum(left_out) / len(left_out)


def answer_score(prediction: str, answers: Sequence[str]) -> float:
    """The measure that fits the data: equality for one answer, the VQA measure for several annotators."""
    if len(answers) == 1:
        return float(prediction.strip().lower() == answers[0].strip().lower())
    return vqa_accuracy(prediction, answers)


def any_score(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is one of the answers, once all are normalised: for lists of accepted alternatives, and
    for fewer than four annotators, with whom the VQA measure cannot reach 1."""
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in answers})


def soft_score(count: int, annotators: int) -> float:
    """Training target of an answer that `count` annotators gave: 1 for the only one, else 0.3 a vote up to 1."""
    return 1.0 if annotators == 1 else min(0.3 * count, 1.0)
