"""Ranking of a whole split for retrieval: every text against every picture, the best of each list matched again."""

# G pictures and N texts of the whole split, E feature width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.gather import gather_rows, gather_sizes
from mmpeft_ds.tasks.common.rows import NOT_FINITE

MATCHED_AT_ONCE = 64  # pairs in one pass of the matching head
ROUNDING = 1e-5  # by which features of equal words may differ, with what stood beside them in their batches


@torch.no_grad()
def rank_split(
    model: Any, parts: list[dict[str, Any]], rerank: int, similarity_weight: float, device: torch.device | str
) -> list[dict[str, Any]]:
    """One row per text and one per picture, on rank 0. Collective.

    Each rank matches the pairs whose picture it holds; no image tokens travel. Of several samples that show one
    picture the first by name stands for it. Pictures and texts are ranked in the order of their samples' names, and
    texts of the same words have the feature of the first, so that ties are the same for every number of ranks.

    Args:
        model: with `match`, where `parts` hold image tokens.
        parts: what `Retrieval.collect` returned on this rank.
        rerank: how many of each list the matching head ranks again, 0 = none.
        similarity_weight: share of the cosine in the score of those.

    Returns:
        rows with `kind` (`text_to_image`, `image_to_text`), `rank` from 1, `prediction`, `sample_id`, `text`.
    """
    if not parts:  # on all ranks: evaluation runs in step
        return []
    parts_of = ("image", "image_id", "text", "text_id", "text_row")
    mine = {key: torch.cat([p[key] for p in parts]).to(device) for key in parts_of}
    names = {
        key: collectives.gather_everywhere([name for p in parts for name in p[key]])
        for key in ("image_names", "text_names")
    }
    image, image_id, text, text_id, text_row = (gather_rows(x) for x in mine.values())
    if not len(text):
        return []
    shown = _one_each(image_id.tolist(), names["image_names"]).to(device)
    image, image_id = image[shown], image_id[shown]
    # Texts of a sample are beside each other on whichever rank they are, in their order.
    by_sample = sorted(range(len(text)), key=lambda i: names["text_names"][i][0])
    names["text_names"] = [names["text_names"][i] for i in by_sample]
    ordered = torch.tensor(by_sample, device=device)
    text, text_id, text_row = _alike(text[ordered], names["text_names"]), text_id[ordered], text_row[ordered]
    cosine = text @ image.T
    matched = rerank > 0 and "tokens" in parts[0]
    lists = {}
    for kind, scores in (("text_to_image", cosine), ("image_to_text", cosine.T)):
        most = scores.shape[1]
        top = scores.topk(min(rerank, most) if matched else most, 1)
        lists[kind] = (top.indices, top.values)
    if matched:
        lists = _match(model, parts, lists, (shown, ordered), similarity_weight, device)
    if collectives.rank() != 0:
        return []
    rows, pictures = [], [names["image_names"][i] for i in shown.tolist()]
    for kind, (order, scores) in lists.items():
        of_text = kind == "text_to_image"
        asks, answers, ties = (text_id, image_id, image_id) if of_text else (image_id, text_id, text_row)
        places = _places(scores, order, asks, answers, ties).tolist()
        last = torch.iinfo(ties.dtype).max
        first_of = ties[order].masked_fill(scores < scores.amax(1, keepdim=True), last).argmin(1, keepdim=True)
        best = order.gather(1, first_of)[:, 0].tolist()
        finite = scores.isfinite().all(1).tolist()
        for i, (place, first) in enumerate(zip(places, best, strict=True)):
            if of_text:
                (name, query), answer = names["text_names"][i], pictures[first]
            else:
                name, query, answer = pictures[i], "", names["text_names"][first][1]
            row = {"sample_id": name, "kind": kind, "text": query, "prediction": answer, "rank": place}
            rows.append(row if finite[i] else row | NOT_FINITE)
    return rows


def _match(
    model: Any,
    parts: list[dict[str, Any]],
    lists: dict[str, tuple[Tensor, Tensor]],
    places: tuple[Tensor, Tensor],
    similarity_weight: float,
    device: Any,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The same lists with the scores of the matching head. Collective.

    Args:
        places: of each picture and of each text in `lists`, its place among those of all ranks.
    """
    shown, ordered = places
    tokens = [row for p in parts for row in zip(p["tokens"], p["mask"], strict=True)]
    texts = [row for p in parts for row in zip(p["input_ids"], p["attention_mask"], strict=True)]
    longest = max((len(ids) for ids, _ in texts), default=1)
    sizes = gather_sizes([len(tokens), longest], device)
    longest = max(size[1] for size in sizes)
    ids = torch.zeros(len(texts), 2, longest, dtype=torch.int64)
    for row, pair in zip(ids, texts, strict=True):
        row[:, : len(pair[0])] = torch.stack(pair)
    ids = gather_rows(ids.to(device))[ordered]
    images = sum(size[0] for size in sizes)
    first = sum(size[0] for size in sizes[: collectives.rank()])

    (to_image, cos_t), (to_text, cos_i) = lists["text_to_image"], lists["image_to_text"]
    asked_t = torch.arange(len(to_image), device=device)[:, None] * images + shown[to_image]
    asked_i = to_text * images + shown[:, None]
    keys = torch.cat([asked_t.flatten(), asked_i.flatten()]).unique()
    own = keys[(keys % images >= first) & (keys % images < first + len(tokens))]
    steps = -(-len(own) // MATCHED_AT_ONCE)
    logits = []
    # Under ZeRO-3 each pass gathers weights, so all ranks make as many.
    for step in range(max(n for (n,) in gather_sizes([steps], device))):
        chosen = own[step * MATCHED_AT_ONCE : (step + 1) * MATCHED_AT_ONCE]
        pairs = [tokens[i - first] for i in (chosen % images).tolist()]
        if not pairs:
            blank = torch.zeros(1, parts[0]["tokens"].shape[2], dtype=parts[0]["tokens"].dtype)
            pairs = [(blank, torch.ones(1, dtype=torch.bool))]
        seen, mask = (torch.nn.utils.rnn.pad_sequence(list(x), True).to(device) for x in zip(*pairs, strict=True))
        read = ids[chosen // images] if len(chosen) else ids[:1]
        logits.append(model.match(read[:, 0], read[:, 1], seen, mask)[: len(chosen)].double())
    matches = gather_rows(torch.cat(logits))
    keys, order = gather_rows(own).sort()
    matches = matches[order]

    def scores(asked: Tensor, cosine: Tensor) -> Tensor:
        return matches[torch.searchsorted(keys, asked)] + similarity_weight * cosine

    return {
        "text_to_image": (to_image, scores(asked_t, cos_t)),
        "image_to_text": (to_text, scores(asked_i, cos_i)),
    }


def _one_each(ids: list[int], names: list[str]) -> Tensor:
    """Place of the sample that stands for each picture, the first by name, and in the order of their names: the same
    ones however samples are spread over ranks."""
    chosen: dict[int, int] = {}
    for place, (picture, name) in enumerate(zip(ids, names, strict=True)):
        if picture not in chosen or name < names[chosen[picture]]:
            chosen[picture] = place
    return torch.tensor(sorted(chosen.values(), key=lambda place: names[place]), dtype=torch.int64)


def _alike(text: Tensor, names: list[tuple[str, str]]) -> Tensor:
    """Features of texts, where texts of the same words have that of the first of them, if only rounding parts them."""
    first: dict[str, int] = {}
    of_words = [first.setdefault(words, place) for place, (_, words) in enumerate(names)]
    of_first = text[torch.tensor(of_words, device=text.device)]
    return torch.where(((text - of_first).abs() <= ROUNDING).all(1, keepdim=True), of_first, text)


def _places(scores_Qk: Tensor, order_Qk: Tensor, asks_Q: Tensor, answers_C: Tensor, ties_C: Tensor) -> Tensor:
    """(Q,) rank, from 1, of the best candidate with the id of each query; after all wrong ones if not listed.

    Candidates of equal score (captions of the same words) stand in the order of `ties_C`, numbers that are as good as
    random, so that a right one among n equal ones ranks as chance has it. Where a score of a query is no finite number
    the right one ranks last.
    """
    right = asks_Q[:, None] == answers_C[order_Qk]
    best = scores_Qk.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    ties = ties_C[order_Qk]
    own = ties.masked_fill(~right | (scores_Qk < best), torch.iinfo(ties.dtype).max).amin(1, keepdim=True)
    before = (scores_Qk > best) | ((scores_Qk == best) & (ties < own))
    listed = (before & ~right).sum(1) + 1
    behind = torch.stack([(answers_C != ask).sum() for ask in asks_Q]) + 1
    return torch.where(right.any(1) & scores_Qk.isfinite().all(1), listed, behind)
