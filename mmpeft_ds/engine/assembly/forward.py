"""Forward pass of a batch, the same in training, evaluation and `predict`."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.scored_head import is_scorable, scored
from mmpeft_ds.ops.token_scores import TokenScores
from mmpeft_ds.sites.base import base_model
from mmpeft_ds.tasks.base import TaskBase


def forward(model: Any, backbone: BackboneBase, batch: PackedBatch, scores: bool = False) -> Any:
    """The model's outputs as the backbone reads them, for the task's loss and `predict`.

    Args:
        model: DeepSpeed engine or plain module.
        scores: of a model that generates, give scores of the labels in place of logits, which take several times
            their memory; where there is a `scored_layer`.
    """
    base = base_model(getattr(model, "module", model))
    head = scored_layer(backbone, base) if scores else None
    if head is None:
        return backbone.read(model(**backbone.inputs(batch)), batch)
    with scored(head, lambda positions: backbone.labels_at(base, batch, positions)):
        outputs = model(**backbone.inputs(batch))
    read = backbone.read(outputs, batch)
    return dataclasses.replace(read, logits=None, scores=TokenScores.of(read.logits))


def scored_layer(backbone: BackboneBase, base: nn.Module) -> nn.Linear | None:
    """The output layer that can score labels in place of computing logits: frozen, or trained whole as one of
    `modules_to_save`. None where the model does not generate or the layer has adapters.

    Args:
        base: the base model, adapters in place.
    """
    head = backbone.output_layer(base) if backbone.generates else None
    if isinstance(head, ModulesToSaveWrapper):
        active = next((n for n in head.active_adapters if n in head.modules_to_save), None)
        head = head.original_module if head.disable_adapters or active is None else head.modules_to_save[active]
    return head if is_scorable(head) else None


def answer(model: Any, backbone: BackboneBase, task: TaskBase, batch: PackedBatch, scores: bool = False) -> Any:
    """`forward`, and the texts that the model generates, or picks from a list, if the task asks for it
    (`outputs.generated`)."""
    outputs = forward(model, backbone, batch, scores)
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
