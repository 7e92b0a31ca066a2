"""A new run that starts from an adapter: one of this package, of HF Trainer with peft, or of ms-swift.

All of them are a directory with peft's `adapter_config.json` and `adapter_model.safetensors`; further files are left
alone. What decides what the adapter computes is compared with the recipe before any weight is taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor

from mmpeft_ds.adapter_files import CONFIG, WEIGHTS, read_json
from mmpeft_ds.backbones.common.tower_loading import first_line
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.distributed.partitioned import gathered
from mmpeft_ds.engine.assembly.saved_adapter import PREFIX, PresentNames, read_tensors, under_present_names
from mmpeft_ds.engine.zero import fingerprint, full_state
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.fit import misfit, shapes
from mmpeft_ds.quiet import without_warnings
from mmpeft_ds.recipe import where
from mmpeft_ds.sites.feature_site import Calibrated, calibrated_buffers

# Starts after which peft has changed the base, so that what trained belongs to no base that is at hand.
CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq", "mica")
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
# Fields that say where an adapter is, which the names of tensors say better, and how it started or trains.
PLACES = {"target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"}
PLACES |= {"modules_to_save", "feedforward_modules", "tower", "towers", "layers"}
NO_MATTER = {"fan_in_fan_out", "megatron_core", "ensure_weight_tying", "progressbar", "runtime_config"}
NO_MATTER |= {"eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config"}
# Of LoRA these are one number a layer, which is compared.
SCALE = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}


def read(resolved: Any, model: PeftModel) -> dict[str, Tensor]:
    """Name of each trained parameter, and of each buffer that a head keeps beside them, -> its float32 value in the
    directory that `start_from` names, on the CPU of rank 0; on the others nothing. Collective.

    Args:
        model: with a fresh adapter, which may be partitioned or on the meta device.

    Raises:
        BadInput: no such adapter, or one that does not fit the recipe, with what both sides say.
    """
    directory, key = Path(resolved.recipe.start_from), where(resolved.recipe, "start_from")
    tensors: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    on_rank0(lambda: tensors.update(_read(directory, key, resolved, model, frozen)))
    _check_frozen(directory, key, model, frozen)
    return tensors


def begin(resolved: Any, model: PeftModel) -> None:
    """Give the fresh adapter of `model` the values in the directory that `start_from` names. Collective.

    Args:
        model: not yet DeepSpeed's, which makes its masters of these values; it may be partitioned.

    Raises:
        BadInput: as `read`; or the directory is of ours, and of another base.
    """
    values = read(resolved, model)
    _check_base(Path(resolved.recipe.start_from), model)
    trainables = _taken(model)
    sizes = {name: zero_state.full_shape(parameter) for name, parameter in trainables.items()}
    nccl = dist.is_initialized() and "nccl" in dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    with torch.no_grad():
        for sent in full_state.from_rank0(sizes, lambda name: [values[name]], dict.fromkeys(sizes, 1), device):
            for name, (value,) in sent.items():
                zero_state.write_parameter(trainables[name], value)


def _check_frozen(directory: Path, key: str, model: PeftModel, saved: dict[str, Tensor]) -> None:
    """Compare frozen weights that peft has written beside an adapter, such as embeddings, with those of the base.
    Collective.

    Args:
        saved: on rank 0, by their names in `model`.

    Raises:
        BadInput: they are others.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    here = {name: parameters[name] for name in on_rank0(lambda: sorted(saved))}

    def compare() -> None:
        trained = set(read_json(directory / CONFIG, dict).get("modules_to_save") or ())
        for name, parameter in here.items():
            # without weights, as in --check, their shapes and what its configuration says
            same = saved[name].shape == parameter.shape
            same = same and (parameter.is_meta or _equal_but_for_rounding(parameter, saved[name]))
            if not same or name.split(".")[-2] in trained:
                raise BadInput(
                    f"{key}: {directory / WEIGHTS}: {name.removeprefix(PREFIX)} does not train here and has other "
                    "values there. Name it in method.modules_to_save, or take the base that the adapter was made of."
                )

    with gathered(list(here.values())):
        on_rank0(compare)


def _equal_but_for_rounding(here: Tensor, there: Tensor) -> bool:
    """Whether one of two copies of a weight is the other, stored in a type of fewer digits."""
    there = there.to(here.device)
    return torch.equal(there.to(here.dtype), here) or torch.equal(there, here.to(there.dtype))


def _check_base(directory: Path, model: PeftModel) -> None:
    """Compare the frozen weights with the fingerprint in an adapter directory of ours; others have none. Collective.
    Raises BadInput."""
    path = directory / "base_fingerprint.json"
    saved = on_rank0(lambda: read_json(path, dict) if path.is_file() else None)
    if saved is not None:
        prints = fingerprint.frozen_fingerprint(fingerprint.frozen_tensors(model))
        fingerprint.compare(saved, prints, str(directory), missing_ok=True, otherwise="")


def _read(directory: Path, key: str, resolved: Any, model: PeftModel, frozen: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is trained, on rank 0; frozen weights of the base that the file holds besides go into `frozen`."""
    _check_files(directory, key)
    _check_config(directory, key, model)
    taken = _taken(model)
    _check_labels(directory, key, resolved, taken)
    of_adapter = taken | calibrated_buffers(model)
    trained = {name: torch.empty(zero_state.full_shape(p), device="meta") for name, p in of_adapter.items()}
    written = resolved.method.file_tensors(model, trained)
    names = {name: inside for name, (inside, _) in written.items()}
    here = {name: tensor for name, (_, tensor) in written.items()}
    path = directory / WEIGHTS
    read = read_tensors(path)
    frozen |= {name: read.pop(name) for name in _frozen(model).keys() & read.keys() - names.keys()}
    tensors = under_present_names(read, names, PresentNames(model.get_base_model()), path)
    if problem := misfit(shapes(tensors), shapes(here)):
        raise BadInput(
            f"{key}: {path} does not fit this recipe: {problem}. Set the places and ranks of `method` as "
            f"{CONFIG} there has them, or name another directory."
        )
    whole = sorted(n for n, tensor in tensors.items() if names[n] in taken and not tensor.is_floating_point())
    if whole:
        raise BadInput(
            f"{key}: {path}: {whole[0]} holds {tensors[whole[0]].dtype}, not floats. Name another directory."
        )
    brought = [name for name in tensors if names[name] not in trained]
    if other := [n for n in brought if not (here[n].is_meta or torch.equal(tensors[n].to(here[n]), here[n]))]:
        raise BadInput(
            f"{key}: {path}: {other[0]} does not train, and has other values here. Set the seeds of `method` as "
            f"{CONFIG} there has them."
        )
    return {names[name]: tensor.float() for name, tensor in tensors.items() if names[name] in taken}


def _frozen(model: PeftModel) -> dict[str, Tensor]:
    """Input and output embeddings that do not train, which peft writes beside an adapter where its
    `save_embedding_layers` says so or an adapter is on them; by their names in `model`."""
    base, ids = model.get_base_model(), set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # models without, or with several
            ids |= {id(parameter) for parameter in getattr(base, getter)().parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if id(p) in ids and not p.requires_grad}


def _taken(model: PeftModel) -> dict[str, Tensor]:
    """Name -> tensor, for the tensors that a run reads from the directory: all that trains, and buffers of heads that
    are not computed again."""
    anew = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Calibrated)
        for name in module.found_anew
    }
    kept = {name: buffer for name, buffer in calibrated_buffers(model).items() if name not in anew}
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | kept


def _check_labels(directory: Path, key: str, resolved: Any, taken: dict[str, Tensor]) -> None:
    """Raise BadInput where a head has a row for each class, and those of the directory are in another order.

    Another number of classes shows in the shapes.
    """
    path, labels = directory / "labels.json", resolved.labels
    saved = read_json(path, (list, NoneType)) if path.is_file() else None
    if not saved or not labels or saved == labels or len(saved) != len(labels):
        return
    method, heads = resolved.method, resolved.method_options.scores_features
    for name, tensor in taken.items():
        shape = zero_state.full_shape(tensor)
        shared = method.reads_names and len(shape) < 3
        if (heads or method.kind(name) == "head") and len(labels) in shape and not shared:
            n = next(i for i, pair in enumerate(zip(saved, labels, strict=True)) if len(set(pair)) > 1)
            raise BadInput(
                f"{key}: {path}: class {n} is {saved[n]!r}, and {labels[n]!r} in the data of this recipe, so that "
                "rows of the head would stand for other classes. Prepare the data with its classes in the same order."
            )


def _check_files(directory: Path, key: str) -> None:
    """Raise BadInput where this is no adapter directory with weights as safetensors."""
    if (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file():
        return
    inner = [p.parent for pattern in ("adapter", "checkpoint-*") for p in directory.glob(f"{pattern}/{CONFIG}")]
    if inner:
        raise BadInput(f"{key}: {directory} holds no adapter itself. Did you mean {max(inner, key=str)}?")
    if (directory / "adapter_model.bin").is_file():
        raise BadInput(
            f"{key}: {directory}/adapter_model.bin is a pickle, which can run code and is not read. Load the adapter "
            "with peft where it was made, and save it with save_pretrained, which writes safetensors."
        )
    absent = next(name for name in (CONFIG, WEIGHTS) if not (directory / name).is_file())
    raise BadInput(f"{key}: {directory}: no adapter directory, {absent} is missing. Name one that peft wrote.")


def _check_config(directory: Path, key: str, model: PeftModel) -> None:
    """Raise BadInput where the adapter is of another type, or computes something else from equal tensors."""
    ours, path = model.active_peft_config, directory / CONFIG
    named = read_json(path, dict).get("peft_type")
    if named != ours.peft_type:
        raise BadInput(
            f"{key}: {path}: peft_type is {named!r}, and {str(ours.peft_type.value)!r} is that of method. Choose the "
            "method of that type."
        )
    try:
        with without_warnings():  # of fields of other releases
            theirs = type(ours).from_pretrained(str(directory))
    except (BadInput, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{key}: {path}: cannot be read ({first_line(error)}). Name another directory.") from error
    start = str(vars(theirs).get("init_lora_weights"))
    if start.startswith(CHANGED_BASE):
        raise BadInput(
            f"{key}: {path}: init_lora_weights: {start} has changed the base in peft, and the adapter fits no other. "
            "Save it there with path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )
    if "begun_by" in vars(ours) or vars(ours).get("init_lora_weights", True) not in PLAIN_STARTS:
        raise BadInput(f"{key}: gives the factors, and method.init_lora_weights would as well. Leave one of them out.")
    lora = isinstance(ours, LoraConfig)
    if lora:
        try:
            _check_scales(key, path, model, theirs)
        except (TypeError, AttributeError, ZeroDivisionError, re.error) as error:
            raise BadInput(f"{key}: {path}: ranks and scales cannot be read ({first_line(error)}).") from error
    skipped = {f.name for f in dataclasses.fields(PeftConfig)} | PLACES | NO_MATTER | (SCALE if lora else set())
    for field in dataclasses.fields(ours):
        if field.name in skipped or field.name.startswith("init_") or "dropout" in field.name:
            continue
        there, here = (_plain(vars(config).get(field.name)) for config in (theirs, ours))
        if (there or None) != (here or None):
            raise BadInput(
                f"{key}: {path}: {field.name} is {there!r}, and {here!r} in this recipe. Set both to the same."
            )


def _plain(value: Any) -> Any:
    """The value of a field as JSON has it, so that what was read can be compared with what a recipe made."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, set):
        return sorted(value, key=str)
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _check_scales(key: str, path: Path, model: PeftModel, theirs: LoraConfig) -> None:
    """Raise BadInput where LoRA's term has another factor there than here."""
    name, form = model.active_adapter, ", use_rslora" if theirs.use_rslora else ""
    for layer_path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or name not in layer.scaling:
            continue
        short = layer_path.removeprefix(PREFIX)
        r = _of_pattern(theirs.rank_pattern, short, theirs.r)
        alpha = _of_pattern(theirs.alpha_pattern, short, theirs.lora_alpha)
        there, here = alpha / (r**0.5 if theirs.use_rslora else r), layer.scaling[name]
        if not abs(there - here) <= 1e-6 * max(abs(there), abs(here)):  # also where one is no number
            raise BadInput(
                f"{key}: {path}: the term of {short} is scaled by {there:g} (lora_alpha {alpha}, r {r}{form}), and by "
                f"{here:g} in this recipe. Set lora_alpha, r and use_rslora of `method` as there."
            )


def _of_pattern(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of a layer in `rank_pattern` or `alpha_pattern`, as peft finds it."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(pattern.keys(), path), default)
