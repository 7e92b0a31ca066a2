"""Forward pass of a batch, the same in training, evaluation and `predict`."""

from __future__ import annotations

from typing import Any

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.errors import BadInput
from mmpeft_ds.tasks.base import TaskBase


def forward(model: Any, backbone: BackboneBase, batch: PackedBatch) -> Any:
    """The model's outputs as the backbone reads them, for the task's loss and `predict`.

    Args:
        model: DeepSpeed engine or plain module.
    """
    return backbone.read(model(**backbone.inputs(batch)), batch)


def answer(model: Any, backbone: BackboneBase, task: TaskBase, batch: PackedBatch) -> Any:
    """`forward`, and the texts that the model generates, or picks from a list, if the task asks for it
    (`outputs.generated`)."""
    outputs = forward(model, backbone, batch)
    for name, options, able, run in (
        ("generation", task.generation, backbone.generates, backbone.generate),
        ("ranking", task.ranking, backbone.ranks_answers, backbone.rank),
    ):
        if options is not None:
            if not able:
                raise BadInput(
                    f"task: asks for {name}, which this backbone cannot do. Choose another task or backbone."
                )
            outputs.generated = run(getattr(model, "module", model), batch, **options)
    if task.generation is not None:
        outputs.as_generated = backbone.as_generated
    return outputs
