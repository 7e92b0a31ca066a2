"""Pairs of method and backbone, a small batch stream for them, and plain training to compare with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.batch import PackedBatch, Prompted, Sample, pack
from mmpeft_ds.engine.assembly import resolve as resolving
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.zero.config import check_ds_config
from tests.helpers.models import tiny_backbones

STEPS, SLOTS, LR = 6, 8, 0.005
WORDS = ["is", "there", "a", "red", "blue", "round", "big", "circle", "square", "what", "color", "it"]


def write_backbones(folder: Path, names: set[str]) -> dict[str, dict[str, Any]]:
    """Tiny checkpoints below `folder`; the `backbone` section of a recipe for each."""
    makers = {**tiny_backbones.MAKERS, "blip_vqa": _blip_vqa}
    found = {}
    for name in sorted(names):
        made = makers[name](folder / name)
        found[name] = {"name": name.split("_vqa")[0], **dataclasses.asdict(made.options)}
    return found


def _blip_vqa(folder: Path) -> Any:
    from mmpeft_ds import backbones, registry
    from tests.helpers.models import tiny_blip

    entry = registry.load(backbones, "blip", "backbone.name")
    return entry(entry.Options(tiny_blip.write(folder, "vqa"), form="vqa"), None)


class TinyTask:
    """Cross-entropy over labels, or the likelihood of what should be written: the mean over texts."""

    fields: tuple[str, ...] = ()
    couples_samples = False
    main_metric, better = "loss", "min"

    def __init__(self, writes: bool):
        self.writes = writes

    def collate(self, targets: list[int]) -> dict[str, Tensor]:
        return {"label": torch.tensor(targets)}

    def dummy_text(self, text):
        return text

    def dummy_target(self) -> int:
        return 0

    def weight(self, batch: PackedBatch) -> float:
        return float(batch.text_weight.sum())

    def loss(self, outputs: Any, batch: PackedBatch) -> Tensor:
        if self.writes:
            losses = outputs.token_losses()[0]
        elif "logits" in outputs:
            losses = torch.nn.functional.cross_entropy(outputs.logits, batch.targets["label"], reduction="none")
        else:
            # any function that couples a text with the images of its slot
            of_slot = outputs.text_features.new_zeros(len(batch.sample_id), outputs.text_features.shape[1])
            of_slot = of_slot.index_add(0, batch.image_owner, outputs.image_features)
            losses = (outputs.text_features * (1 + of_slot[batch.text_owner])).sum(1)
        return (batch.text_weight * losses).sum()


def slots_of(step: int, backbone: Any) -> list[Sample]:
    """Slots of one step, 0 to 2 images and 1 to 2 ragged texts each, a padding slot and uneven weights."""
    g = torch.Generator().manual_seed(1000 + step)
    writes = backbone.generates
    transform = backbone.image_transform(True)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=g))

    def words(most: int) -> str:
        return " ".join(WORDS[draw(len(WORDS))] for _ in range(1 + draw(most)))

    slots = [Sample()]
    for i in range(SLOTS - 1):
        images = [torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=g) for _ in range((i + step) % 3)]
        texts = [Prompted(words(4), words(3)) if writes else words(5) for _ in range(1 + draw(2))]
        pixels = [transform(image, g) for image in images]
        weight = 1.0 if draw(4) else 0.5
        slots.append(Sample(f"t/{step}-{i}", weight, pixels, texts, [draw(4) for _ in texts]))
    return slots


def packed(slots: list[Sample], backbone: Any, task: TinyTask) -> PackedBatch:
    return pack(slots, backbone.collate_images, backbone.collate_texts, task.collate)


def resolved(case: dict[str, Any], sections: dict[str, dict[str, Any]], folder: Path) -> Any:
    """What `resolve` would give for a case, without a data set."""
    recipe = recipes.Recipe(run_dir=str(folder / "run"), backbone=sections[case["backbone"]], method=case["method"])
    recipe.engine.deepspeed = f"ds_configs/zero{case.get('stage', 3)}.json"
    recipe.engine.gradient_checkpointing = case.get("gradient_checkpointing", False)
    recipe.engine.dtype = case.get("dtype", "float32")
    recipe.engine.adapter_matmul = case.get("adapter_matmul", "float32")
    recipe.optim.lr, recipe.optim.warmup, recipe.optim.max_steps = LR, 0.0, STEPS
    recipe.optim.schedule, recipe.optim.clip = "constant", 1.0
    recipe.data.global_batch = SLOTS
    method, config = resolving.make_method(recipes.components(recipe).method)
    backbone = resolving.make_backbone(recipes.components(recipe).backbone, recipe.engine, tiny_backbones.LABELS)
    resolving.check_sites(recipes.components(recipe).method, backbone, method, config)
    source = SimpleNamespace(task=TinyTask(backbone.generates))
    ds_config = check_ds_config(recipe)
    ds_config["zero_optimization"] |= case.get("zero", {})
    return resolving.Resolved(recipe, ds_config, backbone, method, config, [source], [source], None, None)


def train_plainly(parts: Any) -> dict[str, Any]:
    """The same steps by one process in PyTorch, without DeepSpeed and without the engine's step."""
    recipe, backbone, task = parts.recipe, parts.backbone, parts.train[0].task
    torch.manual_seed(recipe.seed)
    base = backbone.build()
    torch.manual_seed(recipe.seed)
    model = resolving.attach(parts, base).eval()
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainables.values(), lr=LR, weight_decay=0.0)
    start = {n: p.detach().clone() for n, p in trainables.items()}
    losses, norms = [], []
    for step in range(STEPS):
        batch = packed(slots_of(step, backbone), backbone, task)
        loss = task.loss(forward(model, backbone, batch), batch) / task.weight(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainables.values(), 1.0).item())
        optimizer.step()
    weights = {n: p.detach() for n, p in trainables.items()}
    return {"losses": losses, "norms": norms, "weights": weights, "start": start}
