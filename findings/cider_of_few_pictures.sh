#!/usr/bin/env bash
# pycocoevalcap: CIDEr of a perfect caption depends on the other pictures: 0 for one picture, 0 for equal captions.
#
# A good guess: CIDEr compares a caption with its references; equal ones score the maximum (10), for any number of pictures.
# What happens: words are weighted by their rarity among the references of the very set that is scored. With one picture, or
#   pictures that are captioned alike, every weight is log(1) = 0 and so is the score. Scores of a subset, of a batch, or mean
#   scores of parts are therefore not scores of the whole, and two split sizes cannot be compared.
# Source: pycocoevalcap.cider.cider_scorer.CiderScorer.compute_cider (document frequencies from the references given).
# Who is hurt: smoke tests on one picture, early-stopping on a small subset, per-rank scores averaged over ranks.
. "$(dirname "$0")/_lib.sh"
no_deps pycocoevalcap==1.2
pins numpy==2.4.6

observe <<'PY'
import contextlib, io
from pycocoevalcap.cider.cider import Cider

def cider(captions, answers=None):
    references = {i: [caption] for i, caption in enumerate(captions)}
    answers = {i: [caption] for i, caption in enumerate(answers or captions)}
    with contextlib.redirect_stdout(io.StringIO()):
        return round(float(Cider().compute_score(references, answers)[0]), 2)

four = ["a red bus on the street", "two dogs play with a ball", "a man rides a brown horse", "food on a white plate"]
near = ["a red bus on the road", "two dogs play with a stick", "a man rides a brown cow", "food on a white table"]
seen = {"one picture, perfect": cider(four[:1]), "five pictures captioned alike, perfect": cider(four[:1] * 5),
        "four pictures, perfect": cider(four), "four pictures, one word wrong in each": cider(four, near)}
halves = (cider(four[:2], near[:2]) + cider(four[2:], near[2:])) / 2
for case, score in seen.items():
    print(f"{case}: CIDEr {score}")
print(f"mean over two halves of the last case: {halves:.2f}")
assert list(seen.values())[:3] == [0.0, 0.0, 10.0] and abs(halves - seen["four pictures, one word wrong in each"]) > 0.01
PY
