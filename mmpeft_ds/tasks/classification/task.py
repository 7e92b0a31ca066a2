"""Task: name the class of an image, from the closed list of the training data; captions may help."""

# B rows (one text a sample) of the micro-batch, C classes of the training data, C' of them that may be predicted

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmpeft_ds.data.batch import Described, PackedBatch
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.host_copies import to_device
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.tasks.base import TaskBase
from mmpeft_ds.tasks.classification.options import Options
from mmpeft_ds.tasks.common.losses import weighted_sum
from mmpeft_ds.tasks.common.rows import NOT_FINITE, check_different, nan_unless_finite

NOTHING = Described()  # the text of every sample where captions are left out


class Classification(TaskBase):
    """Records hold `label`, the class index in their own data set, `class_name`, and `captions` (a list) if wanted.

    Classes are matched by name, so another data set may have fewer of them, or number them in another way.
    """

    Options = Options
    main_metric = "accuracy"
    collates_by_row = True
    prompt_kind = "caption"
    no_weight = "no sample has a class that is known"

    def __init__(self, options: Options, labels: list[str] | None):
        if not labels:
            raise BadInput(
                "task classification: the data set has no label list. Prepare it with one: it names the classes."
            )
        super().__init__(options, list(labels))
        check_different(self.labels)
        self._index = {label: i for i, label in enumerate(self.labels)}
        self._own: list[str] = self.labels
        self._columns: list[int] = list(range(len(self.labels)))
        self._allowed = frozenset(self._columns)

    def use_source(self, labels: list[str] | None, classes: list[str] | None = None) -> None:
        """Take the classes of the data set that is read.

        Args:
            labels: of this data set, in the order of its class index; None: those of the training data.
            classes: the only ones that occur, where a subset leaves some out.

        Raises:
            BadInput: a class that the training data do not know.
        """
        self._own = list(labels) if labels else self.labels
        wanted = (classes if classes is not None else self._own) if self.options.columns == "target" else self.labels
        unknown = [name for name in (classes if classes is not None else self._own) if name not in self._index]
        if unknown:
            raise BadInput(
                f"class {unknown[0]!r} is none of the {len(self.labels)} classes of the training data "
                f"({len(unknown)} unknown). Give a subset that leaves it out, or train on it."
            )
        # In the order of the training data, so that ties are resolved as with all columns.
        self._allowed = frozenset(self._index[name] for name in wanted)
        self._columns = sorted(self._allowed)

    def scored(self, rows: list[dict[str, Any]]) -> int:
        """Samples of known class."""
        return sum("answer" in row for row in rows)

    def read(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Described], list[Any]]:
        """One text, a drawn caption or nothing, and the class. Raises BadSample."""
        return self._read(record, generator)

    def read_all(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Described], list[Any]]:
        """Like `read`, with the first caption: for evaluation."""
        return self._read(record, None)

    def _read(
        self, record: dict[str, Any], generator: torch.Generator | None
    ) -> tuple[list[Described], list[dict[str, Any]]]:
        # The text comes first and cannot depend on the label.
        text = self._caption(record, generator) if self.options.text == "captions" else NOTHING
        return [text], [{"label": self._label(record)}]

    @staticmethod
    def _caption(record: dict[str, Any], generator: torch.Generator | None) -> Described:
        captions, stored = record.get("captions"), record.get("text")
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise BadSample("field", "`captions` is no list of texts, or an empty one")
        if isinstance(stored, Tensor) and len(stored) != len(captions):
            raise BadSample("field", f"{len(captions)} captions but features of {len(stored)}")
        # A single one is not drawn: a record that draws nothing is read once and remembered (`data.feature_batches`).
        drawn = generator is not None and len(captions) > 1
        number = int(torch.randint(len(captions), (), generator=generator)) if drawn else 0
        return Described(captions[number], stored[number] if isinstance(stored, Tensor) else None)

    def _label(self, record: dict[str, Any]) -> int:
        """Class index in the training data. Raises BadSample."""
        name = record.get("class_name")
        if name is None:
            label = record.get("label")
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(self._own):
                raise BadSample("label", f"{label!r} is no class index below {len(self._own)}")
            name = self._own[label]
        index = self._index.get(name) if isinstance(name, str) else None
        if index not in self._allowed:
            raise BadSample("label", f"class {name!r} is none of those that may be predicted here")
        return index

    def collate(self, targets: list[Any]) -> dict[str, Tensor]:
        """`label` (B,) int64, -1 = unknown."""
        return {"label": torch.tensor([target["label"] for target in targets], dtype=torch.int64)}

    def dummy_target(self) -> Any:
        return {"label": -1}

    def ask(self, texts: list[str]) -> tuple[dict[str, Any], list[Any]]:
        """Images of unknown class, with the given texts as their captions."""
        return {}, [self.dummy_target() for _ in texts]

    def weight(self, batch: PackedBatch) -> float:
        """Samples of known class that enter the loss."""
        return float(self._weights(batch).sum(dtype=torch.float64)) if batch.text_owner.numel() else 0.0

    def _weights(self, batch: PackedBatch) -> Tensor:
        return batch.text_weight * (batch.targets["label"] >= 0)

    def loss(self, outputs: Any, batch: PackedBatch) -> Tensor:
        """Sum over samples of weight times the cross-entropies of `outputs.terms`, [(weight, (B, C) logits)], or of
        `outputs.logits` where a model has no terms, and times `outputs.penalty` (B,) where it has one."""
        terms = outputs.get("terms") or [(1.0, outputs.logits)]
        if not len(batch.text_owner):
            return sum(at_least_float32(logits).sum() * 0 for _, logits in terms)
        weights = self._weights(batch)
        position = torch.zeros(len(self.labels), dtype=torch.int64)
        position[self._columns] = torch.arange(len(self._columns))
        # -1 must not index the logits; its weight is 0
        target = to_device(position, weights.device)[batch.targets["label"].clamp(min=0)]
        total = 0
        for scale, logits in terms:
            each = cross_entropy(self._restricted(at_least_float32(logits)), target, reduction="none")
            total = total + scale * weighted_sum(each, weights)
        penalty = outputs.get("penalty")
        return total if penalty is None else total + weighted_sum(at_least_float32(penalty), weights)

    def predict(self, outputs: Any, batch: PackedBatch) -> list[dict[str, Any]]:
        """One row per sample of weight > 0: sample_id, text, prediction and its probability; and, where the class is
        known, its name (`answer`) and index (`label`) in the training data."""
        if not len(batch.text_owner):
            return []
        logits = self._restricted(at_least_float32(outputs.logits))
        probability, best = logits.softmax(1).max(1)
        columns = zip(
            best.tolist(),
            probability.tolist(),
            logits.isfinite().all(1).tolist(),
            batch.text_owner.tolist(),
            batch.text_weight.tolist(),
            batch.targets["label"].tolist(),
            batch.raw_texts,
            strict=True,
        )
        rows = []
        for column, share, finite, slot, weight, label, text in columns:
            if weight > 0:
                row = {"sample_id": batch.sample_id[slot], "text": str(text)}
                row |= {"prediction": self.labels[self._columns[column]], "probability": share}
                row |= {} if finite else NOT_FINITE
                rows.append(row | ({"answer": self.labels[label], "label": label} if label >= 0 else {}))
        return rows

    def _restricted(self, logits: Tensor) -> Tensor:
        """(B, C) -> (B, C'): only the classes that may be predicted."""
        if len(self._columns) == len(self.labels):
            return logits
        return logits.index_select(1, to_device(torch.tensor(self._columns), logits.device))

    def score(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """`accuracy`, top-1, and `mean_class_accuracy`, the mean over the classes that occur."""
        scores = _accuracies((row["answer"], row["prediction"]) for row in rows if "answer" in row)
        return nan_unless_finite(rows, scores)

    def baselines(self, train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> dict[str, float]:
        """`majority`: always the class with most training samples, of equals the first in the alphabet."""
        counts = Counter(_name(record) for record in train)
        if not counts:
            return {}
        majority = min(counts, key=lambda name: (-counts[name], name))
        return {"majority": _accuracies((_name(r), majority) for r in test).get("accuracy", 0.0)}


ENTRY = Classification


def _accuracies(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Accuracies of pairs (class, prediction)."""
    right: dict[str, list[bool]] = defaultdict(list)
    for answer, prediction in pairs:
        right[answer].append(answer == prediction)
    if not right:
        return {}
    everything = [r for of_class in right.values() for r in of_class]
    mean = sum(sum(of_class) / len(of_class) for of_class in right.values()) / len(right)
    return {"accuracy": sum(everything) / len(everything), "mean_class_accuracy": mean}


def _name(record: dict[str, Any]) -> str:
    return str(record.get("class_name", record.get("label")))
