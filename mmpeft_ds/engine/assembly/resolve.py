"""From a recipe to its parts: backbone, method, tasks and manifests, with every impossible combination refused.

Nothing big is loaded: configurations, manifests and a model on the meta device.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from mmpeft_ds import backbones, methods, registry, tasks
from mmpeft_ds.backbones.base import BackboneBase, model_hooks
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.data.subset import Subset
from mmpeft_ds.data.transform import hooks_of
from mmpeft_ds.engine.assembly import feature_bank
from mmpeft_ds.engine.assembly.checks import (
    check_coupling,
    check_fields,
    check_names,
    check_records,
    check_texts,
    check_validation,
    check_values,
    picture_notes,
)
from mmpeft_ds.engine.zero.config import check_ds_config
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import Method
from mmpeft_ds.methods.common.tuner import to_float32
from mmpeft_ds.recipe import Origin, Recipe, typed, where
from mmpeft_ds.sites import find_sites
from mmpeft_ds.tasks.base import TaskBase


@dataclass
class ResolvedSource:
    """One data set of the recipe: its options, what its manifest says, the task asked of it, and which samples."""

    options: SourceOptions
    manifest: Manifest
    task: TaskBase
    subset: Subset | None = None

    @property
    def samples(self) -> int:
        """How many samples of the split are used."""
        return self.manifest.samples(self.options.split) if self.subset is None else len(self.subset)


def titles(sources: list[ResolvedSource]) -> list[str]:
    """A name for each source, `NAME-SPLIT`; where several share a split, with the task, and if need be a number."""
    plain = [f"{s.manifest.name}-{s.options.split}" for s in sources]
    tasks = [f"{p}-{s.options.task['name']}" if plain.count(p) > 1 else p for p, s in zip(plain, sources, strict=True)]
    return [f"{t}-{tasks[:i].count(t)}" if tasks.count(t) > 1 else t for i, t in enumerate(tasks)]


@dataclass
class Resolved:
    """All parts of a recipe, checked against each other.

    Attributes:
        recipe: as given, with the components' defaults filled in.
        ds_config: the ds_configs JSON.
        labels: the closed answer list that the head covers, or None.
        statistics: feature statistics of the first train source for the backbone's condition, or None.
        notes: lines that the user should read before training: what works, but may not be meant.
    """

    recipe: Recipe
    ds_config: dict[str, Any]
    backbone: BackboneBase
    method: Method
    method_config: PeftConfig
    train: list[ResolvedSource]
    validation: list[ResolvedSource]
    labels: list[str] | None
    statistics: dict[str, Any] | None
    notes: list[str] = dataclasses.field(default_factory=list)


def resolve(recipe: Recipe) -> Resolved:
    """Load the parts of `recipe` and refuse what cannot work.

    Raises:
        BadInput: one line: what, where, how to mend it.
    """
    check_values(recipe)
    ds_config = check_ds_config(recipe)
    recipe = expand(recipe)
    method, method_config = make_method(recipe)
    check_validation(recipe, method_config)
    listed = {
        "train": list(_keyed("data.sources", recipe.data.sources)),
        "validation": list(_keyed("data.validation", recipe.data.validation)),
    }
    if not listed["train"]:
        raise BadInput(f"{where(recipe, 'data.sources')}: empty. Name a prepared data set: [{{dir: data/easy-vqa}}].")
    manifests = {key: load_manifest(recipe, key, o) for role in listed.values() for key, o in role}
    check_names(recipe, [(key, o, manifests[key]) for role in listed.values() for key, o in role])
    for key, options in (entry for role in listed.values() for entry in role):
        check_records(recipe, key, options, manifests[key])
    subsets = {}
    for key, options in (entry for role in listed.values() for entry in role):
        with _named(recipe, f"{key}.subset"):
            subsets[key] = Subset.load(options.subset, manifests[key], options.split) if options.subset else None
    labels = union_of_labels([manifests[key] for key, _ in listed["train"]])
    backbone = make_backbone(recipe, labels, feature_bank.towers_of(list(manifests.values())))
    statistics = feature_statistics(recipe, backbone, manifests[listed["train"][0][0]])
    if statistics is not None:
        backbone.use_statistics(statistics)

    def finish(key: str, options: SourceOptions) -> ResolvedSource:
        task = make_task(recipe, key, options, labels)
        check_fields(recipe, key, options, manifests[key], task)
        check_texts(recipe, key, options, method_config)
        subset = subsets[key]
        with _named(recipe, key):
            task.use_source(manifests[key].labels, subset.classes if subset else None)
        return ResolvedSource(options, manifests[key], task, subset)

    sources = {role: [finish(key, options) for key, options in entries] for role, entries in listed.items()}
    check_coupling(recipe, [s.task for s in sources["train"]], method_config)
    if backbone.reads_bank:
        wanted = feature_bank.needed(method, method_config)
        backbone.use_bank(feature_bank.shapes(sources["train"], labels, wanted))
    check_sites(recipe, backbone, method, method_config)
    takes_features = hooks_of(backbone.image_transform(False)).takes_features
    notes = [
        line
        for entries in listed.values()
        for key, o in entries
        for line in picture_notes(key, o, manifests[key], backbone.modalities, takes_features)
    ]
    return Resolved(
        recipe=recipe,
        ds_config=ds_config,
        backbone=backbone,
        method=method,
        method_config=method_config,
        train=sources["train"],
        validation=sources["validation"],
        labels=labels,
        statistics=statistics,
        notes=notes,
    )


def expand(recipe: Recipe) -> Recipe:
    """The recipe with the sections of its components typed and their defaults filled in. Raises BadInput."""
    full = copy.deepcopy(recipe)
    origin = recipe.origin
    full.origin = origin
    entry, options = _component(backbones, recipe.backbone, "backbone", origin)
    full.backbone = {"name": recipe.backbone["name"], **dataclasses.asdict(options)}
    for role in ("sources", "validation"):
        for key, source in _keyed(f"data.{role}", getattr(full.data, role)):
            entry, options = _component(tasks, source.task, f"{key}.task", origin)
            source.task = {"name": source.task["name"], **dataclasses.asdict(options)}
    _, config = make_method(recipe)
    full.method = {"name": recipe.method["name"], **_plain_fields(config)}
    return full


def make_backbone(recipe: Recipe, labels: list[str] | None, towers: dict[str, Any] | None = None) -> BackboneBase:
    """The backbone entry of the recipe, checked but not built; `use_statistics` or `use_bank` may have to follow.

    Args:
        towers: what the manifest says of stored features.
    """
    entry, options = _component(backbones, recipe.backbone, "backbone", recipe.origin)
    backbone = entry(options, labels)
    if section := backbone.encoder_section:
        inner, inner_options = _component(backbones, section, "backbone.encoder", recipe.origin)
        encoder = inner(inner_options, None)
        with _named(recipe, "backbone.encoder"):
            encoder.check()
            backbone.use_encoder(encoder)
    if towers:
        with _named(recipe):
            backbone.use_features(towers)
    backbone.attention = recipe.engine.attention
    backbone.dtype = getattr(torch, recipe.engine.dtype)
    backbone.train_dropout = recipe.engine.train_dropout
    with _named(recipe):
        backbone.check()
    return backbone


def make_task(recipe: Recipe, key: str, options: SourceOptions, labels: list[str] | None) -> TaskBase:
    """The task of the source that stands at `key` of the recipe."""
    entry, task_options = _component(tasks, options.task, f"{key}.task", recipe.origin)
    return entry(task_options, labels)


def make_method(recipe: Recipe) -> tuple[Method, PeftConfig]:
    """The method entry and its config, with the fields that the recipe gives."""
    entry = _entry(methods, recipe.method, "method", recipe.origin)
    given = {k: v for k, v in recipe.method.items() if k != "name"}
    return entry, typed(entry.Config, given, "method", recipe.origin, _own_fields(entry.Config))


def attach(resolved: Resolved, base_model: PreTrainedModel) -> PeftModel:
    """`base_model` with the method's layers in it; everything else is frozen, the head is a trained copy."""
    sites = find_sites(base_model)
    config = resolved.method.prepare(copy.deepcopy(resolved.method_config), base_model, sites)
    heads = float32_heads(base_model)
    if heads:
        config.modules_to_save = sorted({*(getattr(config, "modules_to_save", None) or []), *heads})
    with warnings.catch_warnings():
        # peft asks transformers by a name that transformers has since deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return peft.get_peft_model(base_model, config)


def float32_heads(base_model: PreTrainedModel) -> list[str]:
    """Paths of the modules that train whole; in a half precision base they become float32 and cast what they get.

    Before the adapter is attached or loaded: peft copies the module with its dtype and loads weights into that dtype.
    """
    heads = list(model_hooks(base_model).head_modules)
    for path in heads:
        head = base_model.get_submodule(path)
        if any(p.dtype in (torch.float16, torch.bfloat16) and not hasattr(p, "ds_id") for p in head.parameters()):
            head.float()
            head.register_forward_pre_hook(to_float32)
    return heads


def check_sites(recipe: Recipe, backbone: BackboneBase, method: Method, config: PeftConfig) -> None:
    """Run the method's own checks on the model without storage. Raises BadInput."""
    with _named(recipe, "method"):
        method.check(config, find_sites(backbone.build(on_meta=True)), backbone.condition_width)


def load_manifest(recipe: Recipe, key: str, options: SourceOptions) -> Manifest:
    """The manifest of a source, which must have the split. Raises BadInput."""
    with _named(recipe, key):
        if options.dir.startswith("pipe:") and not recipe.data.allow_pipe:
            raise BadInput("pipe: runs a shell command and is refused. Set data.allow_pipe: true if you trust it.")
        manifest = Manifest.load(options.dir)
        manifest.shards(options.split)
    return manifest


def union_of_labels(manifests: list[Manifest]) -> list[str] | None:
    """Closed list that the head covers: the labels of all train sets, each once, in order of appearance.

    Also where a subset leaves classes out: what was trained on some can then be asked about the others.
    """
    merged: dict[str, None] = {}
    for manifest in manifests:
        merged.update(dict.fromkeys(manifest.labels or []))
    return list(merged) or None


def feature_statistics(recipe: Recipe, backbone: BackboneBase, manifest: Manifest) -> dict[str, Any] | None:
    """Mean and deviation that the backbone's condition is scaled with, from the manifest; None if it wants none."""
    if not backbone.wants_statistics:
        return None
    key = backbone.statistics_key()
    if key not in manifest.statistics:
        others = len(manifest.statistics)
        changed = (
            f"It has {others} of other weights or transforms: if this recipe had its own before, the files of the "
            "frozen vision tower are no longer those they were computed with; restore them. Otherwise run: "
        )
        raise BadInput(
            f"{manifest.dir}/manifest.json: no feature statistics (key {key}) for the vision weights and the image "
            f"transform of {recipe.origin.path}. {changed if others else 'Run: '}"
            f"python data_prep/feature_stats.py {manifest.dir} --recipe {recipe.origin.path}"
        )
    return manifest.statistics[key]


def _own_fields(config: type[PeftConfig]) -> list[dataclasses.Field]:
    """Fields of a method; those of every peft config (base model, versions) are filled by peft."""
    internal = {f.name for f in dataclasses.fields(PeftConfig)}
    return [f for f in dataclasses.fields(config) if f.name not in internal]


def _plain_fields(config: PeftConfig) -> dict[str, Any]:
    """What a recipe can say of a config: fields that are set to numbers, words, or lists of them."""
    values = {f.name: getattr(config, f.name) for f in _own_fields(type(config))}
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
    return {k: v for k, v in values.items() if isinstance(v, bool | int | float | str | list)}


def _entry(package: ModuleType, section: dict[str, Any], key: str, origin: Origin) -> Any:
    name = section.get("name")
    if not isinstance(name, str):
        known = ", ".join(registry.names(package))
        raise BadInput(f"{origin(key)}: `name` is missing or no text. Add `name:` with one of {known}.")
    return registry.load(package, name, origin(f"{key}.name"))


def _component(package: ModuleType, section: dict[str, Any], key: str, origin: Origin) -> tuple[Any, Any]:
    """An entry and its typed options."""
    entry = _entry(package, section, key, origin)
    return entry, typed(entry.Options, {k: v for k, v in section.items() if k != "name"}, key, origin)


@contextlib.contextmanager
def _named(recipe: Recipe, key: str = "") -> Iterator[None]:
    """Errors of a component also say which file and key of the recipe they are about."""
    try:
        yield
    except BadInput as e:
        raise BadInput(f"{where(recipe, key)}: {e}") from e


def _keyed(key: str, sources: list[SourceOptions]) -> Iterator[tuple[str, SourceOptions]]:
    return ((f"{key}.{i}", source) for i, source in enumerate(sources))
