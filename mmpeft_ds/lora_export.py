"""Adapters written as plain LoRA: for stock peft without this package, and for servers that know LoRA alone.

adapter_config.json             LORA, the full path of every module, scale 1 everywhere
adapter_model.safetensors       lora_A and lora_B of every module, and the modules that were trained in full
exported.json                   its origin, and the difference of its outputs from those of the adapter
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from mmpeft_ds import adapter, merging, methods
from mmpeft_ds.adapter_files import CONFIG, WEIGHTS
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import new_directory, write_json

INSIDE = "base_model.model."  # where a PeftModel holds its base


def export(directory: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the adapter of an adapter directory as a LoRA directory of peft.

    Args:
        out: a new directory.

    Returns:
        contents of exported.json: `method`, `modules`, `ranks` (smallest and largest), `whole_modules` (those that
        were trained in full), `largest_difference` (of the outputs of stock peft with the written files, relative to
        the largest), `base_class`.

    Raises:
        BadInput: no such adapter, `out` exists, the method has no such form, or the outputs differ. Nothing is left
            under `out`.
    """
    section, method, config = merging.opened(directory, out)
    if reason := method.no_lora(config):
        raise BadInput(f"{directory}: method {section.name} cannot be written as a LoRA: {reason}")
    loaded = adapter.load(directory, pictures=True, weights="dequantised")
    model, backbone = loaded.model.float().eval(), loaded.backbone
    batch = merging.probe(backbone)
    adapted = merging.outputs(model, backbone, batch)
    with new_directory(Path(out)) as partial:
        report = {"method": section.name, "adapter": Path(directory).name, **write(model, partial)}
        stock = load(bare(model), partial)
        report["largest_difference"] = merging.difference(adapted, merging.outputs(stock, backbone, batch))
        if report["largest_difference"] > merging.TOLERANCE:
            raise BadInput(
                f"{directory}: method {section.name} cannot be written as a LoRA: outputs would differ by "
                f"{report['largest_difference']:.1e} of the largest. Keep it as an adapter."
            )
        write_json(partial / "exported.json", report)
    return report


def write(model: PeftModel, folder: Path) -> dict[str, Any]:
    """Write the active adapter of `model` into an existing folder, as files of a LoRA.

    Returns:
        `modules`, `ranks`, `whole_modules` and `base_class`, as `export`.

    Raises:
        BadInput: the adapter has no such form.
    """
    name = model.active_adapter
    given = model.peft_config[name]
    method = methods.of(given)
    if reason := method.no_lora(given):
        raise BadInput(f"adapter {name!r} cannot be written as a LoRA: {reason}")
    pairs = method.lora_pairs(model, name)
    ranks = {path.removeprefix(INSIDE): len(down) for path, (down, _) in pairs.items()}
    wholes = {
        path: module.modules_to_save[name]
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save
    }
    most = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != most}
    config = LoraConfig(
        task_type=given.task_type,
        base_model_name_or_path=given.base_model_name_or_path,
        inference_mode=True,
        r=most,
        lora_alpha=most,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=others,
        fan_in_fan_out=any(_stored_in_by_out(model.get_submodule(path)) for path in pairs),
        modules_to_save=[path.removeprefix(INSIDE) for path in wholes] or None,
    )
    tensors = {f"{path}.lora_A.weight": down for path, (down, _) in pairs.items()}
    tensors |= {f"{path}.lora_B.weight": up for path, (_, up) in pairs.items()}
    for path, module in wholes.items():
        tensors |= {f"{path}.{key}": tensor for key, tensor in module.state_dict().items()}
    # a list in the file, whose order is the same at every export
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    plain = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    base = merging.stock(type(model.get_base_model()))
    return {
        "modules": len(ranks),
        "ranks": [min(ranks.values()), most],
        "whole_modules": config.modules_to_save or [],
        "base_class": f"{base.__module__}.{base.__qualname__}",
    }


def bare(model: PeftModel) -> PreTrainedModel:
    """The frozen model, without the adapter and with the modules that it had before; `model` is used up."""
    base = model.get_base_model()
    for path, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            merging.put(base, path, module.original_module)
    return model.unload()


def load(base: PreTrainedModel, folder: Path) -> PeftModel:
    """`base` with the LoRA of a folder, loaded by peft. Raises BadInput where the files do not fit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(base, str(folder)).eval()
        except (RuntimeError, ValueError, Warning) as error:
            raise BadInput(
                f"{folder / CONFIG}: peft cannot load it ({' '.join(str(error).split())[:200]})."
            ) from error


def _stored_in_by_out(layer: nn.Module) -> bool:
    return type(layer.get_base_layer()).__name__ == "Conv1D"
