"""What a task must offer. One file per task; `ENTRY` in it is a class that satisfies `Task`."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmpeft_ds.data.batch import PackedBatch


@runtime_checkable
class Task(Protocol):
    """What is asked of the model, built from the options of a source's `task` section.

    Attributes:
        Options: dataclass of the recipe keys beside `name`.
        fields: json fields that every record must have.
        couples_samples: the loss of one sample depends on others of the step (graph, InfoNCE): no accumulation.
        better: `max` or `min`, the direction of `main_metric`.
        main_metric: key of `score` used for best and early stopping.
        example_text: what somebody may ask about a new picture, for model cards and error messages; None where the
            task needs no text.

    A task for generative models also has `generation`, a dict of options for `Backbone.generate`; then `read` returns
    `Prompted` texts and `predict` finds `outputs.generated` (see `data.batch.GenerationOutput`). With `ranking`,
    options for `Backbone.rank`, the same holds for answers picked from a list.

    A task that can answer only when it has seen a whole split has `collect(outputs, batch)`, of each micro-batch, and
    `conclude(model, parts, device)`, collective, which returns the rows (on any ranks) in the place of `predict`'s.
    With `read_all`, that is what evaluation reads of a record. With `identifies_pictures`, records tell which of them
    show the same images (`data.identity.PICTURE`).
    """

    Options: ClassVar[type]
    fields: tuple[str, ...]
    couples_samples: bool
    main_metric: str
    better: str
    example_text: str | None

    def __init__(self, options: Any, labels: list[str] | None): ...

    def read(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Any], list[Any]]:
        """Texts of one sample and a target for each. Raises BadSample."""

    def collate(self, targets: list[Any]) -> dict[str, Tensor]: ...

    def dummy_target(self) -> Any:
        """A target that goes with a weight-0 text."""

    def ask(self, texts: list[str]) -> tuple[dict[str, Any], list[Any]]:
        """For new texts without known answers: a record and a target for each text, as `predict` reads them."""

    def weight(self, batch: PackedBatch) -> float:
        """Total loss weight of this micro-batch, known before the forward."""

    def loss(self, outputs: Any, batch: PackedBatch) -> Tensor:
        """Weighted SUM of the losses, at least float32; the engine divides by the total weight of the step."""

    def predict(self, outputs: Any, batch: PackedBatch) -> list[dict[str, Any]]:
        """One json-able row per text of weight > 0, with `sample_id`, `text`, `prediction` and what `score` needs."""

    def score(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Metrics of all rows of a split, called on rank 0."""

    def baselines(self, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, float]:
        """Scores that need no model (priors), from the records of the splits."""
