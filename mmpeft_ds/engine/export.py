"""Export of a trained model as an adapter directory; adapter.py lists its files and loads it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from mmpeft_ds import recipe as recipes
from mmpeft_ds import redaction
from mmpeft_ds.adapter_files import CONFIG, WEIGHTS, write_checksums
from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.distributed.collectives import on_rank0, rank
from mmpeft_ds.distributed.own_process import give_back_freed
from mmpeft_ds.distributed.partitioned import gathered
from mmpeft_ds.engine.assembly.saved_adapter import name_for_peft
from mmpeft_ds.engine.checkpoint import Held
from mmpeft_ds.engine.model_card import model_card
from mmpeft_ds.engine.zero import fingerprint, full_state
from mmpeft_ds.files import new_directory, save_tensors, write_json
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.sites.base import base_layer
from mmpeft_ds.sites.feature_site import calibrated_buffers


def export_adapter(directory: str | Path, model: Any, resolved: Any, metrics: dict[str, Any]) -> Path:
    """Write the adapter directory, which replaces an existing one as a whole. Collective.

    Only trained parameters are gathered. The weights are read back and compared before the directory gets its name.

    Args:
        model: the PeftModel, or the DeepSpeed engine around it.
        resolved: the resolved recipe (`engine.assembly.resolve.Resolved`).
        metrics: for the model card, JSON-able.

    Raises:
        RuntimeError: if what peft wrote is not exactly what was trained.
    """
    engine = model if hasattr(model, "zero_optimization_stage") else None
    peft_model: PeftModel = model if engine is None else model.module
    trained = trained_tensors(peft_model, engine)
    for name, buffer in calibrated_buffers(peft_model).items():
        trained[name] = buffer.detach().cpu().clone() if rank() == 0 else None
    give_back_freed()  # of the steps, since the fingerprint reads weights that no step has read
    fingerprints = fingerprint.frozen_fingerprint(fingerprint.frozen_tensors(peft_model))
    directory = Path(directory)
    plain = _plain_classifier(peft_model)
    return on_rank0(lambda: _write(directory, peft_model, trained, plain, fingerprints, resolved, metrics))


def trained_tensors(model: PeftModel, engine: Any = None) -> dict[str, Tensor | None]:
    """Name -> the whole float32 value of each trained parameter, None on all ranks but 0. Collective.

    Raises:
        RuntimeError: if what DeepSpeed gives as a parameter is not what the next forward uses.
    """
    trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if engine is None:
        return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in trainables.items()}
    held = Held.of(engine, trainables)
    full = full_state.on_rank0(engine, trainables, [full_state.WEIGHT])[full_state.WEIGHT]
    on_rank0(lambda: held.check_weights(full, "exported adapter"))
    return full if rank() == 0 else dict.fromkeys(trainables)


def _write(
    directory: Path,
    model: PeftModel,
    trained: dict[str, Tensor],
    plain: dict[str, Tensor],
    fingerprints: dict[str, str],
    resolved: Any,
    metrics: dict[str, Any],
) -> Path:
    with new_directory(directory, replace=True) as partial:
        _fill(partial, directory, model, trained, plain, fingerprints, resolved, metrics)
    return directory


def _fill(
    partial: Path,
    directory: Path,
    model: PeftModel,
    trained: dict[str, Tensor],
    plain: dict[str, Tensor],
    fingerprints: dict[str, str],
    resolved: Any,
    metrics: dict[str, Any],
) -> None:
    saved = resolved.method.saved_tensors(model, trained)
    # Give peft whole tensors, so that it does not look at the shards. `auto` would ask the hub about embeddings.
    model.save_pretrained(str(partial), state_dict=dict(saved), save_embedding_layers=False)
    name_for_peft(model, partial / WEIGHTS)
    _verify(partial / WEIGHTS, saved)
    config = json.loads((partial / CONFIG).read_text("utf-8"))
    if os.path.isabs(config.get("base_model_name_or_path") or ""):
        config["base_model_name_or_path"] = None  # for another value peft warns that the base was renamed
    write_json(partial / CONFIG, redaction.named(config) | resolved.method.saved_fields(resolved.method_config))
    type(resolved.method_config).from_pretrained(str(partial))  # raises where peft would not read its own file again
    recipe, backbone = resolved.recipe, resolved.backbone
    config = model.get_base_model().config
    name, options = recipe.backbone["name"], {k: v for k, v in recipe.backbone.items() if k != "name"}
    contents = {
        "backbone.json": {
            "name": name,
            "options": redaction.portable(options, directory),
            "dtype": recipe.engine.dtype,
            "config": redaction.named(config.to_dict()),
        },
        "labels.json": resolved.labels,
        "image_transform.json": transform_description(backbone),
        "feature_statistics.json": resolved.statistics,
        "base_fingerprint.json": fingerprints,
        "metrics.json": metrics,
    }
    for file, value in contents.items():
        write_json(partial / file, value)
    if backbone.reads_bank:
        _features_files(partial, directory, model, plain, backbone)
    yaml = recipes.to_yaml(recipe, lambda key, value: _without_places(key, value, directory))
    (partial / "recipe.yaml").write_text(yaml, "utf-8")
    (partial / "README.md").write_text(model_card(resolved, metrics, trained), "utf-8")
    write_checksums(partial)


def _without_places(section: str, value: Any, directory: Path) -> Any:
    """A section of the recipe for an adapter directory: the base can be found again, all else is a name."""
    return redaction.portable(value, directory) if section == "backbone" else redaction.named(value)


def _plain_classifier(model: PeftModel) -> dict[str, Tensor]:
    """Tensors that the head exports as a plain classifier, on the CPU; empty for any other model. Collective."""
    head = head_of(model)
    if head is None:
        return {}
    with gathered(list(head.parameters())), torch.no_grad():
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in head.export().items()}


def _features_files(partial: Path, directory: Path, model: PeftModel, plain: dict[str, Tensor], backbone: Any) -> None:
    """Write the further files of a feature model: its bank, its towers, and a plain classifier if the head has one."""
    bank = base_layer(model.get_base_model().features).bank
    save_tensors(partial / "bank.safetensors", {n: getattr(bank, n).cpu().contiguous() for n in bank.NAMES})
    write_json(partial / "towers.json", redaction.portable(backbone.towers, directory))
    if plain:
        save_tensors(partial / "classifier.safetensors", plain)


def _verify(path: Path, trained: dict[str, Tensor]) -> None:
    """Check that the file holds what was trained: the same number of tensors, shapes and bits, and none is empty."""

    def census(tensors: dict[str, Tensor]) -> Counter:
        return Counter((tuple(t.shape), fingerprint.weighted_bits(t.reshape(-1))) for t in tensors.values())

    written = load_file(path)
    empty = [name for name, tensor in written.items() if tensor.numel() == 0]
    if empty or census(written) != census(trained):
        raise RuntimeError(
            f"{path}: peft wrote {len(written)} tensors ({len(empty)} of them empty) for {len(trained)} trained "
            f"parameters, and they are not the same; trained: {', '.join(sorted(trained)[:3])} ..."
        )


def transform_description(backbone: BackboneBase) -> dict[str, Any]:
    """The evaluation transform as plain values, which another version can compare with its own."""
    transform = backbone.image_transform(False)
    values = dataclasses.asdict(transform) if dataclasses.is_dataclass(transform) else {"repr": repr(transform)}
    return json.loads(json.dumps({"name": type(transform).__name__, **values}, default=str))
