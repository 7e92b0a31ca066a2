"""Counts of texts that were cut to fit into the backbone's limits or hold control tokens, and words about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.errors import counted
from mmpeft_ds.tasks.base import TaskBase

CHANGES = 3  # numbers of `PackedBatch.changed_texts`


@dataclass
class TextCounts:
    """Texts as they were read, again in every epoch.

    Attributes:
        cut: kind (question, answer, caption, conversation, ...) -> how many were cut.
        control: how many hold control tokens, which are read as words.
    """

    cut: dict[str, int] = field(default_factory=dict)
    control: int = 0

    def add(self, task: TaskBase, changed: Sequence[float]) -> None:
        """Add `PackedBatch.changed_texts` of a task, summed over batches or ranks."""
        prompts, targets, control = map(int, changed)
        if prompts:
            self.cut[task.prompt_kind] = self.cut.get(task.prompt_kind, 0) + prompts
        if targets:
            self.cut[task.target_kind] = self.cut.get(task.target_kind, 0) + targets
        self.control += control

    def __bool__(self) -> bool:
        return bool(self.cut or self.control)

    def words(self) -> str:
        """`8 conversations cut, 1 text with control tokens`; empty if there is nothing to say."""
        parts = [f"{counted(number, kind)} cut" for kind, number in self.cut.items()]
        return ", ".join([*parts, *([f"{counted(self.control, 'text')} with control tokens"] if self.control else [])])


def limits(backbone: BackboneBase, tasks: Iterable[TaskBase], counts: TextCounts) -> str:
    """The keys and values of the options that the cut texts were longer than, `backbone.max_text_length (64)`."""
    keys = {task.prompt_kind: backbone.prompt_limit for task in tasks}
    keys |= {task.target_kind: backbone.target_limit for task in tasks}
    names = dict.fromkeys(keys[kind] for kind in counts.cut if kind in keys)
    return " and ".join(_limit(backbone, name) for name in names)


def _limit(backbone: BackboneBase, name: str) -> str:
    value = vars(backbone.options).get(name)  # None: an option of the encoder inside
    if value == 0:
        return f"the model has positions (backbone.{name}: 0)"
    return f"backbone.{name}" + (f" ({value})" if value else "")


def note(backbone: BackboneBase, tasks: Sequence[TaskBase], counts: TextCounts) -> str:
    """A note for the user about changed texts: what was changed, where, and how to avoid it."""
    said = []
    if counts.cut:
        cut = ", ".join(counted(number, kind) for kind, number in counts.cut.items())
        said.append(f"{cut} longer than {limits(backbone, tasks, counts)}, cut to fit")
    if counts.control:
        said.append(f"{counted(counts.control, 'text')} with control tokens of the tokenizer, read as words")
    return "; ".join(said)


def nothing_learnt(backbone: BackboneBase, tasks: Sequence[TaskBase], counts: TextCounts) -> str:
    """Reason why nothing enters the loss, and what to do about it."""
    why = " or ".join(dict.fromkeys(task.no_weight for task in tasks))
    if too_short := limits(backbone, tasks, counts):
        return f"{why}; {counts.words()}. Raise {too_short}, or look at the data with data_prep/show.py."
    return f"{why}. Look at the data with data_prep/show.py."
