"""Base of the options of tasks: what a task needs of records and of the backbone, known before torch is imported."""

from __future__ import annotations

from typing import ClassVar

from mmpeft_ds.fitting import ByOption


class TaskOptions:
    """Base of a task's options, which are what the `task` section of a data source may set.

    A subclass is a dataclass of plain values; its module imports neither torch nor transformers.

    Attributes:
        fields: json fields that every record must have. This and the next two are by option, see `fitting`.
        reads: what the task reads of the model's output, in the words of `BackboneOptions.gives`. Empty: not declared,
            so that no backbone is refused.
        reads_in_training: the same for what only its loss reads.
    """

    fields: ClassVar[ByOption] = {}
    reads: ClassVar[ByOption] = {}
    reads_in_training: ClassVar[ByOption] = {}
