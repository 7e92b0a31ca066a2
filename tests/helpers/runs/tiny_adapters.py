"""An adapter directory of every task, on tiny models with random weights, from one small data set of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.writer import PARTS, write_manifest, write_shard
from mmpeft_ds.engine.assembly import feature_bank, resolve
from mmpeft_ds.engine.export import export_adapter
from tests.helpers.data import tiny_pictures
from tests.helpers.data.images import encoded
from tests.helpers.data.tiny_shards import RawSample
from tests.helpers.models import tiny_blip, tiny_clip, tiny_mllm, tiny_towers

LABELS = ["red", "blue", "round"]
CAPTIONS = ["a red circle", "is it big", "the blue square is there"]


def pictured(i: int) -> RawSample:
    """One picture with everything that any task reads."""
    talk = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": CAPTIONS[i % 3]}]
    record = {
        "captions": [CAPTIONS[i % 3], CAPTIONS[(i + 1) % 3]],
        "questions": [{"question": "what color is it", "answers": [LABELS[i % 3]]}],
        "conversations": talk,
        "label": i % 3,
        "class_name": LABELS[i % 3],
    }
    return RawSample(f"source {i}", [("jpg", encoded(i))], record)


def write_pictures(folder: Path, samples: int = 12) -> Manifest:
    """A data set with a train and a val split."""
    (folder / PARTS).mkdir(parents=True)
    parts = {
        split: [write_shard(folder, "own", split, 0, 0, [pictured(first + i) for i in range(count)])]
        for split, first, count in (("train", 0, samples), ("val", 100, 4))
    }
    write_manifest(folder, "own", "CC0-1.0", {"name": "toy"}, samples, parts, LABELS, "train")
    return Manifest.load(folder)


def sections(folder: Path, kind: str) -> dict[str, Any]:
    """The recipe's sections of one kind of adapter; writes the tiny models it names."""
    vision = tiny_towers.write_vision(folder / "vision", "vit")
    sided = {"vision": vision, "image_size": 8, "max_text_length": 19}
    encoders = {**sided, "text": tiny_towers.write_text(folder / "text", "bert")}
    pair = {"name": "dual_encoder", **encoders}
    writer = {"name": "vision_text_decoder", **sided, "text": tiny_towers.write_decoder(folder / "decoder")}
    lora: dict[str, Any] = {"name": "lora", "r": 2}
    retrieval = {"name": "retrieval", "loss": "contrast", "rerank": 0}
    if kind == "vqa":
        return _made({"name": "vision_text_encoder", "vision_feature": "cls", **encoders}, lora, {"name": "vqa"})
    if kind == "answering":
        return _made(writer, lora, {"name": "answering", "max_new_tokens": 3})
    if kind == "captioning":
        return _made(writer, lora, {"name": "captioning", "num_beams": 1, "max_length": 8})
    if kind == "captioning through a projection":
        other = {"vision": tiny_towers.write_vision(folder / "wide", "dinov2", width=32), "projection": "mlp"}
        return _made({**writer, **other}, lora, {"name": "captioning", "num_beams": 1, "max_new_tokens": 8})
    if kind == "vqa_generative":
        blip = {"name": "blip", "form": "vqa", "model": tiny_blip.write(folder / "blip", "vqa"), "max_text_length": 19}
        return _made(blip, lora, {"name": "vqa_generative"})
    if kind == "instruction":
        model = {"name": "mllm", "model": tiny_mllm.write(folder / "mllm", "qwen2_vl"), "max_text_length": 60}
        return _made(model, lora, {"name": "instruction", "max_new_tokens": 3})
    if kind == "retrieval":
        return _made({**pair, "projection": "mlp", "width": 12}, lora, retrieval)
    if kind == "retrieval with clip":
        clip = {"name": "clip", "model": tiny_clip.write(folder / "clip", "clip")}
        return _made(clip, lora, retrieval)
    if kind == "retrieval with blip":
        model = tiny_blip.write(folder / "blip", "retrieval")
        blip = {"name": "blip", "form": "retrieval", "model": model, "max_text_length": 19, "queue": 0}
        return _made(blip, lora, {"name": "retrieval"})
    if kind == "retrieval on stored features":
        made = {**pair, "projection": "mlp", "width": 12, "images": "stored"}
        return _made(made, lora, retrieval, stored=pair)
    if kind == "classification":
        head = {"name": "features", "encoder": pair, "images": "live", "texts": "none"}
        return _made(head, {"name": "clip_adapter"}, {"name": "classification"})
    if kind == "classification on stored features":
        return _made({"name": "features"}, {"name": "clip_adapter"}, {"name": "classification"}, stored=pair)
    raise KeyError(kind)


KINDS = (
    "vqa", "answering", "captioning", "captioning through a projection", "vqa_generative", "instruction", "retrieval",
    "retrieval with clip", "retrieval with blip", "retrieval on stored features", "classification",
    "classification on stored features",
)  # fmt: skip


def _made(backbone: dict, method: dict, task: dict, stored: dict | None = None) -> dict[str, Any]:
    return {"backbone": backbone, "method": method, "task": task, "stored": stored}


def recipe(folder: Path, kind: str) -> recipes.Recipe:
    """A recipe of that kind over FOLDER/data, which is written if needed, as the shards it trains on are."""
    parts = sections(folder, kind)
    data = folder / "data"
    source = Manifest.load(data) if data.exists() else write_pictures(data)
    if parts["stored"]:
        data = folder / "features"
        tiny_pictures.make(source, parts["stored"], data)
    splits = {"sources": "train", "validation": "val"}
    return recipes.from_dict(
        {
            "run_dir": str(folder / "run"),
            "backbone": parts["backbone"],
            "method": parts["method"],
            "data": {
                **{role: [{"dir": str(data), "split": s, "task": parts["task"]}] for role, s in splits.items()},
                "global_batch": 4,
                "workers": 0,
            },
            "optim": {"max_steps": 2},
            "engine": {"deepspeed": "ds_configs/zero1.json", "threads": 1},
            "monitor": {"tensorboard": False, "samples": 0},
        }
    )


def built(resolved: resolve.Resolved) -> PreTrainedModel:
    """The base with what it reads of the data set, as the engine makes it."""
    backbone = resolved.backbone
    if resolved.recipe.backbone["name"] != "features":
        return backbone.build()
    wanted = resolved.method.bank_parts(resolved.method_config)
    backbone.use_bank(feature_bank.read(resolved.train, resolved.labels, wanted))
    base = backbone.build()
    backbone.read_classes(base)
    return base


def export(folder: Path, kind: str) -> Path:
    """FOLDER/adapter, with trained values that are not those it began with."""
    resolved = resolve.resolve(recipe(folder, kind))
    torch.manual_seed(7)
    base = built(resolved)
    model = resolve.attach(resolved, base).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    export_adapter(folder / "adapter", model, resolved, {"accuracy": 0.5})
    return folder / "adapter"
