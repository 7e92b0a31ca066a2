#!/usr/bin/env python
"""Score a file of predictions: CIDEr, BLEU and ROUGE-L of captions, or how many answers are right. Needs no model.

    python launchers/score.py --predictions runs/captioner/predictions-test.jsonl --measure captions
    python launchers/score.py --predictions results.json --references captions_val2014.json --measure captions
    python launchers/score.py --predictions results.json --data data/vqav2 --split val --measure vqa --vqa-measure 2017
    python launchers/score.py --predictions submission-test1-nlvr2.csv --references test1.json --measure nlvr2

Predictions are a result file (a list of {image_id, caption} or {question_id, answer}) or what evaluate.py wrote,
which holds its references itself. METEOR and SPICE need the `eval` extra and Java, and are left out without them
unless named by --metrics. Both sides must have the same ids.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402
from mmpeft_ds.files import write_json  # noqa: E402
from mmpeft_ds.metrics import coco_java  # noqa: E402
from mmpeft_ds.metrics.vqa import MEASURES  # noqa: E402
from mmpeft_ds.runs import score  # noqa: E402


def main() -> int:
    """Read both sides, compare their ids, and print one table."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--predictions", type=Path, required=True, help="result file, or RUN/predictions-SPLIT.jsonl")
    parser.add_argument("--references", type=Path, help="annotations: COCO or VQA form, or a list of the same entries")
    parser.add_argument("--data", help="prepared data set, in place of --references")
    parser.add_argument("--split", help="split of --data")
    parser.add_argument("--measure", choices=score.KINDS, required=True, help="what is scored")
    parser.add_argument("--vqa-measure", choices=MEASURES, default="official", help="evaluator (default: official)")
    parser.add_argument(
        "--metrics", nargs="+", choices=coco_java.NAMES, help="Java metrics of captions, then required"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")
    args = parser.parse_args()
    if args.references and args.data:
        raise BadInput("--references and --data: give one of them.")
    if bool(args.data) != bool(args.split):
        raise BadInput("--data and --split belong together: name the data set and its split.")
    if args.metrics and args.measure != "captions":
        raise BadInput(f"--metrics {' '.join(args.metrics)}: scores captions; use --measure captions.")
    if args.metrics and (missing := coco_java.missing(args.metrics)):
        raise BadInput(f"--metrics: {missing}")  # before anything is computed
    source = score.Source(args.references, args.data, args.split or "")
    named = score.named_pairs(args.measure, args.predictions, source)
    pairs = [pair for _, pair in named]
    scores = (
        score.nlvr2_scores(named) if args.measure == "nlvr2" else score.scores(args.measure, pairs, args.vqa_measure)
    )
    if args.measure == "captions":
        extra, note = coco_java.scores_where_possible(pairs, args.metrics)
        scores |= extra
        if note:
            print(f"note: {note}", file=sys.stderr)
    how = f", evaluator {args.vqa_measure}" if args.measure == "vqa" else ""
    console.score_table(scores, {}, f"{args.predictions}: {len(pairs):,} {score.KINDS[args.measure].unit}{how}")
    if args.json:
        write_json(args.json, scores | ({"vqa_measure": args.vqa_measure} if args.measure == "vqa" else {}))
    return 0


if __name__ == "__main__":
    console.run(main)
