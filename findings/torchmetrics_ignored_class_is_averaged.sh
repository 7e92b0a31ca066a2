#!/usr/bin/env bash
# torchmetrics: macro accuracy, precision, recall and F1 with ignore_index=0 count class 0 as a class that is always wrong.
#
# A good guess: ignore_index=0, background or "other", leaves class 0 out: its samples, and its place in the mean over classes. The Jaccard
#   index of the same package does so.
# What happens: its samples are left out, its place is not. A single prediction of class 0 for a sample of another class makes the class one
#   to be averaged, with a value of 0, since no sample of it is left. Mean class accuracy of four classes falls from 0.85 to
#   0.64; without such a prediction the mean is that of three classes, so a better model can jump.
# Source: torchmetrics.utilities.compute._adjust_weights_safe_divide (weight 0 only where tp + fp + fn == 0), against
#   functional.classification.jaccard._jaccard_index_reduce (weights[ignore_index] = 0).
# Who is hurt: segmentation and tagging without background, published mean class accuracy and macro F1.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torchmetrics==1.9.0

observe <<'PY'
import torch
import torchmetrics.classification as metrics

generator = torch.Generator().manual_seed(0)
target = torch.randint(0, 4, (400,), generator=generator)
guess = torch.where(torch.rand(400, generator=generator) < 0.8, target, torch.randint(0, 4, (400,), generator=generator))
never_class_0 = torch.where((guess == 0) & (target != 0), target, guess)
for name in ("MulticlassAccuracy", "MulticlassRecall", "MulticlassPrecision", "MulticlassF1Score", "MulticlassJaccardIndex"):
    def of(average, predictions):
        return getattr(metrics, name)(num_classes=4, ignore_index=0, average=average)(predictions, target)

    by_class, macro = of("none", guess), of("macro", guess).item()
    three, four = by_class[1:].mean().item(), by_class.sum().item() / 4
    print(f"{name}(ignore_index=0): by class {[round(v, 3) for v in by_class.tolist()]}, macro {macro:.3f}, mean of classes 1 to 3 {three:.3f}")
    assert abs(macro - (three if name == "MulticlassJaccardIndex" else four)) < 1e-5 and three - four > 0.1
    without = of("none", never_class_0)
    assert abs(of("macro", never_class_0).item() - without[1:].mean().item()) < 1e-5  # nothing is predicted as class 0
PY
