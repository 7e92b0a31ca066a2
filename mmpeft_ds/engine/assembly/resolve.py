"""Resolving of recipes into their parts: backbone, method, tasks and manifests; impossible combinations are refused.

Nothing big is loaded: configurations, manifests and a model on the meta device.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.utils import import_utils

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.backbones.common import quantised, text_attention
from mmpeft_ds.backbones.common.model_hooks import model_hooks
from mmpeft_ds.backbones.common.tower_loading import choose_attention
from mmpeft_ds.data.assumed import Assumed, is_assumed
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.data.subset import Subset
from mmpeft_ds.data.transform import hooks_of
from mmpeft_ds.engine.assembly import feature_bank
from mmpeft_ds.engine.assembly.checks import (
    check_contrast,
    check_coupling,
    check_held,
    check_packing,
    picture_notes,
    run_notes,
    stored_notes,
)
from mmpeft_ds.engine.assembly.outline import blamed, outline
from mmpeft_ds.engine.zero.config import check_by_deepspeed, is_shipped
from mmpeft_ds.errors import BadInput
from mmpeft_ds.fitting import chosen
from mmpeft_ds.methods.base import MethodOptions, SiteMethod
from mmpeft_ds.methods.common.products import multiply_in
from mmpeft_ds.methods.common.select import check_named, check_tokens, check_whole_modules
from mmpeft_ds.methods.common.tuner import to_float32
from mmpeft_ds.quiet import without_warnings
from mmpeft_ds.recipe import Recipe, Section, components
from mmpeft_ds.recipe.options import EngineOptions
from mmpeft_ds.recipe.parse import one_line
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
        """Number of samples of the split that are used."""
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
        remarks: the same, about the length of the run and the size of its steps.
    """

    recipe: Recipe
    ds_config: dict[str, Any]
    backbone: BackboneBase
    method: type[SiteMethod]
    method_config: PeftConfig
    train: list[ResolvedSource]
    validation: list[ResolvedSource]
    labels: list[str] | None
    statistics: dict[str, Any] | None
    notes: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)

    @property
    def method_options(self) -> MethodOptions:
        """The method's options for the engine; the defaults for a config of peft itself."""
        return self.method_config if isinstance(self.method_config, MethodOptions) else self.method.Options()

    def print_notes(self, rank: int, of_training: bool = False) -> None:
        """Print the notes, and with `of_training` the remarks, on rank 0."""
        for note in (*self.notes, *(self.remarks if of_training else ())) if rank == 0 else ():
            print(f"note: {note}", flush=True)


def resolve(recipe: Recipe, assumed: Assumed | None = None) -> Resolved:
    """Load the parts of `recipe` and refuse what cannot work.

    Args:
        assumed: what to take for data sets that are not prepared yet; None: they are refused. For sizing only.

    Raises:
        BadInput: one line: what, where, how to mend it.
    """
    plain = outline(recipe, assumed)
    recipe, parts, manifests, subsets = plain.recipe, plain.parts, plain.manifests, plain.subsets
    if not is_shipped(recipe):  # else the build asks DeepSpeed, which takes a second to import
        check_by_deepspeed(recipe, plain.ds_config)
    method, method_config = make_method(parts.method)
    for key, manifest in manifests.items():
        task = parts.tasks[key].options
        if is_assumed(manifest) and not {"questions", "label"} & set(chosen(task.fields, task)):
            manifest.labels = manifest.label_counts = None
    labels = plain.labels()
    towers = feature_bank.towers_of(list(manifests.values()))
    backbone = make_backbone(parts.backbone, recipe.engine, labels, towers, method.observes_attention(method_config))
    statistics = feature_statistics(recipe, backbone, manifests[plain.of("sources")[0]])
    if statistics is not None:
        backbone.use_statistics(statistics)
    sources = {}
    for key, options in plain.sources.items():
        with blamed(recipe, key):
            sources[key] = make_source(parts.tasks[key], options, manifests[key], subsets[key], labels)
            if key in plain.of("validation") and sources[key].task.generation is not None:
                backbone.check_generation(sources[key].task.generation)
    train, validation = ([sources[key] for key in plain.of(role)] for role in ("sources", "validation"))
    check_coupling(recipe, [source.task for source in train], parts.method.options)
    trained_on = [(key, sources[key].task, manifests[key]) for key in plain.of("sources")]
    takes_features = hooks_of(backbone.image_transform(False)).takes_features
    attention = choose_attention(backbone.attention, backbone.dtype)
    check_packing(recipe, backbone, trained_on, method, method_config, takes_features, attention)
    apart = backbone.row_attention and _lets_texts_apart(method, method_config)
    if recipe.data.pack and attention == "sdpa" and apart:
        backbone.attention = backbone.row_attention
    for key, source in zip(plain.of("sources"), train, strict=True):
        check_contrast(recipe, key, source.options, source.task, source.samples)
    if backbone.reads_bank:
        backbone.use_bank(feature_bank.shapes(train, labels, method.bank_parts(method_config)))
        backbone.use_trained_classes(trained_classes(train, labels or []))
    check_sites(parts.method, backbone, method, method_config)
    notes = [
        line
        for key, options in plain.sources.items()
        for line in picture_notes(key, options, manifests[key], backbone.modalities, takes_features)
    ]
    for key, options in plain.sources.items():
        check_held(recipe, key, options, manifests[key], backbone)
    for key, options in plain.sources.items() if takes_features else ():
        notes += stored_notes(recipe, key, options, manifests[key], backbone)
    trained = [(key, sources[key].task, sources[key].samples) for key in plain.of("sources")]
    remarks = run_notes(recipe, trained, not parts.method.options.gradient_free)
    return Resolved(
        recipe=recipe,
        ds_config=plain.ds_config,
        backbone=backbone,
        method=method,
        method_config=method_config,
        train=train,
        validation=validation,
        labels=labels,
        statistics=statistics,
        notes=notes,
        remarks=remarks,
    )


def make_backbone(
    section: Section,
    engine: EngineOptions,
    labels: list[str] | None,
    towers: dict[str, Any] | None = None,
    observed: bool = False,
) -> BackboneBase:
    """The backbone of a recipe, checked but not built; `use_statistics` or `use_bank` may have to follow.

    Args:
        section: `components(recipe).backbone`.
        engine: says its dtype, attention and dropout.
        towers: what the manifest says of stored features.
        observed: whether the method reads queries, keys or scores of attention.
    """
    backbone = section.entry(section.options, labels)
    if inner := section.inner.get("encoder"):
        encoder = inner.entry(inner.options, None)
        with inner.blamed():
            encoder.check()
            backbone.use_encoder(encoder)
    backbone.dtype = getattr(torch, engine.dtype)
    backbone.train_dropout = engine.train_dropout
    try:
        backbone.attention = attention_of(engine.attention, section.name, backbone, observed)
        if towers:
            backbone.use_features(towers)
        backbone.check()
    except BadInput as e:  # which names its options with the section
        raise BadInput(f"{section.origin('')}: {e}") from e
    return backbone


def make_task(section: Section, labels: list[str] | None) -> TaskBase:
    """The task of a data source; `section` is one of `components(recipe).tasks`."""
    return section.entry(section.options, labels)


def make_source(
    task: Section, options: SourceOptions, manifest: Manifest, subset: Subset | None, labels: list[str] | None
) -> ResolvedSource:
    """A data source with its task, which knows the labels of this data set. Raises BadInput."""
    made = make_task(task, labels)
    made.use_source(manifest.labels, subset.classes if subset else None)
    return ResolvedSource(options, manifest, made, subset)


def trained_classes(train: list[ResolvedSource], labels: list[str]) -> list[int]:
    """Indices of the classes that occur in a train source: all that it names, or those of its subset."""
    names: set[str] = set()
    for source in train:
        of_subset = source.subset.classes if source.subset else None
        names |= set(of_subset if of_subset is not None else source.manifest.labels or labels)
    return [index for index, label in enumerate(labels) if label in names]


def make_method(section: Section) -> tuple[type[SiteMethod], PeftConfig]:
    """The method and its peft config; `section` is `components(recipe).method`."""
    return section.entry, section.entry.config(section.options, section.origin)


def attach(resolved: Resolved, base_model: PreTrainedModel) -> PeftModel:
    """`base_model` with the method's layers in it; everything else is frozen, the head is a trained copy."""
    sites = find_sites(base_model)
    config = resolved.method.prepare(copy.deepcopy(resolved.method_config), base_model, sites)
    section = components(resolved.recipe).method
    check_whole_modules(config.modules_to_save, base_model, section.where("modules_to_save"))
    check_float(config.modules_to_save, base_model, section.where("modules_to_save"))
    check_tokens(config, base_model, section.where)
    heads = float32_heads(base_model)
    if heads:
        config.modules_to_save = sorted({*(config.modules_to_save or []), *heads})
    try:
        with without_warnings(), section.blamed():
            model = resolved.method.attach(config, base_model)
    except (ValueError, NotImplementedError) as e:  # of peft, such as a name in target_modules that no module has
        raise BadInput(f"{section.where()}: {one_line(e)}") from e
    if resolved.recipe.engine.adapter_matmul != "float32":
        multiply_in(model, getattr(torch, resolved.recipe.engine.adapter_matmul))
    return model


def check_new(resolved: Resolved, model: PeftModel) -> None:
    """Refuse names in options that fit nothing; runs of earlier versions that have some go on. Raises BadInput."""
    check_named(model.active_peft_config, model, components(resolved.recipe).method.where)


def check_float(names: Collection[str] | None, model: PreTrainedModel, key: str) -> None:
    """Refuse modules to be trained in full that hold quantised weights. Raises BadInput."""
    for path, module in model.named_modules() if names else ():
        if quantised.is_quantised(module) and any(_named(path, name) for name in names):
            raise BadInput(f"{key}: {path} is quantised and cannot be trained. Leave it out, or quantise: none.")


def _named(path: str, name: str) -> bool:
    """Whether the module at `path`, or one around it, is one that peft takes `name` for."""
    parts = path.split(".")
    return any(".".join(parts[:i]).endswith(name) for i in range(1, len(parts) + 1))


def float32_heads(base_model: PreTrainedModel) -> list[str]:
    """Paths of the modules that train in full; in a half precision base they become float32 and cast what they get.

    Before the adapter is attached or loaded: peft copies the module with its dtype and loads weights into that dtype.
    """
    heads = list(model_hooks(base_model).head_modules)
    for path in heads:
        head = base_model.get_submodule(path)
        if any(p.dtype in (torch.float16, torch.bfloat16) and not hasattr(p, "ds_id") for p in head.parameters()):
            head.float()
            head.register_forward_pre_hook(to_float32)
    return heads


def _lets_texts_apart(method: type[SiteMethod], config: PeftConfig) -> bool:
    """Whether packed texts may be attended one by one: the method reads neither scores nor the mask."""
    return not method.observes_attention(config) and method.unpackable(config, text_attention.NAME) is None


def attention_of(wanted: str, name: str, backbone: BackboneBase, observed: bool) -> str:
    """The attention implementation that the backbone loads with; `auto` leaves the choice to transformers.

    Args:
        wanted: `engine.attention`.
        name: of the backbone.
        observed: whether the method reads queries, keys or scores of attention.

    Raises:
        BadInput: `wanted` hides what the method reads, does not compute what this backbone means, or is not installed.
    """
    if wanted == "auto":
        if backbone.attentions:
            return backbone.attentions[0]
        return "sdpa" if observed else "auto"
    if backbone.attentions and wanted not in backbone.attentions:
        raise BadInput(
            f"engine.attention: {wanted!r} does not work with {name}, which takes {', '.join(backbone.attentions)}. "
            "Use auto."
        )
    if observed and wanted not in ("sdpa", "eager"):
        raise BadInput(
            f"engine.attention: {wanted!r} does not show its scores, which the method reads. Use auto, sdpa or eager."
        )
    available = {
        "flash_attention_2": transformers.utils.is_flash_attn_2_available,
        "flash_attention_3": transformers.utils.is_flash_attn_3_available,
        "flash_attention_4": transformers.utils.is_flash_attn_4_available,
        "flex_attention": transformers.utils.is_torch_flex_attn_available,
    }
    if wanted in available and not available[wanted]():
        raise BadInput(f"engine.attention: {wanted!r} is not installed here, or needs another GPU. Use auto or sdpa.")
    if "/" in wanted and not transformers.utils.is_kernels_available():
        oldest, newest = import_utils.KERNELS_MIN_VERSION, import_utils.KERNELS_MAX_VERSION
        raise BadInput(
            f"engine.attention: {wanted!r} is loaded by the package kernels, of which transformers "
            f"{transformers.__version__} asks for >={oldest},<{newest}. Install such a version, or use auto."
        )
    return wanted


def check_sites(section: Section, backbone: BackboneBase, method: type[SiteMethod], config: PeftConfig) -> None:
    """Run the method's own checks on the model without storage. Raises BadInput."""
    with section.blamed():
        check_kinds(backbone, method, config)
        method.check(config, find_sites(backbone.build(on_meta=True)), backbone.condition_width)


def check_kinds(backbone: BackboneBase, method: type[SiteMethod], config: PeftConfig) -> None:
    """Refuse a method that asks which tokens are of an image where no language model reads any. Raises BadInput."""
    if method.reads_kinds(config) and not backbone.publishes_kinds:
        raise BadInput(
            "name: its layers treat tokens of images and of text apart, but this backbone has no language model that "
            "reads both in one sequence. Use backbone mllm or vision_text_decoder, or another method."
        )


def feature_statistics(recipe: Recipe, backbone: BackboneBase, manifest: Manifest) -> dict[str, Any] | None:
    """Mean and deviation that the backbone's condition is scaled with, from the manifest; None if it wants none."""
    if not backbone.wants_statistics:
        return None
    if is_assumed(manifest):
        return {"mean": [0.0] * backbone.statistics_width, "std": [1.0] * backbone.statistics_width, "count": 0}
    key = backbone.statistics_key()
    statistics = manifest.statistics_of(key)
    if statistics is None:
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
    return statistics
