"""Forward pass of a batch, the same in training, evaluation and `predict`."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.ia3 import Linear as IA3Linear
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.backbones.common.stand_in import content_of
from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.scored_head import aligned, is_scorable, scored
from mmpeft_ds.ops.token_scores import TokenScores, labelled
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.base import base_model
from mmpeft_ds.sites.unread import MOST, LastLayer
from mmpeft_ds.tasks.base import TaskBase


def forward(
    model: Any, backbone: BackboneBase, batch: PackedBatch, scores: bool = False, last: LastLayer | None = None
) -> Any:
    """The model's outputs as the backbone reads them, for the task's loss and `predict`.

    Args:
        model: DeepSpeed engine or plain module.
        scores: of a model that generates, give scores of the labels in place of logits, which take several times
            their memory; where there is a `scored_layer`.
        last: of the base model; with `scores` it computes nothing for positions without a label that it need not.
    """
    base = last.base if last else base_model(getattr(model, "module", model))
    head = scored_layer(backbone, base) if scores else None
    if head is None:
        return backbone.read(model(**backbone.inputs(batch)), batch)

    def labels_at(positions: int) -> Tensor:
        return backbone.labels_at(base, batch, positions)

    reading = last.reading(_labelled(labels_at)) if last else contextlib.nullcontext()
    with scored(head, labels_at, backbone.logit_finish), reading:
        outputs = model(**backbone.inputs(batch))
    read = backbone.read(outputs, batch)
    read.logits, read.scores = None, TokenScores.of(read.logits)
    return read


def _labelled(labels_at: Callable[[int], Tensor]) -> Callable[[int], Tensor | None]:
    """Positions that predict a label, of S; None where these are nearly all, or none. Found once for each S."""

    @functools.cache
    def read(positions: int) -> Tensor | None:
        labels = aligned(labels_at(positions), positions)
        rows = labelled(labels)
        return rows if 0 < len(rows) <= MOST * labels.numel() else None

    return read


def scored_layer(backbone: BackboneBase, base: nn.Module) -> nn.Module | None:
    """The output layer that can score labels in place of computing logits: frozen, trained in full as one of
    `modules_to_save`, or with peft's LoRA or (IA)^3. None where the model does not generate.

    Args:
        base: the base model, adapters in place.
    """
    head = backbone.output_layer(base) if backbone.generates else None
    if isinstance(head, ModulesToSaveWrapper):
        active = next((n for n in head.active_adapters if n in head.modules_to_save), None)
        head = head.original_module if head.disable_adapters or active is None else head.modules_to_save[active]
    return head if is_scorable(head) or adapted_layer(backbone, base) is head else None


def adapted_layer(backbone: BackboneBase, base: nn.Module) -> nn.Module | None:
    """The output layer if it has adapters, which treat every position by itself; else None."""
    head = backbone.output_layer(base) if backbone.generates else None
    return head if isinstance(head, (LoraLinear, IA3Linear)) and is_scorable(head.get_base_layer()) else None


def answer(model: Any, backbone: BackboneBase, task: TaskBase, batch: PackedBatch, scores: bool = False) -> Any:
    """`forward`, and the texts that the model generates, or picks from a list, if the task asks for it
    (`outputs.generated`)."""
    plain = getattr(model, "module", model)
    asked = [
        (name, options, able, run)
        for name, options, able, run in (
            ("generation", task.generation, backbone.generates, backbone.generate),
            ("ranking", task.ranking, backbone.ranks_answers, backbone.rank),
        )
        if options is not None
    ]
    with _images_seen_once(base_model(plain)) if asked else contextlib.nullcontext():
        outputs = forward(model, backbone, batch, scores)
        for name, options, able, run in asked:
            if not able:
                raise BadInput(
                    f"task: asks for {name}, which this backbone cannot do. Choose another task or backbone."
                )
            outputs.generated = run(plain, batch, **options)
    if task.generation is not None:
        outputs.as_generated = backbone.as_generated
    return outputs


@contextlib.contextmanager
def _images_seen_once(base: nn.Module) -> Iterator[None]:
    """Context in which a vision tower that is called again with equal images returns what it returned before.

    For one batch, and without changes of the model in between. All ranks must call alike, since a tower that does not
    run gathers no partitioned weights.
    """
    towers = [base.get_submodule(p) for p, kind in find_sites(base).towers.items() if kind == "image"]
    before = [vars(tower).get("forward") for tower in towers]
    for tower in towers:
        tower.forward = _Remembering(tower.forward)
    try:
        yield
    finally:
        for tower, own in zip(towers, before, strict=True):
            if own is None:
                del tower.forward
            else:
                tower.forward = own


class _Remembering:
    """A function that keeps its last arguments and result."""

    def __init__(self, function: Any):
        self.function, self.arguments, self.result = function, None, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = pytree.tree_flatten((args, kwargs))
        if self.arguments is None or not equal_trees(arguments, self.arguments):
            self.arguments, self.result = arguments, self.function(*args, **kwargs)
        return copy.copy(self.result)  # Qwen2-VL puts other fields into what its tower returned


def equal_trees(one: tuple[list[Any], Any], other: tuple[list[Any], Any]) -> bool:
    """Whether two flattened trees are the same in structure and values, stand-ins in what they stand for."""

    def same(a: Any, b: Any) -> bool:
        a, b = content_of(a), content_of(b)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a is b or (a.dtype == b.dtype and torch.equal(a, b))
        return a is b or (type(a) is type(b) and not isinstance(a, torch.Tensor) and bool(a == b))

    return one[1] == other[1] and all(map(same, one[0], other[0]))
