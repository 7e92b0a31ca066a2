"""CIDEr-D, BLEU and ROUGE-L of captions against several references, as the COCO caption evaluation computes them.

The formulas are the evaluation's own, to the last digit, and so are the words (`metrics.ptb`, without Java).
METEOR and SPICE exist in Java only: `metrics.coco_java` runs the published package of the `eval` extra for them.

Source: Vedantam et al., CVPR 2015 (CIDEr, arXiv 1411.5726); Papineni et al., ACL 2002 (BLEU); Lin, 2004 (ROUGE-L);
Chen et al., arXiv 1504.00325 (the evaluation).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

from mmpeft_ds.metrics.ptb import tokenize_all

Ngrams = Counter[tuple[str, ...]]

_ORDER = 4  # longest n-gram
_SIGMA = 6.0  # of CIDEr's penalty for another length, in words
_BETA = 1.2  # weight of recall in ROUGE-L


def caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`cider`, `bleu1` to `bleu4` and `rouge_l` of one prediction an image.

    Args:
        predictions: raw text.
        references: all captions of each image, at least one.

    Raises:
        ValueError: if there is no image, an image has no reference, or the numbers differ.
    """
    if not predictions or len(predictions) != len(references) or not all(references):
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} lists of references, none may be empty"
        )
    said, theirs = joined_words(predictions, references)
    # The evaluation's BLEU and CIDEr split at any blank, also at the no-break space in the word "1 1/2"; its ROUGE-L
    # splits at plain blanks alone, and takes an empty caption for one empty word.
    words, their_words = [s.split() for s in said], [[t.split() for t in each] for each in theirs]
    each = bleu(words, their_words)
    scores = {"cider": cider(words, their_words)} | {f"bleu{n}": value for n, value in enumerate(each, start=1)}
    rouge = sum(rouge_l(s.split(" "), [t.split(" ") for t in refs]) for s, refs in zip(said, theirs, strict=True))
    return scores | {"rouge_l": rouge / len(said)}


def joined_words(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Words of all captions, joined by blanks; each side is read as one text, as the evaluation does."""
    words = map(" ".join, tokenize_all(caption for captions in references for caption in captions))
    return list(map(" ".join, tokenize_all(predictions))), [list(itertools.islice(words, len(r))) for r in references]


def bleu(said: Sequence[list[str]], theirs: Sequence[Sequence[list[str]]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus of tokenised captions; the brevity penalty uses each nearest reference length."""
    matched, possible = [0] * _ORDER, [0] * _ORDER
    length = reference_length = 0
    for words, references in zip(said, theirs, strict=True):
        length += len(words)
        reference_length += min((abs(len(r) - len(words)), len(r)) for r in references)[1]
        most: Ngrams = Counter()
        for reference in references:
            most |= _ngrams(reference)
        for gram, count in _ngrams(words).items():
            matched[len(gram) - 1] += min(count, most[gram])
        for n in range(_ORDER):
            possible[n] += max(len(words) - n, 0)
    # the evaluation's guards against division by zero, which reach the tenth digit
    penalty = math.exp(min(0.0, 1 - (reference_length + 1e-9) / (length + 1e-15)))
    product, scores = 1.0, []
    for n in range(_ORDER):
        product *= (matched[n] + 1e-15) / (possible[n] + 1e-9)
        scores.append(product ** (1 / (n + 1)) * penalty)
    return scores


def rouge_l(words: list[str], references: Sequence[list[str]]) -> float:
    """ROUGE-L of one tokenised caption: best precision and best recall over the references, recall weighted by 1.2."""
    common = [_longest_common(reference, words) for reference in references]
    precision = max(common) / max(len(words), 1)
    recall = max(n / max(len(reference), 1) for n, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def cider(said: Sequence[list[str]], theirs: Sequence[Sequence[list[str]]]) -> float:
    """CIDEr-D of a corpus of tokenised captions, ten times a mean over images; words common to all images weigh 0."""
    frequency: Counter[tuple[str, ...]] = Counter()
    for references in theirs:
        frequency.update({gram for reference in references for gram in _ngrams(reference)})
    images = math.log(len(said))

    def vector(words: list[str]) -> tuple[list[dict[tuple[str, ...], float]], list[float]]:
        """For each n-gram order the tf-idf of its n-grams and their norm."""
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDER)]
        for gram, count in _ngrams(words).items():
            weights[len(gram) - 1][gram] = count * (images - math.log(max(1, frequency[gram])))
        return weights, [math.sqrt(sum(w * w for w in order.values())) for order in weights]

    def likeness(words: list[str], own: tuple, reference: list[str]) -> float:
        (mine, my_norm), (other, norm) = own, vector(reference)
        total = 0.0
        for n in range(_ORDER):
            if my_norm[n] and norm[n]:
                # clipped, so that a repeated word gains nothing
                shared = sum(min(w, other[n].get(gram, 0.0)) * other[n].get(gram, 0.0) for gram, w in mine[n].items())
                total += shared / (my_norm[n] * norm[n])
        # lengths in pairs of words, as in the evaluation
        apart = max(len(words) - 1, 0) - max(len(reference) - 1, 0)
        return total / _ORDER * math.exp(-(apart**2) / (2 * _SIGMA**2))

    total = 0.0
    for words, references in zip(said, theirs, strict=True):
        own = vector(words)
        total += sum(likeness(words, own, reference) for reference in references) / len(references)
    return 10 * total / len(said)


def _ngrams(words: list[str]) -> Ngrams:
    return Counter(tuple(words[i : i + n]) for n in range(1, _ORDER + 1) for i in range(len(words) - n + 1))


def _longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
