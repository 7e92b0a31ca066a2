"""Checks of recipes that hold for any model: ranges of numbers, and parts that exclude each other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mmpeft_ds import backbones, registry, tasks
from mmpeft_ds.backbones.common.options import QUANTISED
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.data.order import steps_of
from mmpeft_ds.errors import BadInput
from mmpeft_ds.fitting import ByOption, chosen, described, settings
from mmpeft_ds.methods.base import MethodOptions, SiteMethod
from mmpeft_ds.recipe import Recipe, Section, find_file, where
from mmpeft_ds.recipe.options import OptimOptions
from mmpeft_ds.tasks.common.options import TaskOptions

if TYPE_CHECKING:  # what is checked first must not wait for torch
    from peft import PeftConfig

    from mmpeft_ds.backbones.base import BackboneBase
    from mmpeft_ds.tasks.base import TaskBase

FEW_STEPS = 100  # a run by epochs that is shorter is remarked


# Far above anything that has been trained; more than these ends in a lack of memory without a word.
MOST_SLOTS, MOST_PROCESSES, MOST_STEPS = 2**22, 1024, 10**9


def check_values(recipe: Recipe) -> None:
    """Refuse numbers out of range and combinations of plain options that cannot work. Raises BadInput."""
    data, optim = recipe.data, recipe.optim
    for key, holds, rule in _ranges(recipe):
        if not holds:
            raise BadInput(f"{where(recipe, key)}: {rule}, got {_lookup(recipe, key)}.")
    check_groups(recipe)
    if data.global_batch % optim.accumulation:
        raise BadInput(
            f"{where(recipe, 'optim.accumulation')}: {optim.accumulation} does not divide data.global_batch "
            f"{data.global_batch}. Choose a divisor, so that every micro-step has equally many slots."
        )
    if data.pack and optim.accumulation > 1:
        raise BadInput(
            f"{where(recipe, 'optim.accumulation')}: {optim.accumulation}, but with data.pack: {data.pack} a step "
            "takes as many micro-steps as its tokens need. Leave it out."
        )
    check_unread(recipe)
    if recipe.engine.patience and not data.validation:
        raise BadInput(f"{where(recipe, 'engine.patience')}: early stopping needs a source in data.validation.")


def _ranges(recipe: Recipe) -> list[tuple[str, bool, str]]:
    """(key, whether its value is in range, the rule in words) for every number of a recipe that has a range."""
    data, optim, engine, muon = recipe.data, recipe.optim, recipe.engine, recipe.optim.muon
    return [
        ("run_dir", bool(recipe.run_dir.strip()), "must name a directory"),
        ("seed", 0 <= recipe.seed < 2**63, "must lie in [0, 2^63)"),
        ("data.seed", 0 <= (data.seed or 0) < 2**63, "must lie in [0, 2^63)"),
        ("data.global_batch", 1 <= data.global_batch <= MOST_SLOTS, f"must lie in [1, {MOST_SLOTS:,}]"),
        ("data.evaluation_batch", 1 <= data.evaluation_batch <= MOST_SLOTS, f"must lie in [1, {MOST_SLOTS:,}]"),
        ("data.workers", 0 <= data.workers <= MOST_PROCESSES, f"must lie in [0, {MOST_PROCESSES:,}]"),
        ("data.worker_threads", 1 <= data.worker_threads <= MOST_PROCESSES, f"must lie in [1, {MOST_PROCESSES:,}]"),
        ("data.prefetch", 1 <= data.prefetch <= MOST_PROCESSES, f"must lie in [1, {MOST_PROCESSES:,}]"),
        ("data.max_sample_bytes", data.max_sample_bytes >= 1, "must be 1 or more"),
        ("data.pack", data.pack >= 0, "must be 0 (off), or the tokens of a micro-batch"),
        ("data.shuffle_block", data.shuffle_block >= 1, "must be 1 or more"),
        ("data.max_bad_fraction", 0 <= data.max_bad_fraction <= 1, "must lie in [0, 1]"),
        ("data.max_bad_in_a_row", data.max_bad_in_a_row >= 1, "must be 1 or more"),
        ("data.max_pixels", data.max_pixels >= 1, "must be 1 or more"),
        ("optim.momentum", 0 <= optim.momentum < 1, "must lie in [0, 1)"),
        ("optim.warmup_lr", 0 <= optim.warmup_lr < float("inf"), "must be 0 or more"),
        ("optim.lr", 0 < optim.lr < float("inf"), "must be above 0"),
        ("optim.weight_decay", optim.weight_decay >= 0, "must be 0 or more"),
        ("optim.betas", all(0 <= b < 1 for b in optim.betas), "must lie in [0, 1)"),
        ("optim.eps", optim.eps > 0, "must be above 0"),
        ("optim.epochs", 1 <= optim.epochs <= MOST_STEPS, f"must lie in [1, {MOST_STEPS:,}]"),
        ("optim.max_steps", 0 <= optim.max_steps <= MOST_STEPS, f"must be 0 (off), or at most {MOST_STEPS:,}"),
        ("optim.warmup", optim.warmup >= 0, "must be 0 or more (a share below 1, else steps)"),
        ("optim.min_lr_ratio", 0 <= optim.min_lr_ratio <= 1, "must lie in [0, 1]"),
        ("optim.clip", optim.clip >= 0, "must be 0 (off) or more"),
        ("optim.accumulation", optim.accumulation >= 1, "must be 1 or more"),
        ("optim.ewc.strength", 0 <= optim.ewc.strength < float("inf"), "must be 0 or more"),
        ("engine.save_every", engine.save_every >= 0, "must be 0 (at evaluations) or more"),
        ("engine.keep_last", engine.keep_last >= 1, "must be 1 or more"),
        ("engine.eval_every", engine.eval_every >= 0, "must be 0 (every epoch) or more"),
        ("engine.patience", engine.patience >= 0, "must be 0 (never) or more"),
        ("engine.stop_grace", engine.stop_grace > 0, "must be above 0 seconds"),
        ("engine.stall", engine.stall > 0, "must be above 0 seconds"),
        ("engine.timeout", engine.timeout > engine.stall, "must be above engine.stall"),
        ("engine.max_skipped", engine.max_skipped >= 1, "must be 1 or more"),
        ("engine.tower_batch", 0 <= engine.tower_batch <= MOST_SLOTS, "must be 0 (all of a micro-batch) or more"),
        ("engine.threads", 0 <= engine.threads <= MOST_PROCESSES, f"must be 0 (automatic) to {MOST_PROCESSES:,}"),
        (
            "engine.adapter_matmul",
            engine.adapter_matmul in ("float32", engine.dtype),
            f"needs engine.dtype: bfloat16, and the base is {engine.dtype}",
        ),
        ("monitor.every", recipe.monitor.every >= 1, "must be 1 or more"),
        ("monitor.samples", recipe.monitor.samples >= 0, "must be 0 (none) or more"),
        ("optim.muon.momentum", 0 <= muon.momentum < 1, "must lie in [0, 1)"),
        ("optim.muon.ns_steps", 1 <= muon.ns_steps < 100, "must lie in [1, 99]"),
        ("optim.muon.adamw_lr", muon.adamw_lr is None or 0 < muon.adamw_lr < float("inf"), "must be above 0"),
        ("optim.lora_plus", 0 <= optim.lora_plus < float("inf"), "must be 0 (off) or a multiple of optim.lr"),
        *((f"data.sources.{i}.weight", s.weight > 0, "must be above 0") for i, s in enumerate(data.sources)),
    ]


def check_groups(recipe: Recipe) -> None:
    """Refuse parameter groups whose settings cannot work. Raises BadInput."""
    optim = recipe.optim
    for pattern, group in optim.groups.items():
        for name, value in (("lr", group.lr), ("weight_decay", group.weight_decay)):
            if value is not None and not 0 <= value < float("inf"):
                raise BadInput(
                    f"{where(recipe, 'optim.groups')}: {name} of {pattern!r} must be 0 or more, got {value}."
                )
        if group.optimizer is not None and optim.name != "muon":
            raise BadInput(
                f"{where(recipe, 'optim.groups')}: {pattern!r} names an optimizer, which optim.name: {optim.name} "
                "does not read (muon does). Leave it out."
            )


def check_unread(recipe: Recipe) -> None:
    """Refuse settings that the chosen optimiser or schedule does not read. Raises BadInput."""
    optim = recipe.optim
    adam, by_epoch = optim.name != "sgd", optim.schedule == "cosine_epoch"
    unread = [
        ("momentum", adam, f"optim.name: {optim.name} does not read it (sgd does; muon has optim.muon.momentum)"),
        ("betas", not adam, "optim.name: sgd does not read them (adamw, adam and muon do)"),
        ("eps", not adam, "optim.name: sgd does not read it (adamw, adam and muon do)"),
        ("muon", optim.name != "muon", f"optim.name: {optim.name} does not read it (muon does)"),
        ("warmup", by_epoch, "optim.schedule: cosine_epoch does not read it: its first epoch has optim.warmup_lr"),
        ("warmup_lr", not by_epoch, f"optim.schedule: {optim.schedule} does not read it (cosine_epoch does)"),
    ]
    defaults = OptimOptions()
    for name, ignored, why in unread:
        if ignored and getattr(optim, name) != getattr(defaults, name):
            raise BadInput(f"{where(recipe, f'optim.{name}')}: {why}. Leave it out, or choose the one that does.")


def check_quantised(recipe: Recipe, form: str, stage: int) -> None:
    """Refuse a quantised base where it cannot be: at ZeRO stage 3, or without its package. Raises BadInput."""
    if form == "none":
        return
    key = f"{where(recipe, 'backbone.quantise')}: {form}"
    if stage == 3:
        raise BadInput(
            f"{key}, but ZeRO stage 3 splits plain parameters, and quantised weights have scales beside them. "
            "Use ds_configs/zero2.json or zero1.json."
        )
    package = QUANTISED[form]
    if importlib.util.find_spec(package) is None:
        raise BadInput(f"{key} needs the package {package}. Install it: pip install 'mmpeft_ds[quantise]'")


def check_schedule(recipe: Recipe, total: int, steps_per_epoch: int) -> None:
    """Refuse a run by epochs that would end within its warm-up. Raises BadInput.

    Args:
        total: optimizer steps of the run, 0 where nothing is trained step by step.
    """
    if recipe.optim.schedule == "cosine_epoch" and 0 < total <= steps_per_epoch:
        raise BadInput(
            f"{where(recipe, 'optim.schedule')}: cosine_epoch spends the first epoch ({steps_per_epoch} steps) at "
            f"optim.warmup_lr, and the run has {total} steps. Raise optim.epochs or optim.max_steps, or use cosine."
        )


def check_backbone(recipe: Recipe, key: str, task: Section, backbone: Section) -> None:
    """Refuse a task that reads what the backbone does not give.

    Args:
        key: of the data source.

    Raises:
        BadInput: naming the backbones that give it, and the tasks that this backbone can do.
    """
    gives = chosen(backbone.options.gives, backbone.options)
    in_training = key.startswith("data.sources.")
    reads = chosen(read_words(type(task.options), in_training), task.options)
    missing = [word for word in reads if word not in gives]
    if not gives or not missing:
        return
    remedies = {
        "backbone": fitting_components(backbones, lambda options: options.gives, set(reads).issubset),
        "task": fitting_components(tasks, lambda o: read_words(o, in_training), lambda w: w and set(w) <= set(gives)),
    }
    remedy = ", or ".join(f"{kind} {' or '.join(names)}" for kind, names in remedies.items() if names)
    raise BadInput(
        f"{where(recipe, f'{key}.task')}: the task is {task.name}, which reads {' and '.join(missing)}, but backbone "
        f"{backbone.name} gives {' and '.join(gives)}. {f'Use {remedy}.' if remedy else ''}"
    )


def read_words(task: type[TaskOptions], in_training: bool) -> dict[str, tuple[str, ...]]:
    """Words for the backbone's outputs that a task reads, by option; `in_training` adds those that its loss reads."""
    words = dict(task.reads)
    for setting, more in task.reads_in_training.items() if in_training else ():
        words[setting] = (*words.get(setting, ()), *more)
    return words


def fitting_components(
    package: ModuleType, by_option: Callable[[Any], ByOption], fits: Callable[[Sequence[str]], bool]
) -> list[str]:
    """Backbones, or tasks, whose words fit, with the settings for it."""
    ways = {}
    for name in registry.names(package):
        options = registry.options(package, name, name)
        ways[name] = settings(by_option(options), options, fits)
    return [described(name, chosen_settings) for name, chosen_settings in ways.items() if chosen_settings]


def check_records(recipe: Recipe, key: str, options: SourceOptions, manifest: Manifest, task: Section) -> None:
    """Refuse a task that reads fields which the records do not hold, before anything that only this task needs.

    Raises:
        BadInput: naming what the records hold, and the tasks that read it.
    """
    present = manifest.fields.get(options.split, {})
    absent = [field for field in chosen(task.options.fields, task.options) if not _holds(present, field)]
    if not present or not absent:
        return
    known = {name: registry.options(tasks, name, name).fields.get("", ()) for name in registry.names(tasks)}
    fitting = [name for name, fields in known.items() if fields and all(_holds(present, field) for field in fields)]
    held = sorted({field for name in fitting for field in known[name]}) or [_top(path) for path in present]
    if task.name in fitting:
        remedy = "Change the options of the task, or prepare the data with that field."
    elif fitting:
        remedy = f"Use task {' or '.join(fitting)}.{_own_recipes(fitting)}"
    else:
        remedy = "Prepare the data with that field."
    raise BadInput(
        f"{where(recipe, f'{key}.task')}: the task is {task.name}, which reads {', '.join(absent)}, but the records "
        f"of {manifest.dir} ({options.split}) hold {', '.join(dict.fromkeys(held))}. {remedy}"
    )


def _own_recipes(names: Sequence[str]) -> str:
    shipped = [f"recipes/{name}_own.yaml" for name in names]
    there = [path for path in shipped if find_file(path).is_file()]
    return f" Start from {' or '.join(there)}." if there else ""


def _top(path: str) -> str:
    return path.partition("[")[0].partition(".")[0]


def _holds(present: dict[str, Any], field: str) -> bool:
    return any(_top(path) == field for path in present)


def picture_notes(
    key: str, options: SourceOptions, manifest: Manifest, modalities: Sequence[str], takes_features: bool
) -> list[str]:
    """Lines for the user about a data set whose samples, or some of them, have no picture for the vision tower.

    Args:
        modalities: of the backbone.
        takes_features: the backbone reads stored features in place of pictures.
    """
    fields = manifest.fields.get(options.split, {})
    if "image" not in modalities or not fields or manifest.towers:
        return []
    wanted, other = ("features", "images") if takes_features else ("images", "features")
    here = f"{key}: {manifest.dir} ({options.split})"
    stored = fields.get(wanted, {"present": 0, "max": 0})
    if not stored["max"]:
        has = f" It has {other}, which this backbone does not read." if fields.get(other, {}).get("max") else ""
        aside = {path.split(".")[1].removesuffix("[]"): None for path in fields if path.startswith("extra.")}
        has += f" No task reads what stands under its other keys: {', '.join(aside)}." if aside else ""
        return [f"{here}: no sample has {wanted}, so the vision tower sees nothing of this data set.{has}"]
    # A sample without pictures counts as one with 0 of them; one without features counts as nothing.
    total = manifest.samples(options.split)
    without = total - stored["present"] if takes_features else 0 if stored["min"] else None
    if without == 0:
        return []
    return [f"{here}: {f'{without:,} of {total:,}' if without else 'some'} samples have no {wanted}."]


def check_held(recipe: Recipe, key: str, options: SourceOptions, manifest: Manifest, backbone: BackboneBase) -> None:
    """Refuse data with videos, or with several questions in a conversation, where the backbone cannot read them as
    such. Raises BadInput."""
    held, place = manifest.fields.get(options.split, {}), f"{where(recipe, f'{key}.dir')}: {manifest.dir}"
    if backbone.no_videos and _holds(held, "videos"):
        raise BadInput(f"{place} ({options.split}) holds videos, but {backbone.no_videos}.")
    turns = held.get("conversations", {}).get("max", 0)
    if turns > 3 and backbone.one_turn:  # three may be a system text, a question and its answer
        raise BadInput(
            f"{place} ({options.split}) holds conversations of up to {turns:g} turns, but {backbone.one_turn}. "
            "Prepare data with one question and one answer each."
        )


def stored_notes(
    recipe: Recipe, key: str, options: SourceOptions, manifest: Manifest, backbone: BackboneBase
) -> list[str]:
    """Lines for the user about stored arrays that no towers of ours made. Raises BadInput where the backbone reads
    arrays of another kind."""
    stored = manifest.fields.get(options.split, {}).get("features")
    if manifest.towers or not stored:
        return []
    try:
        note = backbone.check_stored(manifest.features_are, stored["max"])
    except BadInput as problem:
        raise BadInput(f"{where(recipe, f'{key}.dir')}: {manifest.dir} ({options.split}): {problem}") from problem
    return [f"{key}: {manifest.dir} ({options.split}): {note}"] if note else []


def check_contrast(recipe: Recipe, key: str, options: SourceOptions, task: TaskBase, samples: int) -> None:
    """Refuse a loss over the pairs of a step where a step holds one sample only. Raises BadInput.

    A queue of earlier pairs (`backbone.queue`) is something to compare with.
    """
    batch = recipe.data.global_batch
    if not task.couples_samples or recipe.backbone.get("queue") or min(batch, samples) > 1:
        return
    name = options.task["name"]
    if samples == 1:
        raise BadInput(f"{where(recipe, key)}: one sample, but task {name} tells it from the others of its step.")
    raise BadInput(
        f"{where(recipe, 'data.global_batch')}: 1, but task {name} learns by telling a sample from the others of its "
        f"step: there are none, and the loss would be 0. Use more, such as {min(64, samples)}."
    )


def run_notes(recipe: Recipe, sources: Sequence[tuple[str, TaskBase, int]], by_gradients: bool) -> list[str]:
    """Lines for the user about the length of a run and its steps, before it starts.

    Args:
        sources: key, task and number of samples of each train source.
        by_gradients: the method trains step by step.
    """
    data, optim, notes = recipe.data, recipe.optim, []
    for key, task, samples in sources:
        if samples < data.global_batch:
            notes.append(
                f"{key}: {samples:,} samples, fewer than data.global_batch: {data.global_batch:,}. Every step holds "
                "all of them, and empty places."
            )
        elif task.couples_samples and data.last_batch == "pad" and samples % data.global_batch == 1:
            notes.append(
                f"{key}: the last step of an epoch holds one sample, which has no other to be told from. Set "
                "data.last_batch: drop, or another data.global_batch."
            )
    per_epoch = sum(steps_of(samples, data.global_batch, data.last_batch) for _, _, samples in sources)
    total = per_epoch * optim.epochs
    if by_gradients and not optim.max_steps and 0 < total < FEW_STEPS:
        notes.append(
            f"optim.epochs: {optim.epochs} gives {total} steps in all, few for training anything. "
            f"optim.epochs={-(-2 * FEW_STEPS // per_epoch)} would give about {2 * FEW_STEPS}."
        )
    return notes


def check_names(recipe: Recipe, entries: list[tuple[str, SourceOptions, Manifest]]) -> None:
    """Refuse two data sets whose samples bear the same ids, `NAME/SPLIT-NUMBER`. Raises BadInput."""
    seen: dict[tuple[str, str], tuple[str, Manifest]] = {}
    for key, options, manifest in entries:
        first, other = seen.setdefault((manifest.name, options.split), (key, manifest))
        if other.splits[options.split] != manifest.splits[options.split]:
            raise BadInput(
                f"{where(recipe, f'{key}.dir')}: {manifest.dir} is named {manifest.name!r}, as is {other.dir} "
                f"({first}): their samples could not be told apart. Prepare one of them with another --name."
            )


def check_coupling(recipe: Recipe, train_tasks: list[TaskBase], method: MethodOptions) -> None:
    """Refuse accumulation where the loss of one sample depends on others of the step. Raises BadInput."""
    coupled = [part for part in (*train_tasks, method) if part.couples_samples]
    if coupled and recipe.optim.accumulation > 1:
        raise BadInput(
            f"{where(recipe, 'optim.accumulation')}: {type(coupled[0]).__name__} couples the samples of a step, which "
            f"accumulation would split. Set optim.accumulation: 1 and use more ranks or a smaller data.global_batch."
        )


def check_packing(
    recipe: Recipe,
    backbone: BackboneBase,
    train: Sequence[tuple[str, TaskBase, Manifest]],
    method: type[SiteMethod],
    config: PeftConfig,
    takes_features: bool,
    attention: str,
) -> None:
    """Refuse `data.pack` where texts cannot share a row. Raises BadInput.

    Args:
        train: position, task and manifest of each training source.
        takes_features: the backbone reads stored features in place of pixels.
        attention: implementation that the model is loaded with.
    """
    if not recipe.data.pack:
        return
    at = f"{where(recipe, 'data.pack')}: {recipe.data.pack}, but"
    if backbone.unpackable:
        raise BadInput(f"{at} the backbone {recipe.backbone['name']} {backbone.unpackable}. Leave it out.")
    for key, task, manifest in train:
        if task.couples_samples:
            raise BadInput(
                f"{at} the task of {key} couples the samples of a step, which micro-batches would split. Leave it out."
            )
        if takes_features or manifest.towers:
            raise BadInput(f"{at} {key} holds stored features, whose tokens are not counted. Leave it out.")
    if reason := method.unpackable(config, attention):
        raise BadInput(f"{at} {recipe.method['name']}: {reason} Leave it out, or choose another method.")


def check_texts(recipe: Recipe, key: str, options: SourceOptions, method: MethodOptions) -> None:
    """Refuse a method that reads captions where the task brings none: it would learn from zeros. Raises BadInput."""
    if method.reads_captions and options.task.get("text") == "none":
        raise BadInput(
            f"{where(recipe, f'{key}.task.text')}: none, but {recipe.method['name']} reads captions. "
            "Set text: captions, or method.inputs: image."
        )


def check_validation(recipe: Recipe, method: MethodOptions) -> None:
    """Refuse a method that searches on validation where there is none, before it has trained. Raises BadInput."""
    if method.needs_validation and not recipe.data.validation:
        raise BadInput(
            f"{where(recipe, 'data.validation')}: empty, but {recipe.method['name']} searches some of its numbers "
            "there. Name a validation split, or give the numbers (see docs/methods/few_shot_baselines.md)."
        )


def _lookup(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else getattr(value, part)
    return value
