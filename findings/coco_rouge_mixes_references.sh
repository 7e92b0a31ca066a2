#!/usr/bin/env bash
# pycocoevalcap: ROUGE-L of a caption with two references can be 1.0 though it is 0.5 and 0.7 with either of them.
#
# A good guess: with several references the score is that of the best one, as in rouge_score and torchmetrics, so a perfect
#   score says that the caption is equal to a reference.
# What happens: the best precision of any reference and the best recall of any other are put together; and recall
#   counts more (beta 1.2). A reference of two words that occur in the caption gives the recall, a long one the precision.
# Source: pycocoevalcap.rouge.rouge.Rouge.calc_score (max of prec and max of rec, then F with beta 1.2).
# Who is hurt: comparisons of ROUGE-L between papers that use the COCO script and those that use another package, with 5 references a
#   picture; and whoever reads 1.0 as "found".
. "$(dirname "$0")/_lib.sh"
no_deps pycocoevalcap==1.2
pins rouge-score==0.1.2 numpy==2.4.6

observe <<'PY'
from pycocoevalcap.rouge.rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

caption = "a red cat sits"
references = ["a red", "a red cat on the big old mat that sits"]
coco = {name: round(Rouge().calc_score([caption], given), 3)
        for name, given in (("first", references[:1]), ("second", references[1:]), ("both", references))}
scorer = RougeScorer(["rougeL"])
google = {"first": scorer.score(references[0], caption), "second": scorer.score(references[1], caption),
          "both": scorer.score_multi(references, caption)}
google = {name: round(score["rougeL"].fmeasure, 3) for name, score in google.items()}
print(f"caption {caption!r}, references {references}")
print(f"pycocoevalcap ROUGE-L: {coco}")
print(f"rouge_score rougeL:    {google}")
assert coco == {"first": 0.709, "second": 0.53, "both": 1.0}, coco
assert google["both"] == max(google["first"], google["second"]) < 0.7, google
PY
