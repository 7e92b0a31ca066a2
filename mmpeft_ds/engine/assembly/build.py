"""Building of a resolved recipe: the frozen base, its adapters, the optimiser, and DeepSpeed around them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mmpeft_ds.backbones.common.model_hooks import model_hooks
from mmpeft_ds.backbones.common.quantised import weight_of
from mmpeft_ds.distributed.own_process import building
from mmpeft_ds.distributed.partitioned import gathered
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine.assembly import feature_bank, start_from
from mmpeft_ds.engine.assembly.forward import adapted_layer, forward
from mmpeft_ds.engine.optim import optimizers
from mmpeft_ds.engine.zero import fingerprint as fingerprints
from mmpeft_ds.engine.zero import lean, matrices, node_groups, stage1, stage3, stage3_gradients
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.engine.zero.config import check_by_deepspeed, merge
from mmpeft_ds.engine.zero.start import frozen_not_sent, not_moved
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import StartData
from mmpeft_ds.methods.common.fused import fuse
from mmpeft_ds.recipe import Recipe
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.base import Sites, base_layer, base_model
from mmpeft_ds.sites.condition import enable_checkpointing


@dataclass
class Built:
    """A model ready to train.

    Attributes:
        engine: DeepSpeed engine around `model`.
        model: the `PeftModel`.
        trainables: parameter name -> parameter, in the model's order.
        stage: ZeRO stage.
        fingerprint: of every frozen tensor, which is the same on all ranks.
        ewc: elastic weight consolidation towards an earlier task (`engine.ewc.Pull`), or None.
        frozen: what computes the values of images apart (`engine.frozen_images.FrozenImages`), or None.
    """

    engine: Any
    model: nn.Module
    trainables: dict[str, nn.Parameter]
    stage: int
    fingerprint: dict[str, str]
    ewc: Any = None
    frozen: Any = None


def build(
    resolved: Any,
    ranks: Ranks,
    batches: Callable[[], Iterator[Any]] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Built:
    """The frozen base, its adapters and DeepSpeed around them. Collective.

    Args:
        batches: gives tasks and packed batches of training data without end, the same on all ranks, to methods that
            start from them; None: they keep the start with which they are attached.
        shapes: of the trained parameters of the checkpoint that is read afterwards, in place of `batches`.

    Raises:
        BadInput: when nothing is trainable, DeepSpeed refuses the JSON, or ranks have read other weights.
    """
    from transformers.integrations import HfDeepSpeedConfig

    recipe: Recipe = resolved.recipe
    check_by_deepspeed(recipe, resolved.ds_config)
    ds_config = node_groups.make(resolved.ds_config, ranks)
    stage = ds_config["zero_optimization"].get("stage", 0)
    # While this object exists, from_pretrained partitions what it loads, so create it before the backbone.
    config = merge(ds_config, recipe, ranks.world_size, trainable=0)
    partitioning = HfDeepSpeedConfig(config) if stage == 3 else None
    with building() if ranks.device.type == "cpu" else contextlib.nullcontext():
        base = load_base(resolved, ranks, stage)
        sites = find_sites(base)
        model = adapted(resolved, base, batches, shapes)
        del partitioning
        return started(resolved, ranks, model, ds_config, sites)


def load_base(resolved: Any, ranks: Ranks, stage: int) -> nn.Module:
    """The frozen base of a recipe; what of it is drawn is drawn from the recipe's seed. Collective.

    Args:
        stage: of ZeRO.
    """
    if resolved.backbone.reads_bank:
        wanted = resolved.method.bank_parts(resolved.method_config)
        resolved.backbone.use_bank(feature_bank.read(resolved.train, resolved.labels, wanted))
    torch.manual_seed(resolved.recipe.seed)
    # Below stage 3 each rank keeps the whole base: it reads it to its device, not into the host's memory first.
    resolved.backbone.device = None if stage == 3 else ranks.device
    base = resolved.backbone.build()
    if stage < 3:
        base.to(ranks.device)  # the rest: what is drawn, and buffers
    if resolved.backbone.reads_bank:
        with gathered(list(base.parameters())):
            resolved.backbone.read_classes(base)
    return base


def adapted(
    resolved: Any,
    base: nn.Module,
    batches: Callable[[], Iterator[Any]] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> nn.Module:
    """The base with the adapters of a recipe, as they start. Collective.

    Args:
        batches, shapes: as of `build`.

    Raises:
        BadInput: the method does not fit the base.
    """
    from mmpeft_ds.engine.assembly.resolve import attach, check_new

    # Seed again: loading under ZeRO-3 draws other numbers than loading whole, and adapters must start alike.
    torch.manual_seed(resolved.recipe.seed)
    model = attach(resolved, base)
    if batches is not None and shapes is None:
        check_new(resolved, model)
    if resolved.method.reads_batches(resolved.method_config):
        if shapes is not None:
            resolved.method.restart(model, shapes)
        elif batches is not None:
            begun = _training_state(model)
            resolved.method.start(model, start_data(resolved, model, batches()))
            model_hooks(model).load_training_state(begun)
    if resolved.recipe.start_from and batches is not None and shapes is None:
        start_from.begin(resolved, model)
    return model


def started(resolved: Any, ranks: Ranks, model: nn.Module, ds_config: dict[str, Any], sites: Sites) -> Built:
    """DeepSpeed around a model with adapters. Collective.

    Args:
        ds_config: of `node_groups.make`.
        sites: of the base before adapters were attached; read at ZeRO stage 3 alone.

    Raises:
        BadInput: nothing is trainable, or ranks have read other weights.
    """
    import deepspeed

    recipe: Recipe = resolved.recipe
    stage = ds_config["zero_optimization"].get("stage", 0)
    base = base_model(model)
    if recipe.engine.compile:
        fuse(model)
    if recipe.engine.gradient_checkpointing:
        recompute_blocks(base)
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainables and resolved.method_options.gradient_free:
        model.to(ranks.device)
        return Built(FrozenEngine(model, ranks), model, {}, 0, fingerprints.of_frozen(model))
    check_trainables(trainables)
    if stage == 3:
        stage3.mark_leaves(model, sites, adapted_layer(resolved.backbone, base))
    numel = sum(map(zero_state.numel, trainables.values()))
    optimizer = optimizers.make(optim_groups(resolved, trainables), recipe.optim)
    # Leave model_parameters out: DeepSpeed then takes those of the optimiser, which are the trainables alone.
    config = merge(ds_config, recipe, ranks.world_size, numel)
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        # Nothing is partitioned, as with stored features, so DeepSpeed would cast the trainables to bfloat16 too.
        config["bf16"] = {"enabled": False}
    if stage < 3:
        model.to(ranks.device)
    with frozen_not_sent(model), not_moved(model) if stage < 3 else contextlib.nullcontext():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    # DeepSpeed asks for it at every forward pass, and the engine, which lacks it, asks all wrappers of the model.
    engine._deepcompile_z3_eager_fallback = None
    check_engine(engine, trainables)
    matrices.lay_out(engine)
    lean.step_directly(engine)
    if stage == 1:
        stage1.reduce_flat(engine)
    if stage == 3:
        stage3.keep_frozen(engine)
        stage3.gather_flat(engine)
        if not stage3_gradients.reduce_flat(engine):
            stage3_gradients.forget_each_step(engine)
        stage3.list_parameters_once(model)
        stage3.list_modules_once(engine)
    return Built(engine, model, trainables, stage, fingerprints.of_frozen(model))


def start_data(resolved: Any, model: nn.Module, batches: Iterator[tuple[Any, Any]]) -> StartData:
    """Data for a method's start; `batches` are those of `engine.streams.first_batches`."""
    backbone = resolved.backbone
    begun = _training_state(model)

    def loss(model: nn.Module, item: tuple[Any, Any]) -> torch.Tensor:
        task, batch = item
        # No batch sees pairs of those before it, which stand in a queue once for each rank.
        model_hooks(model).load_training_state(begun)
        return task.loss(forward(model, backbone, batch), batch) / (task.weight(batch) or 1.0)

    @torch.no_grad()
    def lost(paths: list[str]) -> dict[str, torch.Tensor]:
        plain, base = copy.copy(backbone), model.get_base_model()
        plain.options, plain.device = dataclasses.replace(backbone.options, quantise="none"), None
        with torch.random.fork_rng():  # rank 0 alone draws, what was drawn when the base was built
            torch.manual_seed(resolved.recipe.seed)
            original = plain.build()  # once more and whole, on the CPU
        differences = {}
        for path in paths:
            layer, now = original.get_submodule(path), weight_of(base_layer(base.get_submodule(path)))
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            differences[path] = weight.to(now.device, torch.float32) - now.float()
        return differences

    return StartData(batches, lambda model, item: forward(model, backbone, item[1]), loss, lost)


def _training_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what training moves beside the weights, such as a queue and a teacher; of most models nothing."""
    return {name: tensor.clone() for name, tensor in model_hooks(model).training_state().items()}


def optim_groups(resolved: Any, trainables: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The optimiser's parameter groups of a resolved recipe. Raises BadInput as `optimizers.parameter_groups`."""
    method, config = resolved.method, resolved.method_config
    decays = functools.partial(method.decays, config)
    return optimizers.parameter_groups(trainables, resolved.recipe, decays, method.is_map)


def recompute_blocks(base: nn.Module) -> None:
    """Have the blocks of a base recomputed in backward: `engine.gradient_checkpointing`.

    Not by transformers' own switch, which also makes the output of frozen token embeddings need gradients: BLIP adds
    to that output in place, and nothing but reentrant checkpointing has a use for them.

    Raises:
        BadInput: the model has no blocks that can be recomputed.
    """
    try:
        enable_checkpointing(base)
    except ValueError as error:
        raise BadInput(
            f"engine.gradient_checkpointing: {type(base).__name__} has no blocks that can be recomputed. "
            "Set engine.gradient_checkpointing: false."
        ) from error


class FrozenEngine:
    """Stands in for DeepSpeed's engine where nothing trains."""

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.module, self.device, self.global_rank = model, ranks.device, ranks.rank
        self.optimizer = types.SimpleNamespace(param_groups=[], state={})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def zero_optimization_stage(self) -> int:
        """0: nothing is partitioned."""
        return 0

    def clip_fp32_gradients(self) -> None:
        """Nothing to clip."""

    def destroy(self) -> None:
        """Nothing to remove: there are no hooks."""


def check_trainables(trainables: dict[str, nn.Parameter]) -> None:
    """Check that there are trainables and that all are float32.

    Raises:
        BadInput: if there is none.
        TypeError: if one is not float32. In bfloat16, updates below its 8 bits would be lost.
    """
    if not trainables:
        raise BadInput("recipe: method: it leaves nothing to train. Name target layers, a head, norms or biases.")
    wrong = [f"{n} ({p.dtype})" for n, p in trainables.items() if p.dtype != torch.float32]
    if wrong:
        raise TypeError(
            f"trainable parameters must be float32: {', '.join(wrong[:3])} and {max(0, len(wrong) - 3)} more"
        )


def check_engine(engine: Any, trainables: dict[str, nn.Parameter]) -> None:
    """Check after `initialize` that DeepSpeed trains exactly what the recipe trains, still in float32."""
    now = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    if list(now) != list(trainables):
        raise RuntimeError(f"DeepSpeed changed the trainable set: {sorted(set(now) ^ set(trainables))[:5]}")
    check_trainables(now)
    held = getattr(engine.optimizer, "fp16_groups", None) or getattr(engine.optimizer, "bit16_groups", None)
    groups = held if held is not None else [g["params"] for g in engine.optimizer.param_groups]
    if {id(p) for group in groups for p in group} != {id(p) for p in now.values()}:
        raise RuntimeError("the optimizer does not hold exactly the trainable parameters")
