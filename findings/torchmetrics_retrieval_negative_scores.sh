#!/usr/bin/env bash
# torchmetrics: retrieval metrics count a right document as wrong where its score is not above zero.
#
# A good guess: a ranking metric reads the order of the scores only, so cosine similarities, logits and log-probabilities
#   of one ranking all give the same recall@k, MRR and MAP.
# What happens: before they sort, RetrievalRecall, RetrievalPrecision, RetrievalMRR and RetrievalMAP turn the label of every
#   document with a score of zero or less into "not relevant". Take a constant from all scores and recall@10 falls from 1.0
#   to 0.0, with no warning; the "HitRate" and "NDCG" of the same package do not change.
# Source: `torch.where(preds > 0, target, 0)` in torchmetrics.functional.retrieval: recall, precision, reciprocal_rank and
#   average_precision. The documentation calls preds "probabilities", and nothing checks that.
# Who is hurt: image-text retrieval judged by cosines, by SigLIP's logits (nearly all of them negative, also for true pairs),
#   by negated distances or by log-likelihoods.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torchmetrics==1.9.0

observe <<'PY'
import torch
from torchmetrics import retrieval

# 50 queries; the right document of each has the highest cosine of its row, and every cosine is positive.
torch.manual_seed(0)
count = 50
cosines = 0.2 + 0.1 * torch.rand(count, count) + 0.3 * torch.eye(count)
right = torch.eye(count, dtype=torch.bool)
query = torch.arange(count).repeat_interleave(count)
scores = {"cosines": cosines, "cosines / 0.01 - 100": cosines / 0.01 - 100, "log-probabilities": cosines.log_softmax(1),
          "probabilities": cosines.softmax(1)}
for name, follows_order in (("RetrievalRecall", False), ("RetrievalPrecision", False), ("RetrievalMRR", False),
                            ("RetrievalMAP", False), ("RetrievalHitRate", True), ("RetrievalNormalizedDCG", True)):
    values = {}
    for kind, score in scores.items():
        assert bool((score.argmax(1) == torch.arange(count)).all())
        metric = getattr(retrieval, name)(top_k=10)
        metric.update(score.flatten(), right.flatten(), indexes=query)
        values[kind] = round(metric.compute().item(), 3)
    print(f"{name}(top_k=10): {values}")
    best = 0.1 if name == "RetrievalPrecision" else 1.0
    assert values["cosines"] == values["probabilities"] == best
    for kind in ("cosines / 0.01 - 100", "log-probabilities"):
        assert values[kind] == (best if follows_order else 0.0)
PY
