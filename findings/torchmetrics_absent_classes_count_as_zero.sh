#!/usr/bin/env bash
# torchmetrics: macro AUROC of a perfect classifier is 0.5 where half of the classes have no sample in the data.
#
# A good guess: a class that cannot be judged is left out of the mean, as MulticlassAveragePrecision, MulticlassF1Score and MulticlassAccuracy
#   of the same package leave it out, so that faultless scores give 1.0 everywhere.
# What happens: AUROC takes 0 for it, worse than chance, and the mean takes the 0. The code leaves out NaN alone, which average precision
#   returns for such a class, and AUROC does not. With thresholds=..., average precision counts it as 0 too; of multi-label
#   metrics average precision, F1 and Jaccard do, accuracy does not. AUROC warns that the true positive rate is "meaningless"; the others say nothing.
# Source: torchmetrics.functional.classification.roc._binary_roc_compute (zeros for no positives, or no negatives), auroc._reduce_auroc (leaves
#   out NaN), average_precision._reduce_average_precision.
# Who is hurt: long-tailed label sets, subsets and splits for few-shot or new classes; two models are compared by what their data lack.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torchmetrics==1.9.0

observe <<'PY'
import warnings
import torch
import torchmetrics.classification as metrics

warnings.simplefilter("ignore")
CLASSES = 10
perfect = {}
for present in (10, 5, 2):
    target = torch.arange(200) % present
    scores = torch.nn.functional.one_hot(target, CLASSES).float()
    labels = scores.long()
    seen = {name: getattr(metrics, name)(num_classes=CLASSES, average="macro")(scores, target).item()
            for name in ("MulticlassAUROC", "MulticlassAveragePrecision", "MulticlassAccuracy", "MulticlassF1Score")}
    seen["MulticlassAveragePrecision(thresholds=50)"] = metrics.MulticlassAveragePrecision(CLASSES, thresholds=50)(scores, target).item()
    seen |= {name: getattr(metrics, name)(num_labels=CLASSES, average="macro")(scores, labels).item()
             for name in ("MultilabelAUROC", "MultilabelAveragePrecision", "MultilabelAccuracy", "MultilabelF1Score", "MultilabelJaccardIndex")}
    perfect[present] = {name: round(value, 3) for name, value in seen.items()}
    print(f"perfect scores, {present} of {CLASSES} classes in the data: {perfect[present]}")
assert set(perfect[10].values()) == {1.0}
for present in (5, 2):
    left_out = [name for name, value in perfect[present].items() if value == 1.0]
    counted = [name for name, value in perfect[present].items() if value == present / CLASSES]
    assert left_out == ["MulticlassAveragePrecision", "MulticlassAccuracy", "MulticlassF1Score", "MultilabelAccuracy"]
    assert len(left_out) + len(counted) == len(perfect[present]) == 10
PY
