"""What is run on the stand-in for a GPU: every method on every tiny backbone, every head, and losses of training.

A column is a backbone with a batch, a row a method on it. Besides those of `method_table` there are BLIP's retrieval
with the losses of its pairs, and heads on features that are stored or computed by an encoder in every step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mmpeft_ds import backbones, registry, tasks
from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.data.batch import Described, PackedBatch, Sample, pack
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites.base import base_model
from mmpeft_ds.tasks.base import TaskBase
from tests.helpers import method_table, plain_methods
from tests.helpers.models import tiny_blip, tiny_clip, tiny_mllm, tiny_towers

PAIRS = {"blip retrieval, losses": "contrast_match", "clip, losses": "contrast"}  # column -> loss of the task
STORED, LIVE = "heads, stored features", "heads, live features"
COLUMNS = (*method_table.COLUMNS, *PAIRS, STORED, LIVE)
FROZEN = "frozen, forward"  # the base alone, without autograd
# row of the columns of heads -> method and options
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("clip_adapter", "graph_adapter", "hegraph", "task_res", "zero_shot")},
    "coop": ("coop", {"context": 2}),
    "ga_net, threshold": ("ga_net", {"r": 4, "tau": 0.2}),
    "ga_net, knn": ("ga_net", {"r": 4, "graph": "knn", "k": 2, "tau": -0.5}),
    "ga_net, v2": ("ga_net", {"r": 4, "variant": "v2", "k": 2, "tau": -0.5}),
    "ga_net, no graph": ("ga_net", {"r": 4, "graph": "none"}),
    "ga_net, tau searched": ("ga_net", {"r": 4, "tau_grid": [0.1, 0.2]}),
    "hegraph, searched": ("hegraph", {"search": True}),
    "hegraph, factors trained": ("hegraph", {"learned": True}),
    "mmrl": ("mmrl", {"first_layer": 2, "width": 4}),
    "linear_probe, gradient": ("linear_probe", {"solver": "gradient"}),
    "linear_probe, lbfgs": ("linear_probe", {}),
    "tip_adapter": ("tip_adapter", {}),
    "tip_adapter, keys trained": ("tip_adapter", {"train_keys": True}),
}
LABELS = ["red circle", "blue square", "big circle"]
CAPTIONS = ("a red circle", "what color is it", "the blue square", "is there a circle", "a big circle")
WIDTH, SHOTS = tiny_clip.SHARED, 2


@dataclasses.dataclass
class Column:
    """A backbone with its frozen model, a batch, and the task whose loss is taken.

    Without a task the loss is one that every output enters.
    """

    backbone: BackboneBase
    model: nn.Module
    batch: PackedBatch
    task: TaskBase | None = None


@contextlib.contextmanager
def column(name: str, folder: Path) -> Iterator[Column]:
    """A column of `COLUMNS`, with inner widths that every method can split."""
    plain = {"intermediate_size": 32}
    with mock.patch.dict(tiny_towers.COMMON, plain), mock.patch.dict(tiny_mllm.CLIP, plain):
        if name in method_table.COLUMNS:
            made = method_table.Column.make(name, folder)
            yield Column(made.backbone, made.model, made.batch)
        else:
            yield _pairs(name, folder) if name in PAIRS else _features(folder, live=name == LIVE)


def models(made: Column, chosen: Iterable[str] = ()) -> Iterator[tuple[str, nn.Module]]:
    """The rows of a column: the frozen base, and what fits it of the chosen methods or heads, by default of all.

    Parameters that train are moved off their start, where many are zero and the others have no gradient.
    """
    heads = made.backbone.reads_bank
    if not heads and made.task is None:
        yield FROZEN, copy.deepcopy(made.model).requires_grad_(False)  # a run leaves constants in it
    for row in chosen or (HEADS if heads else plain_methods.names(heads=False)):
        if (model := _attached(row, made)) is not None:
            torch.manual_seed(3)
            with torch.no_grad():
                for parameter in (p for p in model.parameters() if p.requires_grad):
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            yield row, model


def passes(made: Column, model: nn.Module, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients by name, of forward and backward as a step of the engine has them; without trainables of a
    forward alone."""
    model.zero_grad()
    trains = any(p.requires_grad for p in model.parameters())
    with torch.set_grad_enabled(trains):
        outputs = forward(model, made.backbone, batch, scores=True)
        if made.task is not None:
            loss = made.task.loss(outputs, batch)
        elif made.backbone.generates:
            loss = outputs.token_losses()[0].sum()
        else:
            names = ("logits", "text_features", "image_features")
            loss = sum(outputs[n].float().square().mean() for n in names if outputs.get(n) is not None)
    if trains:
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what training changes beside the weights, such as a queue."""
    return {name: tensor.clone() for name, tensor in base_model(model).training_state().items()}


def to_cuda(made: Column, model: nn.Module, state: dict[str, Tensor]) -> PackedBatch:
    """Move a model there, with that training state, and give the batch of the column there."""
    model.to("cuda")
    base_model(model).load_training_state({name: tensor.to("cuda") for name, tensor in state.items()})
    return made.batch.to("cuda")


def _attached(row: str, made: Column) -> nn.Module | None:
    """The model with the layers of a row; None where it does not fit."""
    name, given = HEADS.get(row, (row, None))
    if (row in HEADS) != made.backbone.reads_bank:
        return None
    for options in method_table.OPTIONS if given is None else [given]:
        with contextlib.suppress(BadInput, TypeError):
            return method_table._attach(name, made, options)
    return None


def _pairs(name: str, folder: Path) -> Column:
    """A backbone that compares pictures with texts, and the retrieval task."""
    if name.startswith("blip"):
        entry = registry.load(backbones, "blip", "backbone.name")
        options = entry.Options(tiny_blip.write(folder, "retrieval"), form="retrieval", queue=16)
        backbone = entry(options, None)
    else:
        backbone = method_table.COLUMNS["clip"](folder)
    backbone.check()
    entry = registry.load(tasks, "retrieval", "task.name")
    task = entry(entry.Options(loss=PAIRS[name]), None)
    return Column(backbone, copy.deepcopy(backbone.build().eval()), _batch(backbone, task, list(range(1, 6))), task)


def _features(folder: Path, live: bool) -> Column:
    """A model of features with a full bank, and classification."""
    entry = registry.load(backbones, "features", "backbone.name")
    if live:
        backbone = entry(entry.Options(encoder={}, images="live", texts="live"), LABELS)
        backbone.use_encoder(method_table.COLUMNS["clip"](folder))
    else:
        backbone = entry(entry.Options(), LABELS)
        backbone.use_features({"key": "k", "image_width": WIDTH, "text_width": WIDTH, "logit_scale": 10.0})
    drawn = torch.Generator().manual_seed(4)
    texts = {name: torch.randn(len(LABELS), 2, WIDTH, generator=drawn) for name in ("positive", "negative")}
    support = torch.randn(len(LABELS) * SHOTS, 2, WIDTH, generator=drawn)
    numbers = torch.arange(len(LABELS)).repeat_interleave(SHOTS)
    backbone.use_bank({**({} if live else texts), "support": support, "support_labels": numbers})
    backbone.check()
    entry = registry.load(tasks, "classification", "task.name")
    task = entry(entry.Options(text="captions"), LABELS)
    model = copy.deepcopy(backbone.build().eval())
    backbone.read_classes(model)
    return Column(backbone, model, _batch(backbone, task, [{"label": i % 3} for i in range(5)]), task)


def _batch(backbone: BackboneBase, task: TaskBase, targets: list[Any]) -> PackedBatch:
    """Five samples, one of which does not count, and one with two images."""
    drawn, transform, samples = torch.Generator().manual_seed(1), backbone.image_transform(train=False), []
    stored = backbone.reads_bank and backbone.options.images == "stored"
    for i, (caption, target) in enumerate(zip(CAPTIONS, targets, strict=True)):
        if stored:
            images = [torch.randn(WIDTH, generator=drawn) for _ in range(1 + (i == 1))]
            text: Any = Described(caption, torch.randn(WIDTH, generator=drawn))
        else:
            pixels = torch.randint(0, 256, (1 + (i == 1), 3, 9, 11), dtype=torch.uint8, generator=drawn)
            images = [transform(image, torch.Generator()) for image in pixels]
            text = Described(caption) if backbone.reads_bank else caption
        samples.append(Sample(f"toy/{i}", float(i != 3), images, [text], [target]))
    return pack(samples, backbone.collate_images, backbone.collate_texts, task.collate)
