"""A tiny ViT + BERT with random weights, a tiny task, hand-made global batches; shared by engine tests and ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.batch import PackedBatch, Sample, pack
from mmpeft_ds.engine.assembly import resolve as resolving
from mmpeft_ds.engine.zero.config import check_ds_config
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.tasks.base import TaskBase

WIDTH, LABELS = 16, 5
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "is", "it", "red", "blue", "round", "big", "what", "?"]


def make_towers(folder: Path) -> None:
    """Save both towers and the tokenizer below `folder`."""
    from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTModel

    torch.manual_seed(0)
    common = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    vision = ViTModel(ViTConfig(image_size=8, patch_size=4, **common))
    text = BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **common))
    for model in (vision, text):
        for parameter in model.parameters():  # weights large enough that a wrong gradient shows
            torch.nn.init.normal_(parameter, std=0.3)
    vision.save_pretrained(folder / "vision")
    text.save_pretrained(folder / "text")
    (folder / "text" / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "text" / "vocab.txt")).save_pretrained(folder / "text")


class TinyTask(TaskBase):
    """Cross-entropy over LABELS answers, one a text; the texts and targets are made elsewhere.

    Args:
        poison: sample ids whose loss is NaN.
    """

    main_metric = "accuracy"
    example_text = "is it red ?"

    def __init__(self, poison: set[str] | None = None):
        super().__init__(None, None)
        self.poison = poison or set()

    def read(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Any], list[Any]]:
        raise NotImplementedError

    def collate(self, targets: list[int]) -> dict[str, Tensor]:
        return {"label": torch.tensor(targets)}

    def dummy_target(self) -> int:
        return 0

    def weight(self, batch: PackedBatch) -> float:
        return float(batch.text_weight.sum())

    def loss(self, outputs: Any, batch: PackedBatch) -> Tensor:
        logits = outputs.logits.to(full_dtype(outputs.logits.dtype))
        losses = torch.nn.functional.cross_entropy(logits, batch.targets["label"], reduction="none")
        factor = float("nan") if self.poison & set(batch.sample_id) else 1.0
        return factor * (batch.text_weight * losses).sum()

    def predict(self, outputs: Any, batch: PackedBatch) -> list[dict[str, Any]]:
        owners, weights = batch.text_owner.tolist(), batch.text_weight.tolist()
        chosen = outputs.logits.argmax(-1).tolist()
        labels = batch.targets["label"].tolist()
        return [
            {"sample_id": batch.sample_id[owners[i]], "text": batch.raw_texts[i], "prediction": c, "answer": labels[i]}
            for i, c in enumerate(chosen)
            if weights[i] > 0
        ]

    def score(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        return {"accuracy": sum(r["prediction"] == r["answer"] for r in rows) / max(1, len(rows))}


def make_recipe(folder: Path, stage: int = 0, **overrides: Any) -> recipes.Recipe:
    """Routed LoRA on both projections, norms and head trained; no decay, clipping on."""
    recipe = recipes.Recipe(
        run_dir=str(folder / "run"),
        backbone={
            "name": "vision_text_encoder",
            "vision": str(folder / "vision"),
            "text": str(folder / "text"),
            "image_size": 8,
            "vision_feature": "cls",
            "head_input": "raw",
            "num_labels": LABELS,
            "max_text_length": 12,
        },
        method={"name": "routed_lora", "r": 2, "alpha": 4, "route": "mul", "train_norms": True, "train_bias": True},
    )
    recipe.engine.deepspeed = f"ds_configs/zero{stage}.json"
    recipe.optim.lr, recipe.optim.warmup, recipe.optim.max_steps = 0.02, 0.0, 10
    recipe.optim.weight_decay, recipe.optim.clip = 0.01, 0.5
    recipe.data.global_batch = 12
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        setattr(getattr(recipe, section), name, value) if name else setattr(recipe, section, value)
    return recipe


def make_resolved(recipe: recipes.Recipe, task: TinyTask) -> Any:
    """What `resolve` would give, without a data set."""
    method, config = resolving.make_method(recipes.components(recipe).method)
    backbone = resolving.make_backbone(recipes.components(recipe).backbone, recipe.engine, None)
    source = SimpleNamespace(task=task)
    return resolving.Resolved(
        recipe, check_ds_config(recipe), backbone, method, config, [source], [source], None, None
    )


def global_slots(step: int, backbone: Any, count: int = 12) -> list[Sample]:
    """Slots of one step: 0 to 2 images, 1 to 3 texts of ragged length, a padding slot, a bad one, uneven weights."""
    g = torch.Generator().manual_seed(1000 + step)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=g))

    transform = backbone.image_transform(True)
    slots = []
    for i in range(count):
        if i == count - 1:
            slots.append(Sample())
            continue
        if i == 3:
            slots.append(Sample(sample_id=f"t/{step}-{i}", bad=("image", "shard", f"{step}-{i}")))
            continue
        texts = [" ".join(WORDS[5 + draw(9)] for _ in range(1 + draw(6))) for _ in range(1 + draw(3))]
        images = [torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=g) for _ in range(draw(3))]
        slots.append(
            Sample(
                sample_id=f"t/{step}-{i}",
                weight=1.0 if draw(4) else 0.5,
                images=[transform(image, g) for image in images],
                texts=texts,
                targets=[draw(LABELS) for _ in texts],
            )
        )
    return slots


def pack_slots(slots: list[Sample], backbone: Any, task: TinyTask) -> PackedBatch:
    return pack(slots, backbone.collate_images, backbone.collate_texts, task.collate)
