"""The contract of a task: `TaskBase`, from the records of a data set to loss, predictions and scores.

A task is a file `tasks/NAME.py`, or a folder `tasks/NAME/` with `options.py` and `task.py`. Its `ENTRY` is a subclass
of `TaskBase` that gives `Options`, `main_metric`, `read`, `loss`, `predict` and `score`; all else has a default.
"""

# T texts of a micro-batch

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmpeft_ds.data.batch import PackedBatch, Prompted
from mmpeft_ds.fitting import chosen
from mmpeft_ds.tasks.common.options import TaskOptions


class TaskBase(abc.ABC):
    """A task that the model is trained on, made from the options of a source's `task` section.

    Args:
        options: an `Options`.
        labels: the closed list of answers or classes of the training data, None without one.

    Raises:
        BadInput: from the constructor of a subclass, if the options or labels cannot work.

    Attributes:
        Options: dataclass of the recipe keys but `name`, a `TaskOptions`, which also says what the task needs of
            records and of the backbone; its module imports neither torch nor transformers.
        main_metric: key of `score` by which the best checkpoint is chosen and early stopping decides.
        better: whether more of `main_metric` is better (`max`) or less (`min`).
        example_text: what somebody may ask about a new picture, for model cards and error messages; None where the
            task needs no text.
        couples_samples: the loss of a sample depends on the others of its step (contrast, a graph), so gradients must
            not be accumulated over micro-batches.
        generation: options of `BackboneBase.generate`, for a task whose answers are generated; None otherwise. Texts
            are then `Prompted`, and in evaluation `outputs.generated` holds the generated texts.
        ranking: the same for answers that `BackboneBase.rank` picks from a list.
        concludes: the answers depend on the whole split: evaluation calls `collect` for each micro-batch and
            `conclude` at the end; it then scores the rows of `conclude` instead of those of `predict`.
        unit: what is scored one by one, in the plural.
        items: field of the records that holds them as a list; empty where each sample is one.
        prompt_kind, target_kind: what its texts and their targets are, in the singular, for the counts of cut texts.
        no_weight: why nothing of some data may enter the loss, for the message that ends such a run.
        collates_by_row: `collate` gives each target one row, the same whatever others come with it, so that rows may
            be kept from one epoch to the next.
        identifies_pictures: records tell which of them show the same images (`data.identity.PICTURE`), so the data
            tells the task by the images themselves where the records do not.
    """

    Options: ClassVar[type[TaskOptions]]
    main_metric: ClassVar[str]
    better: Literal["max", "min"] = "max"
    example_text: str | None = None
    couples_samples: bool = False
    generation: dict[str, Any] | None = None
    ranking: dict[str, Any] | None = None
    concludes: bool = False
    collates_by_row: bool = False
    identifies_pictures: bool = False
    unit: str = "samples"
    items: str = ""
    prompt_kind: str = "text"
    target_kind: str = "target"
    no_weight: str = "no sample could be used"

    def __init__(self, options: Any, labels: list[str] | None):
        self.options, self.labels = options, labels

    @property
    def fields(self) -> tuple[str, ...]:
        """Json fields that every record must have, as the options say."""
        return chosen(self.options.fields, self.options)

    # required

    @abc.abstractmethod
    def read(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Any], list[Any]]:
        """Texts of one sample in training, and a target for each.

        Args:
            record: the sample's json.
            generator: seeded per sample and epoch.

        Returns:
            texts (strings, `Prompted` or `Described`), and as many targets for `collate`.

        Raises:
            BadSample: if the record cannot be used.
        """

    @abc.abstractmethod
    def loss(self, outputs: Any, batch: PackedBatch) -> Tensor:
        """Weighted SUM of the losses, at least float32; the engine divides by the total weight of the step.

        A text of weight 0 must not reach the sum, even if its own loss is not finite (`common.losses.weighted_sum`).

        Args:
            outputs: what `BackboneBase.read` returned.
        """

    @abc.abstractmethod
    def predict(self, outputs: Any, batch: PackedBatch) -> list[dict[str, Any]]:
        """One json-able row per text of weight > 0, with `sample_id`, `text`, `prediction` and what `score` needs."""

    @abc.abstractmethod
    def score(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Metrics of all rows of a split, empty where there are no rows; called on rank 0."""

    # with defaults

    def grouped(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Scores of parts of the rows that are too many for a table; the report of an evaluation keeps them.

        Default: none.
        """
        return {}

    def read_all(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Any], list[Any]]:
        """Texts and targets of one sample in evaluation: all of it, whatever options limit or draw in training.

        Default: as in training, for tasks that read the same every time.
        """
        return self.read(record, generator)

    def every_text(self, record: dict[str, Any]) -> list[Any]:
        """All texts of one sample that training may read, for counts of texts beforehand. Raises BadSample.

        Default: those of evaluation.
        """
        return self.read_all(record, torch.Generator())[0]

    def scored(self, rows: list[dict[str, Any]]) -> int:
        """Number of `unit` that the scores of `rows` count; called on rank 0. Default: one per row."""
        return len(rows)

    def collate(self, targets: list[Any]) -> dict[str, Tensor]:
        """Tensors of the targets of a batch, first dimension T. Default: none."""
        return {}

    def dummy_text(self, text: Any) -> Any:
        """The text of weight 0 that a rank without any reads, from `BackboneBase.dummy`. Default: that one."""
        return text

    def dummy_target(self) -> Any:
        """A target that goes with a text of weight 0. Default: an empty dictionary."""
        return {}

    def ask(self, texts: list[str]) -> tuple[dict[str, Any], list[Any]]:
        """A record and a target for each of new texts whose answers nobody knows; what prediction reads.

        Default: an empty record, and dummy targets.
        """
        return {}, [self.dummy_target() for _ in texts]

    def prompted(self, text: str) -> Any:
        """A new text as the model reads it. Default: itself, as the prompt where answers are generated or ranked."""
        return text if self.generation is None and self.ranking is None else Prompted(text)

    def weight(self, batch: PackedBatch) -> float:
        """Total loss weight of this micro-batch, known before the forward. Default: that of its texts."""
        return float(batch.text_weight.double().sum()) if len(batch.text_owner) else 0.0

    def use_source(self, labels: list[str] | None, classes: list[str] | None = None) -> None:  # noqa: B027
        """Read what the task needs from the data set of the records. Default: nothing.

        Args:
            labels: of this data set, in the order of its class index; None: those of the training data.
            classes: the only ones that occur, where a subset leaves some out.

        Raises:
            BadInput: if the task cannot be put to this data set.
        """

    def collect(self, outputs: Any, batch: PackedBatch) -> Any:
        """The data of one micro-batch that `conclude` needs, on the CPU. Only with `concludes`."""
        raise NotImplementedError(f"{type(self).__name__} has no `collect`; a task that `concludes` needs one.")

    def conclude(self, model: Any, parts: list[Any], device: torch.device | str) -> list[dict[str, Any]]:
        """The rows of the whole split, on any ranks. Collective. Only with `concludes`.

        Args:
            model: the PeftModel.
            parts: what `collect` returned on this rank.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `conclude`; a task that `concludes` needs one.")

    def baselines(self, train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> dict[str, float]:
        """Scores that need no model (priors), from the records of the splits. Default: none."""
        return {}
