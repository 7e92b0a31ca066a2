"""Recall of retrieval: how often what belongs to a query is among the first k, and its median rank."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median

import torch
from torch import Tensor

DEPTHS = (1, 5, 10)


def ranks(scores_QC: Tensor, relevant_QC: Tensor) -> Tensor:
    """(Q,) rank, from 1, of the best candidate that belongs to each query.

    A wrong candidate with the same score goes first, so that a constant score is no success; a score that is no finite
    number counts as the lowest, so that it is none either.

    Args:
        scores_QC: higher is better.
        relevant_QC: bool; every query needs at least one.
    """
    scores_QC = lowest_if_not_finite(scores_QC)
    best = scores_QC.masked_fill(~relevant_QC, -torch.inf).amax(1, keepdim=True)
    return ((scores_QC >= best) & ~relevant_QC).sum(1) + 1


def lowest_if_not_finite(scores: Tensor) -> Tensor:
    """Scores with minus infinity in place of NaN and infinities, which compare as if they were the best."""
    return scores.masked_fill(~scores.isfinite(), -torch.inf)


def recall(ranks: Sequence[int], prefix: str = "", depths: Sequence[int] = DEPTHS) -> dict[str, float]:
    """`r1`, `r5`, `r10` in percent, their mean `r_mean`, and the median rank `mdR`, each with `prefix` in front.

    Args:
        ranks: of `ranks`.
    """
    values = {f"{prefix}r{k}": 100.0 * sum(r <= k for r in ranks) / len(ranks) for k in depths}
    mean = sum(values.values()) / len(depths)
    return {**values, f"{prefix}r_mean": mean, f"{prefix}mdR": float(median(ranks))}


def retrieval_scores(image_to_text: Sequence[int], text_to_image: Sequence[int]) -> dict[str, float]:
    """`txt_*` of images that look for their texts, `img_*` of texts that look for their image, and `r_mean` of both.

    Source: the usual protocol of Flickr30K and COCO, where an image counts by the best of its
    captions.
    """
    texts, images = recall(image_to_text, "txt_"), recall(text_to_image, "img_")
    return {**texts, **images, "r_mean": (texts["txt_r_mean"] + images["img_r_mean"]) / 2}


def chance(captions: Sequence[int]) -> dict[str, float]:
    """The same scores, without the median ranks, where every ranking is drawn at random: their expected values.

    Args:
        captions: number of captions of each picture, at least one.
    """
    pictures, texts = len(captions), sum(captions)
    txt, img = {}, {}
    for k in DEPTHS:
        missed = [comb(texts - own, k) / comb(texts, k) if k <= texts - own else 0.0 for own in captions]
        txt[f"txt_r{k}"] = 100.0 * (1 - sum(missed) / pictures)
        img[f"img_r{k}"] = 100.0 * min(k / pictures, 1.0)
    txt["txt_r_mean"], img["img_r_mean"] = sum(txt.values()) / len(DEPTHS), sum(img.values()) / len(DEPTHS)
    return {**txt, **img, "r_mean": (txt["txt_r_mean"] + img["img_r_mean"]) / 2}
