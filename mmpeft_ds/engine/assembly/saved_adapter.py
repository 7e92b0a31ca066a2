"""Attaching of a saved adapter, whose files are compared with each other and with the model before any is read in."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import logging
import math
from pathlib import Path
from unittest import mock

import peft
from peft import PeftConfig, PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mmpeft_ds.adapter_files import CONFIG, REMEDY, WEIGHTS, read_json
from mmpeft_ds.backbones.common.tower_loading import first_line
from mmpeft_ds.engine.assembly.resolve import make_method
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.brought import shared_names
from mmpeft_ds.methods.common.fit import misfit, shapes
from mmpeft_ds.quiet import without_warnings
from mmpeft_ds.recipe import Section
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.feature_site import Bank, calibrated_buffers

logger = logging.getLogger(__name__)
PREFIX = "base_model.model."  # of every name in a file of peft
# Where peft 0.21 gives the tensors of an adapter other names, as to those of a checkpoint of the base.
RENAMES = "peft.utils.transformers_weight_conversion", "convert_peft_adapter_state_dict_for_transformers"


def attach_saved(directory: Path, base_model: PreTrainedModel, section: Section) -> PeftModel:
    """`base_model` with the adapter of `directory` in it, everything that it trains still trainable.

    Tensors under the names of an older transformers or of a plain state dict are taken, with a warning that says so.

    Args:
        directory: adapter directory.
        base_model: bare; its heads have the dtype that they had in training (`float32_heads`).
        section: the `method` section of the adapter's recipe.

    Raises:
        BadInput: a file cannot be read; the configuration is not that of the recipe; tensors are missing, belong to
            nothing in this model, have another shape, or are not finite.
    """
    rename = PresentNames(base_model)
    config = read_config(directory / CONFIG, base_model, section, rename)
    tensors = read_tensors(directory / WEIGHTS)
    try:
        with without_warnings():
            model = peft.get_peft_model(base_model, config)
    except (BadInput, ValueError, TypeError, RuntimeError) as error:
        raise BadInput(f"{directory / CONFIG}: cannot be attached ({first_line(error)}). {REMEDY}") from error
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad} | calibrated_buffers(model)
    written = section.entry.file_tensors(model, trained)
    names = {name: inside for name, (inside, _) in written.items()}
    here = {name: tensor for name, (_, tensor) in written.items()}
    tensors = under_present_names(tensors, names, rename, directory / WEIGHTS)
    if problem := misfit(shapes(tensors), shapes(here)):
        raise BadInput(f"{directory / WEIGHTS}: does not fit the model: {problem}. {REMEDY}")
    if kind := sorted(n for n, t in tensors.items() if t.is_floating_point() != here[n].is_floating_point()):
        raise BadInput(f"{directory / WEIGHTS}: {kind[0]} holds {tensors[kind[0]].dtype}. {REMEDY}")
    with _names_as_they_are():
        result = peft.set_peft_model_state_dict(model, tensors)
    missing = [name for name in result.missing_keys if name in trained and name not in shared_names(model)]
    if wrong := [*result.unexpected_keys, *missing]:
        raise RuntimeError(f"{directory / WEIGHTS}: peft read {len(wrong)} tensors to other places, first {wrong[0]}")
    return model


def _names_as_they_are() -> contextlib.AbstractContextManager:
    """Context in which peft reads tensors under the names that they have, which are those of this model.

    It finds no place for an adapter of DeepSeek-OCR 2 otherwise, whose checkpoints say `layers` for
    `language_model.layers`. A peft without that function does nothing of the kind.
    """
    place, name = RENAMES
    with contextlib.suppress(ImportError):
        module = importlib.import_module(place)
        if hasattr(module, name):
            return mock.patch.object(module, name, lambda adapter_state_dict, **_: adapter_state_dict)
    return contextlib.nullcontext()


def read_config(path: Path, base_model: PreTrainedModel, section: Section, rename: PresentNames) -> PeftConfig:
    """The peft config in a file, for an adapter that trains. Raises BadInput where it is not that of the recipe."""
    method, of_recipe = make_method(section)
    named = read_json(path, dict).get("peft_type")
    if named != of_recipe.peft_type:
        raise BadInput(
            f"{path}: peft_type is {named!r}, but the recipe beside it says method {section.name}, whose adapters are "
            f"{of_recipe.peft_type.value!r}. {REMEDY}"
        )
    try:
        config = type(of_recipe).from_pretrained(str(path.parent))
    except (BadInput, ValueError, TypeError) as error:
        raise BadInput(
            f"{path}: is no configuration of method {section.name} ({first_line(error)}). {REMEDY}"
        ) from error
    expected = method.prepare(copy.deepcopy(of_recipe), base_model, find_sites(base_model))
    for option, value in method.saved_fields(expected).items():
        setattr(expected, option, value)
    for option in {f.name for f in dataclasses.fields(expected)} - {f.name for f in dataclasses.fields(PeftConfig)}:
        here, there = getattr(config, option), getattr(expected, option)
        # how the weights started says nothing of trained ones
        # (nor does how the base stores its weights: a quantised layer is no Conv1D)
        if stated(here) and stated(there) and here != there and not option.startswith(("init_", "fan_in_")):
            raise BadInput(f"{path}: {option} is {here!r}, but {there!r} in the recipe beside it. {REMEDY}")
    _check_scales(path, config, expected, of_recipe)
    config.inference_mode = False
    modules = {name for name, _ in base_model.named_modules()}
    for option in ("target_modules", "modules_to_save"):
        if isinstance(paths := vars(config).get(option), (list, set)):
            setattr(config, option, type(paths)(rename(p) if rename(p) in modules else p for p in paths))
    return config


def _check_scales(path: Path, config: PeftConfig, expected: PeftConfig, of_recipe: PeftConfig) -> None:
    """Refuse another `alpha_pattern` than that of the recipe, also where one of the two is empty: it scales single
    layers, and no tensor shows it. Raises BadInput."""
    here, there = (vars(c).get("alpha_pattern") or {} for c in (config, expected))
    try:
        if vars(of_recipe).get("init_lora_weights") == "eva" and of_recipe.eva_config.adjust_scaling_factors:
            # The ranks that it has shared out are those of the tensors, or these do not fit; a layer keeps its scale.
            scale = of_recipe.lora_alpha / of_recipe.r
            there = {name: scale * rank for name, rank in (config.rank_pattern or {}).items()}
        same = here.keys() == there.keys() and all(math.isclose(here[name], there[name]) for name in here)
    except (AttributeError, TypeError):  # no mapping of names to numbers
        same = False
    if not same:
        raise BadInput(f"{path}: alpha_pattern is {here!r}, but {there!r} in the recipe beside it. {REMEDY}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises BadInput where it cannot be read, or a number is not finite as the
    float32 that adapters are held in."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({first_line(error)}). {REMEDY}") from error
    if wrong := sorted(name for name, tensor in tensors.items() if not tensor.float().isfinite().all()):
        raise BadInput(f"{path}: {len(wrong)} tensors hold numbers that are not finite, first {wrong[0]}. {REMEDY}")
    return tensors


def read_bank(path: Path) -> dict[str, Tensor]:
    """Class texts and support samples that a head reads, by the names of `Bank`. Raises BadInput."""
    bank = read_tensors(path)
    dimensions = {name: tensor.ndim for name, tensor in bank.items()}
    if dimensions != {name: 1 if name == "support_labels" else 3 for name in Bank.NAMES}:
        raise BadInput(f"{path}: does not hold exactly {', '.join(Bank.NAMES)} in their dimensions. {REMEDY}")
    return bank


class PresentNames:
    """Name of a tensor or module in an older transformers -> its present name, by the table of transformers itself.

    Args:
        base_model: bare.
    """

    def __init__(self, base_model: PreTrainedModel):
        table = get_model_conversion_mapping(base_model, add_legacy=False)
        self._table = [entry for entry in table if isinstance(entry, WeightRenaming)]

    def __call__(self, name: str) -> str:
        for entry in self._table:
            name, _ = entry.rename_source_key(name)
        return name

    def before(self, name: str) -> str:
        """A name that the table leads to a present `name`: itself, or one of a checkpoint where the table changes
        present names too; `name` where there is none."""
        if self(name) == name:
            return name
        older = (entry.reverse_transform().rename_source_key(name)[0] for entry in self._table)
        return next((one for one in older if self(one) == name), name)


def name_for_peft(model: PeftModel, path: Path) -> None:
    """Give tensors of an adapter's file names that peft reads as theirs: it takes those of a file through the table of
    `PresentNames`, which changes present names of DeepSeek-OCR 2 and Unlimited-OCR.

    A file stays as it is where modules are trained in full, which peft looks up under their present names.
    """
    if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
        return
    tensors, rename = load_file(path), PresentNames(model.get_base_model())
    named = {_before(rename, name): tensor for name, tensor in tensors.items()}
    if named.keys() != tensors.keys():
        save_file(named, path, metadata={"format": "pt"})


def _before(rename: PresentNames, name: str) -> str:
    return PREFIX + rename.before(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else name


def under_present_names(
    tensors: dict[str, Tensor], names: dict[str, str], rename: PresentNames, path: Path
) -> dict[str, Tensor]:
    """`tensors` under the names that peft writes now, if they fit after renaming; otherwise as they are.

    Args:
        names: name in a file -> name in the model, of everything that is trained.
    """
    if tensors.keys() == names.keys():
        return tensors
    of_file = {_before(rename, name): name for name in names}
    if tensors.keys() == of_file.keys():
        return {of_file[name]: tensor for name, tensor in tensors.items()}
    written = {inside: name for name, inside in names.items()}

    def with_prefix(name: str) -> str:
        return name if name.startswith(PREFIX) else PREFIX + name

    def of_peft(name: str) -> str:  # a plain state dict has names with the adapter's in them, as the model has
        name = with_prefix(name)
        return written.get(name, name)

    def of_transformers(name: str) -> str:
        return of_peft(PREFIX + rename(name.removeprefix(PREFIX)))

    for kind, renamed in (("a plain state dict", of_peft), ("an older transformers", of_transformers)):
        mapped = {renamed(name): tensor for name, tensor in tensors.items()}
        if mapped.keys() == names.keys() and len(mapped) == len(tensors):
            old = next(name for name in tensors if renamed(name) != name)
            logger.warning("%s: names tensors as %s does; %s is read as %s, and so on", path, kind, old, renamed(old))
            return mapped
    return tensors


def stated(value: object) -> bool:
    """Whether the value of an option can be compared: peft shortens lists of names, and old recipes left out
    mappings."""
    numbers = isinstance(value, list) and all(type(one) is int for one in value)
    return isinstance(value, (bool, int, float, str)) or (bool(value) and (numbers or isinstance(value, dict)))
