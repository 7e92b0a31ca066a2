#!/usr/bin/env bash
# torchmetrics: whether scores are logits is guessed anew for each batch, so that AUROC depends on how samples were batched.
#
# A good guess: logits and probabilities give the same ranking, and a metric gathered over batches equals that of all samples at once.
# What happens: each update() puts its scores through a sigmoid if one of them lies outside 0 to 1, and takes them as probabilities
#   otherwise. A batch whose logits happen to lie between 0 and 1 is kept as it is, beside batches that were squashed: a logit of 0.9
#   then stands above one of 2. In accuracy and F1 the threshold moves: logits of 0.2 and 0.4 count as "no" in one batch and as
#   "yes" in the next. No argument says what was given.
# Source: torchmetrics.utilities.compute.normalize_logits_if_needed, called from the _format functions of
#   torchmetrics.functional.classification for each batch.
# Who is hurt: yes/no and image-text matching scores in small batches, and the last short batch of every evaluation.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torchmetrics==1.9.0

observe <<'PY'
import torch
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryAveragePrecision, BinaryF1Score

logits = torch.tensor([0.9, 0.4, 0.8, 0.6, -1.0, 2.0, 1.5, -3.0])
labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 0])

def measured(kind, scores, sizes):
    metric = kind()
    for score, label in zip(scores.split(sizes), labels.split(sizes)):
        metric.update(score, label)
    return round(metric.compute().item(), 3)

print("logits", logits.tolist(), "labels", labels.tolist())
seen = {}
for kind in (BinaryAUROC, BinaryAveragePrecision, BinaryAccuracy, BinaryF1Score):
    name = kind.__name__
    seen[name] = {"in one batch": measured(kind, logits, [8]), "in batches of 4": measured(kind, logits, [4, 4]),
                  "probabilities in batches of 4": measured(kind, logits.sigmoid(), [4, 4])}
    print(f"{name}: {seen[name]}")
    assert seen[name]["in one batch"] == seen[name]["probabilities in batches of 4"] != seen[name]["in batches of 4"]
assert seen["BinaryAUROC"]["in one batch"] == 1.0 and seen["BinaryAUROC"]["in batches of 4"] < 0.95
PY
