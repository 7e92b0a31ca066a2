#!/usr/bin/env bash
# torchmetrics: RetrievalRecall(top_k=1) of perfect image-to-text retrieval with five captions a picture is 0.2.
#
# A good guess: "recall@1" of image-text retrieval, which every paper reports: the share of queries with a right item in first place.
# What happens: it is the share of the right items that are among the first k, so with five captions at most 0.2 at k = 1 and 1.0 only
#   from k = 5 on. Text to image, with one right picture each, agrees with the papers. What they call recall@k is RetrievalHitRate here.
# Source: torchmetrics.functional.retrieval.recall.retrieval_recall (relevant / target.sum()).
# Who is hurt: whoever takes the metric of that name for COCO and Flickr30K: image-to-text numbers a fifth of the published ones.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 torchmetrics==1.9.0

observe <<'PY'
import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

pictures, captions = 20, 5
owner = torch.arange(pictures).repeat_interleave(captions)
right = owner[None] == torch.arange(pictures)[:, None]  # (pictures, texts)
scores = 0.1 + 0.8 * right + 0.01 * torch.rand(right.shape, generator=torch.Generator().manual_seed(0))
seen = {}
for name, score, target in (("image to text", scores, right), ("text to image", scores.T, right.T)):
    query = torch.arange(len(score))[:, None].expand(score.shape)
    for metric in (RetrievalRecall, RetrievalHitRate):
        for k in (1, 5):
            value = metric(top_k=k)(score.flatten(), target.flatten(), indexes=query.flatten()).item()
            seen[name, metric.__name__, k] = round(value, 3)
for key, value in seen.items():
    print(*key, value)
assert seen.pop(("image to text", "RetrievalRecall", 1)) == 0.2
assert set(seen.values()) == {1.0}
PY
