#!/usr/bin/env bash
# pycocotools: the annotation whose id is 0 can never be found; its right detection counts as a false one.
#
# A good guess: ids only tell annotations apart, and a file numbered from 0 is judged like the same file numbered from 1.
# What happens: the match tables start as zeros and a match is written as the id of its partner, so that a match with
#   annotation 0 reads as "no match". That object stays missing in the recall and its detection is counted against the
#   precision. One object of many costs little and is never noticed; one picture or one rare class alone gets average precision 0.
# Source: pycocotools.cocoeval.COCOeval.evaluateImg (gtm, dtm) and accumulate, which counts dtMatches by their truth value.
# Who is hurt: boxes of grounding and referring data, written into COCO's format with enumerate().
. "$(dirname "$0")/_lib.sh"
pins pycocotools==2.0.11 numpy==2.4.6

observe <<'PY'
import contextlib, io
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

def precision(first_id, pictures):
    boxes = [(image, [10 * image, 20, 50, 40]) for image in range(1, pictures + 1)]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image} for image, _ in boxes], "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": first_id + i, "image_id": image, "category_id": 1, "bbox": box, "area": 2000, "iscrowd": 0}
                        for i, (image, box) in enumerate(boxes)]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes([{"image_id": image, "category_id": 1, "bbox": box, "score": 1 - image / 100} for image, box in boxes])
        judge = COCOeval(truth, found, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return round(float(judge.stats[0]), 3), round(float(judge.stats[8]), 3)

for pictures in (1, 2, 10):
    seen = {first_id: precision(first_id, pictures) for first_id in (0, 1)}
    print(f"{pictures} picture(s), every box found exactly: (average precision, recall) with ids from 0 {seen[0]}, from 1 {seen[1]}")
    assert seen[1] == (1.0, 1.0) and seen[0][0] < 0.95 and seen[0][1] == round(1 - 1 / pictures, 3)
PY
