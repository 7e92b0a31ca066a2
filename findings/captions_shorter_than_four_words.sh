#!/usr/bin/env bash
# pycocoevalcap: perfect captions of two or three words score 0.03 in BLEU-4 and 5 or 7.5 of 10 in CIDEr.
#
# A good guess: a caption equal to its reference has the full score, whatever its length.
# What happens: both measures average over runs of one to four words. Three words have no run of four: BLEU-4 multiplies by
#   nearly 0, CIDEr counts the missing runs as 0.
# Source: pycocoevalcap.bleu.bleu_scorer.BleuScorer.compute_score (tiny / small), cider_scorer.CiderScorer.compute_cider
#   (division by n = 4 whatever runs there are).
# Who is hurt: captions that are labels or names, and answers scored as captions: the ceiling is far below 1 and 10.
. "$(dirname "$0")/_lib.sh"
no_deps pycocoevalcap==1.2
pins numpy==2.4.6

observe <<'PY'
import contextlib, io
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

seen = {}
for words in (2, 3, 4):
    captions = {i: [" ".join(f"w{i}{k}" for k in range(words))] for i in range(4)}
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, cider = Bleu(4).compute_score(captions, captions)[0], Cider().compute_score(captions, captions)[0]
    seen[words] = (round(float(bleu[3]), 3), round(float(cider), 2))
    print(f"four perfect captions of {words} words: BLEU-4 {seen[words][0]}, CIDEr {seen[words][1]}")
assert seen[4] == (1.0, 10.0) and seen[3][0] < 0.05 and seen[3][1] == 7.5 and seen[2][1] == 5.0, seen
PY
