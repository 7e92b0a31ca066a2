"""Task: find the picture that a text describes, and the texts that describe a picture; recall at 1, 5 and 10.

Trains by contrast of all pairs of the step, and by matching where the model has a head for it (BLIP). Evaluation ranks
everything by the cosine of the features, and the first of each list again by the matching head. A picture that several
samples show is one picture: one candidate, one query, no negative of itself. A caption belongs to the picture of its
own sample alone, also where other pictures have a caption of the same words.
"""

# T texts (pairs with the images of their slots), S slots, E feature width; G pictures and N texts of the whole split

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmpeft_ds.data.batch import PackedBatch, id_number
from mmpeft_ds.data.identity import PICTURE
from mmpeft_ds.distributed.gather import gather_rows
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.metrics.retrieval import chance, retrieval_scores
from mmpeft_ds.ops import contrastive
from mmpeft_ds.tasks.base import TaskBase
from mmpeft_ds.tasks.common.losses import weighted_sum
from mmpeft_ds.tasks.common.rows import nan_unless_finite
from mmpeft_ds.tasks.retrieval.options import Options
from mmpeft_ds.tasks.retrieval.ranking import rank_split


class Retrieval(TaskBase):
    """Records hold `captions`, a list of texts about the sample's images.

    Source: ALBEF, arXiv 2107.07651; BLIP, arXiv 2201.12086; Aurora, arXiv 2305.08381.
    """

    Options = Options
    couples_samples = True
    collates_by_row = True
    main_metric = "r_mean"
    concludes = True
    example_text = "a dog on a beach"
    identifies_pictures = True
    unit, items = "captions", "captions"
    prompt_kind = "caption"
    no_weight = "no caption belongs to an image"

    def __init__(self, options: Options, labels: list[str] | None):
        super().__init__(options, labels)
        if options.loss not in ("contrast", "contrast_match"):
            raise BadInput(f"task.loss: {options.loss!r}. Use contrast or contrast_match.")
        for key in ("captions", "rerank"):
            if getattr(options, key) < 0:
                raise BadInput(f"task.{key}: {getattr(options, key)}. Use 0 or more.")

    def read(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[str], list[Any]]:
        """Some captions of a record, drawn, each with the id of the picture."""
        texts, targets = self.read_all(record, generator)
        if 0 < self.options.captions < len(texts):
            drawn = torch.randperm(len(texts), generator=generator)[: self.options.captions].tolist()
            texts, targets = [texts[i] for i in drawn], [targets[i] for i in drawn]
        return texts, targets

    def read_all(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[str], list[Any]]:
        """All captions of a record, for evaluation."""
        captions = record.get("captions")
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise BadSample("field", "`captions` is no list of texts")
        # Records of a stream name the picture that they show; new ones are distinguished by their captions.
        key = self._picture(record) or "\n".join(captions)
        return list(captions), [_id(key)] * len(captions)

    def _picture(self, record: dict[str, Any]) -> str | None:
        """Name of the picture of a record, equal for records of the same one; None without one. Raises BadSample."""
        name = self.options.id_field
        if name:
            holder = record if name in record else record.get("extra", {})
            if name not in holder:
                raise BadSample("field", f"no `{name}`, which task.id_field names")
            return f"{name}:{holder[name]}"
        return next((f"{key}:{record[key]}" for key in (PICTURE, "source_name") if key in record), None)

    def collate(self, targets: list[Any]) -> dict[str, Tensor]:
        """`pair_id` (T,), equal for texts about the same picture."""
        return {"pair_id": torch.tensor(targets, dtype=torch.int64)}

    def dummy_target(self) -> Any:
        return 0

    def ask(self, texts: list[str]) -> tuple[dict[str, Any], list[Any]]:
        """A record with these texts."""
        return {"captions": list(texts)}, [_id("\n".join(texts))] * len(texts)

    def weight(self, batch: PackedBatch) -> float:
        """Pairs that enter the loss: texts of good samples that have an image."""
        return float(_pair_weights(batch).double().sum())

    def loss(self, outputs: Any, batch: PackedBatch) -> Tensor:
        """Sum over pairs of their losses; in evaluation the contrast within this step. Collective."""
        each = getattr(outputs, "contrast_losses", None)
        if each is None:
            each = _in_batch(outputs, batch)
        if self.options.loss == "contrast_match" and torch.is_grad_enabled():
            if getattr(outputs, "matching_losses", None) is None:
                raise BadInput(
                    "task.loss: contrast_match, but the backbone matches nothing. Use loss: contrast, or blip in its "
                    "retrieval form with negatives."
                )
            each = each + outputs.matching_losses
        return weighted_sum(each, _pair_weights(batch))

    def predict(self, outputs: Any, batch: PackedBatch) -> list[dict[str, Any]]:
        """One row per pair of weight > 0; `prediction` is the cosine of text and picture."""
        image = image_features(outputs, batch)[batch.text_owner]
        cosine = (image * outputs.text_features).sum(1).tolist()
        columns = zip(cosine, batch.text_owner.tolist(), _pair_weights(batch).tolist(), batch.raw_texts, strict=True)
        return [
            {"sample_id": batch.sample_id[slot], "text": text, "prediction": value}
            for value, slot, weight, text in columns
            if weight > 0
        ]

    # evaluation of a whole split: nothing can be ranked before everything has been encoded

    def collect(self, outputs: Any, batch: PackedBatch) -> dict[str, Any]:
        """The data of one micro-batch that `conclude` needs, on the CPU."""
        texts = _pair_weights(batch) > 0
        owners, kept = batch.text_owner.tolist(), texts.tolist()
        slots = batch.text_owner[texts].unique()
        pictures = torch.zeros(len(batch.sample_id), dtype=torch.int64)
        for slot in slots.tolist():
            sample = f"sample:{batch.sample_id[slot]}"
            pictures[slot] = _id(self._picture(batch.records[slot]) or sample)
        pictures = pictures.to(texts.device)
        before = Counter()
        rows = []
        for slot in owners:
            rows.append(_id(f"{batch.sample_id[slot]} {before[slot]}"))
            before[slot] += 1
        part: dict[str, Any] = {
            "image": image_features(outputs, batch)[slots],
            "image_id": pictures[slots],
            "text": outputs.text_features[texts],
            "text_id": pictures[batch.text_owner[texts]],
            "text_row": torch.tensor(rows, dtype=torch.int64, device=texts.device)[texts],
        }
        if self.options.rerank and getattr(outputs, "image_tokens", None) is not None:
            part |= {"tokens": outputs.image_tokens[slots], "mask": outputs.image_mask[slots]}
            part |= {key: batch.texts[key][texts] for key in ("input_ids", "attention_mask")}
        part = {key: value.cpu() for key, value in part.items()}
        part["image_names"] = [batch.sample_id[i] for i in slots.tolist()]
        part["text_names"] = [
            (batch.sample_id[slot], text)
            for slot, text, keep in zip(owners, batch.raw_texts, kept, strict=True)
            if keep
        ]
        return part

    def conclude(self, model: Any, parts: list[dict[str, Any]], device: torch.device | str) -> list[dict[str, Any]]:
        """Rank all against all: one row per text and one per picture, on rank 0, as `ranking.rank_split` gives them.
        Collective."""
        return rank_split(model, parts, self.options.rerank, self.options.similarity_weight, device)

    def scored(self, rows: list[dict[str, Any]]) -> int:
        """Captions that looked for their picture."""
        return sum(row.get("kind") == "text_to_image" for row in rows)

    def score(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """`txt_*`: pictures that look for their texts; `img_*`: texts that look for their picture; `r_mean`."""
        ranks = {k: [r["rank"] for r in rows if r.get("kind") == k] for k in ("image_to_text", "text_to_image")}
        return nan_unless_finite(rows, retrieval_scores(*ranks.values())) if all(ranks.values()) else {}

    def baselines(self, train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> dict[str, float]:
        """`chance_*`: every ranking drawn at random."""
        captions: Counter[Any] = Counter()
        for number, record in enumerate(test):
            if record.get("captions"):
                captions[self._picture(record) or number] += len(record["captions"])
        return {f"chance_{name}": value for name, value in chance([*captions.values()]).items()} if captions else {}


ENTRY = Retrieval


def _id(key: str) -> int:
    return id_number(key)


def _pair_weights(batch: PackedBatch) -> Tensor:
    """(T,) weight of each text, 0 where its slot has no image."""
    owner = batch.image_owner  # counted without `torch.bincount`, which waits for a GPU
    pictures = owner.new_zeros(len(batch.sample_id)).index_add_(0, owner, torch.ones_like(owner))
    return batch.text_weight * (pictures[batch.text_owner] > 0)


def image_features(outputs: Any, batch: PackedBatch) -> Tensor:
    """(S, E) unit vectors: the model's, if it has one per slot, else the mean over the images of a slot."""
    features, slots = outputs.image_features, len(batch.sample_id)
    if getattr(outputs, "image_tokens", None) is not None:
        return features
    if features is None:
        return outputs.text_features.new_zeros(slots, outputs.text_features.shape[1])
    sums = features.new_zeros(slots, features.shape[1]).index_add(0, batch.image_owner, features)
    return normalize(sums, dim=1)


def _in_batch(outputs: Any, batch: PackedBatch) -> Tensor:
    """(T,) contrast of each pair with the pairs of all ranks. Collective."""
    image, text = image_features(outputs, batch)[batch.text_owner], outputs.text_features
    keep, ids = _pair_weights(batch) > 0, batch.targets["pair_id"]
    scale = outputs.get("logit_scale")
    temperature = 1 / scale if scale is not None else 0.07
    images, texts, all_ids, kept = (gather_rows(x) for x in (image, text, ids, keep.to(torch.uint8)))
    targets = contrastive.soft_targets(ids, all_ids, keep_K=kept.bool(), dtype=text.dtype)
    ways = ((image, texts), (text, images))
    losses = [
        contrastive.soft_cross_entropy(contrastive.similarities(query, keys, temperature, kept.bool()), targets)
        for query, keys in ways
    ]
    return (losses[0] + losses[1]) / 2
