"""The adapter directory: all that a run leaves to be used, loadable by stock peft, or rebuilt whole by `load`.

adapter_config.json, adapter_model.safetensors    peft's own; float32 masters of everything trained
recipe.yaml                 resolved recipe
backbone.json               name and options of the backbone, and the base model's configuration
labels.json                 answers in class order, or null
image_transform.json        what happens to a decoded image
feature_statistics.json     mean and deviation of the condition, or null
bank.safetensors            of models of features: class texts and support samples that the head reads
towers.json                 of models of features: what made the stored features
classifier.safetensors      of heads that have such a form: a classifier that needs neither bank nor graph
base_fingerprint.json       of every frozen tensor, under its name in the bare base model
metrics.json                what the run reached
README.md                   model card
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmpeft_ds import recipe as recipes
from mmpeft_ds.backbones.base import Backbone
from mmpeft_ds.data import decode
from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.engine import checkpoint
from mmpeft_ds.engine.assembly.forward import answer
from mmpeft_ds.engine.model_card import model_card
from mmpeft_ds.engine.rank0 import on_rank0, rank
from mmpeft_ds.engine.zero import fingerprint
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.methods.common.layers import gathered
from mmpeft_ds.sites.base import base_layer
from mmpeft_ds.tasks.base import Task

WEIGHTS = "adapter_model.safetensors"
FILES = ("adapter_config.json", WEIGHTS, "recipe.yaml", "backbone.json", "labels.json", "base_fingerprint.json")


def export(directory: str | Path, model: Any, resolved: Any, metrics: dict[str, Any]) -> Path:
    """Write the adapter directory; one that is there already is replaced as a whole. Collective.

    Only trained parameters are gathered. The weights are read back and compared before the directory gets its name.

    Args:
        model: the PeftModel, or the DeepSpeed engine around it.
        resolved: parts of the recipe (`engine.resolve.Resolved`).
        metrics: json-able, for the model card.

    Raises:
        RuntimeError: if what peft wrote is not exactly what was trained.
    """
    engine = model if hasattr(model, "zero_optimization_stage") else None
    peft_model: PeftModel = model if engine is None else model.module
    trained = {}
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            trained[name] = _master(engine, parameter)
    for name, buffer in _found_without_gradients(peft_model):
        trained[name] = buffer.detach().cpu().clone() if rank() == 0 else None
    fingerprints = fingerprint.frozen_fingerprint(fingerprint.frozen_tensors(peft_model))
    directory = Path(directory)
    plain = _plain_classifier(peft_model)
    return on_rank0(lambda: _write(directory, peft_model, trained, plain, fingerprints, resolved, metrics))


@dataclass
class Loaded:
    """Base and adapter, ready to answer.

    Attributes:
        model: PeftModel in eval mode.
        backbone: transforms, tokenisation and forward arguments.
        tasks: of the recipe's train sources.
        labels: answers in class order, or None.
        recipe: that it was trained with.
    """

    model: PeftModel
    backbone: Backbone
    tasks: list[Task]
    labels: list[str] | None
    recipe: recipes.Recipe
    device: torch.device

    @property
    def task(self) -> Task:
        return self.tasks[0]

    @torch.no_grad()
    def predict(
        self, images: Sequence[Any], texts: Sequence[str | Sequence[str]], batch: int = 32, task: int = 0
    ) -> list[dict[str, Any]]:
        """Answer questions about images.

        Args:
            images: N entries: a path, encoded bytes, a uint8 (3, H, W) tensor, a list of these, or None for no image;
                for a backbone that takes stored features, .npy files or tensors of one image each.
            texts: N entries: a text, or several texts about the same entry, for which the vision tower runs once.
            batch: entries at a time.
            task: which of `tasks` is asked.

        Returns:
            one row per text in order: `prediction`, `text`, `sample_id` (path or number of the entry), and what else
            the task tells.

        Raises:
            BadInput: naming the image that cannot be read; no such task.
        """
        if not 0 <= task < len(self.tasks):
            raise BadInput(f"predict: no task {task}; this adapter was trained on {len(self.tasks)}, counted from 0")
        if len(images) != len(texts):
            raise BadInput(f"predict: {len(images)} images but {len(texts)} texts; give one entry of texts an image")
        rows: list[dict[str, Any]] = []
        for start in range(0, len(images), batch):
            chosen = range(start, min(start + batch, len(images)))
            packed = self.batch([images[i] for i in chosen], [texts[i] for i in chosen], start, task)
            outputs = answer(self.model, self.backbone, self.tasks[task], packed)
            rows += self.tasks[task].predict(outputs, packed)
        return rows

    def batch(self, images: Sequence[Any], texts: Sequence[str | Sequence[str]], first: int = 0, task: int = 0) -> Any:
        """The packed batch that `predict` sends through the model, on its device."""
        asks = self.tasks[task]
        transform = self.backbone.image_transform(False)
        samples = []
        for number, (entry, asked) in enumerate(zip(images, texts, strict=True), start=first):
            entries = [] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry]
            asked = [asked] if isinstance(asked, str) else list(asked)
            record, targets = asks.ask(asked)
            if any(getattr(asks, how, None) is not None for how in ("generation", "ranking")):
                asked = [getattr(asks, "prompted", Prompted)(text) for text in asked]
            name = str(entry) if isinstance(entry, (str, Path)) else str(number)
            pixels = [transform(_pixels(image, self.recipe.data.max_pixels), None) for image in entries]
            samples.append(Sample(name, 1.0, pixels, asked, targets, record))
        b = self.backbone
        try:
            return pack(samples, b.collate_images, b.collate_texts, asks.collate).to(self.device)
        except BadSample as bad:
            raise BadInput(f"predict: {bad}") from bad


def load(directory: str | Path, device: torch.device | str = "cpu", overrides: list[str] | None = None) -> Loaded:
    """Rebuild base and adapter from an adapter directory and the base weights that it names.

    Args:
        overrides: changes of its recipe (`a.b=value`), for a base that is built in another form; images may then be
            transformed otherwise.

    Raises:
        BadInput: if the directory is not whole, or the base model is not the one this was trained on.
    """
    from mmpeft_ds.engine.assembly.resolve import float32_heads, make_backbone, make_task

    directory = Path(directory)
    absent = [name for name in FILES if not (directory / name).is_file()]
    if absent:
        raise BadInput(
            f"{directory}: no adapter directory, {absent[0]} is missing. Give the `adapter` folder of a run."
        )
    recipe = recipes.load(directory / "recipe.yaml", overrides)
    labels = _read(directory, "labels.json")
    towers = _read(directory, "towers.json") if (directory / "towers.json").is_file() else {}
    backbone = make_backbone(recipe, labels, towers)
    if (directory / "bank.safetensors").is_file():
        backbone.use_bank(load_file(directory / "bank.safetensors"))
    if (statistics := _read(directory, "feature_statistics.json")) is not None:
        backbone.use_statistics(statistics)
    found = _transform(backbone)
    if found != (told := _read(directory, "image_transform.json")) and not overrides:
        raise BadInput(f"{directory}: images were transformed by {told} in training, this version does {found}")
    tasks = []
    for i, source in enumerate(recipe.data.sources):
        if source.task not in [s.task for s in recipe.data.sources[:i]]:
            tasks.append(make_task(recipe, f"data.sources.{i}", source, labels))
    base = backbone.build()
    if hasattr(backbone, "read_classes"):
        backbone.read_classes(base)
    float32_heads(base)
    fingerprints = fingerprint.frozen_fingerprint(fingerprint.all_tensors(base))
    fingerprint.compare(_read(directory, "base_fingerprint.json"), fingerprints, str(directory), missing_ok=True)
    model = PeftModel.from_pretrained(base, str(directory)).to(device).eval()
    return Loaded(model, backbone, tasks, labels, recipe, torch.device(device))


def _master(engine: Any, parameter: nn.Parameter) -> Tensor | None:
    """The whole float32 value on rank 0, None elsewhere. Collective."""
    if engine is None:
        return parameter.detach().to("cpu", torch.float32, copy=True)
    full = zero_state.read_weight(parameter)
    return full if rank() == 0 else None


def _write(
    directory: Path,
    model: PeftModel,
    trained: dict[str, Tensor],
    plain: dict[str, Tensor],
    fingerprints: dict[str, str],
    resolved: Any,
    metrics: dict[str, Any],
) -> Path:
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _fill(partial, model, trained, plain, fingerprints, resolved, metrics)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    checkpoint.fsync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
    return directory


def _fill(
    partial: Path,
    model: PeftModel,
    trained: dict[str, Tensor],
    plain: dict[str, Tensor],
    fingerprints: dict[str, str],
    resolved: Any,
    metrics: dict[str, Any],
) -> None:
    # Given whole tensors, peft neither gathers nor looks at the shards. `auto` would ask the hub about embeddings.
    model.save_pretrained(str(partial), state_dict=dict(trained), save_embedding_layers=False)
    _verify(partial / WEIGHTS, trained)
    recipe, backbone = resolved.recipe, resolved.backbone
    config = model.get_base_model().config
    name, options = recipe.backbone["name"], {k: v for k, v in recipe.backbone.items() if k != "name"}
    contents = {
        "backbone.json": {
            "name": name,
            "options": options,
            "dtype": recipe.engine.dtype,
            "config": config.to_dict(),
        },
        "labels.json": resolved.labels,
        "image_transform.json": _transform(backbone),
        "feature_statistics.json": resolved.statistics,
        "base_fingerprint.json": fingerprints,
        "metrics.json": metrics,
    }
    for file, value in contents.items():
        (partial / file).write_text(json.dumps(value, indent=1, default=str, ensure_ascii=False) + "\n")
    if hasattr(backbone, "use_bank"):
        _features_files(partial, model, plain, backbone)
    (partial / "recipe.yaml").write_text(recipes.to_yaml(recipe))
    (partial / "README.md").write_text(model_card(resolved, metrics, trained))
    for file in partial.iterdir():
        checkpoint.fsync(file)
    checkpoint.fsync(partial)


def _plain_classifier(model: PeftModel) -> dict[str, Tensor]:
    """What the head exports, on the CPU; empty for any other model. Collective."""
    head = head_of(model)
    if head is None:
        return {}
    with gathered(list(head.parameters())), torch.no_grad():
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.export().items()}


def _features_files(partial: Path, model: PeftModel, plain: dict[str, Tensor], backbone: Any) -> None:
    """What a model of features brings besides: its bank, its towers, and a plain classifier if the head has one."""
    bank = base_layer(model.get_base_model().features).bank
    save_file({n: getattr(bank, n).cpu().contiguous() for n in bank.NAMES}, partial / "bank.safetensors")
    (partial / "towers.json").write_text(json.dumps(backbone.towers, indent=1, ensure_ascii=False) + "\n")
    if plain:
        save_file(plain, partial / "classifier.safetensors")


def _found_without_gradients(model: PeftModel) -> list[tuple[str, Tensor]]:
    """Buffers that heads have set by search or in closed form."""
    return [
        (f"{path}.{name}", getattr(module, name))
        for path, module in model.named_modules()
        for name in getattr(module, "calibrated", ())
    ]


def _verify(path: Path, trained: dict[str, Tensor]) -> None:
    """What was written is what was trained: as many tensors, of the same shapes and bits, and none is empty."""

    def census(tensors: dict[str, Tensor]) -> Counter:
        return Counter((tuple(t.shape), fingerprint.weighted_bits(t.reshape(-1))) for t in tensors.values())

    written = load_file(path)
    empty = [name for name, tensor in written.items() if tensor.numel() == 0]
    if empty or census(written) != census(trained):
        raise RuntimeError(
            f"{path}: peft wrote {len(written)} tensors ({len(empty)} of them empty) for {len(trained)} trained "
            f"parameters, and they are not the same; trained: {', '.join(sorted(trained)[:3])} ..."
        )


def _transform(backbone: Backbone) -> dict[str, Any]:
    """The evaluation transform in words that two versions can compare."""
    transform = backbone.image_transform(False)
    values = dataclasses.asdict(transform) if dataclasses.is_dataclass(transform) else {"repr": repr(transform)}
    return json.loads(json.dumps({"name": type(transform).__name__, **values}, default=str))


def _pixels(image: Any, max_pixels: int) -> Tensor:
    if isinstance(image, Tensor):
        return image
    try:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        if data[:6] == b"\x93NUMPY":  # stored features
            return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
        return decode.decode(data, max_pixels)
    except (OSError, ValueError, BadSample) as e:
        name = "an image given as bytes" if isinstance(image, bytes) else image
        raise BadInput(f"{name}: cannot be read as an image ({e})") from e


def _read(directory: Path, name: str) -> Any:
    try:
        return json.loads((directory / name).read_text())
    except (OSError, ValueError) as e:
        raise BadInput(f"{directory / name}: cannot be read ({e}). Export the adapter again.") from e
