"""One forward of a batch, as training, evaluation and `predict` all do it."""

from __future__ import annotations

from typing import Any

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.errors import BadInput


def forward(model: Any, backbone: Any, batch: PackedBatch) -> Any:
    """What the task's loss and `predict` get: the model's outputs, read by the backbone where it writes text.

    Args:
        model: DeepSpeed engine or plain module.
    """
    outputs = model(**backbone.inputs(batch))
    return backbone.read(outputs, batch) if hasattr(backbone, "read") else outputs


def answer(model: Any, backbone: Any, task: Any, batch: PackedBatch) -> Any:
    """`forward`, and what the model writes, or picks from a list, if the task asks for it (`outputs.generated`)."""
    outputs = forward(model, backbone, batch)
    for name, run in (("generation", "generate"), ("ranking", "rank")):
        options = getattr(task, name, None)
        if options is not None:
            if not hasattr(backbone, run):
                raise BadInput(
                    f"task: asks for {name}, which this backbone cannot do. Choose another task or backbone."
                )
            outputs.generated = getattr(backbone, run)(getattr(model, "module", model), batch, **options)
    return outputs
