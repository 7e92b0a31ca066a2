"""Adjustments of ZeRO-3 to a model that is mostly frozen: whole blocks as leaves, persistent parameters
gathered once where they are frozen and together where they are trained."""

from __future__ import annotations

import itertools
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from mmpeft_ds.backbones.common.model_hooks import model_hooks
from mmpeft_ds.distributed.own_process import give_back_freed
from mmpeft_ds.engine.zero.full_state import BUCKET
from mmpeft_ds.sites.base import Sites


def mark_leaves(model: nn.Module, sites: Sites, head: nn.Module | None = None) -> list[str]:
    """Make ZeRO-3 gather each transformer block as a whole; returns the paths of `leaf_paths`."""
    from deepspeed.utils import set_z3_leaf_module

    modules = {plain(name): module for name, module in model.named_modules()}
    leaves = leaf_paths(model, sites, head)
    for path in leaves:
        set_z3_leaf_module(modules[path], True)
        if any(p.requires_grad for p in modules[path].parameters()):
            modules[path].register_forward_pre_hook(input_with_gradient, with_kwargs=True)
    return leaves


def leaf_paths(model: nn.Module, sites: Sites, head: nn.Module | None = None) -> list[str]:
    """Paths of the transformer blocks that are gathered as a whole, and of an output layer with adapters.

    By default DeepSpeed hooks every Linear and LayerNorm: about twenty hooks and four gathers per block in forward,
    and again in backward, which at few tokens per step costs more than the arithmetic. A block that is one leaf needs
    one gather and keeps the memory bound of a block.

    Trained blocks of vision towers are no leaves: hidden states that a tower returns (LLaVA reads the last but one)
    are taken before the hook of a leaf, so the gradients of that block would never be reduced (measured). Neither are
    trained blocks of towers that a model names in `runs_again`, since one forward runs them several times: DeepSpeed
    reduces a leaf after each backward pass through it, and fails at the second (measured).

    Args:
        head: an output layer with adapters. It is run in parts, whose number differs from rank to rank, so its modules
            must gather nothing by themselves.
    """
    modules = {plain(name): module for name, module in model.named_modules()}
    images = tuple(f"{tower}." if tower else "" for tower, modality in sites.towers.items() if modality == "image")
    again = tuple(f"{tower}." for tower in model_hooks(model).runs_again)
    leaves = []
    for path in block_paths(sites):
        if path not in modules:
            continue
        trained = any(p.requires_grad for p in modules[path].parameters())
        if not (trained and path.startswith(images + again)):
            leaves.append(path)
    uneven = (path for path in model_hooks(model).runs_unevenly if path in modules and path not in leaves)
    leaves += [path for path in uneven if not any(p.requires_grad for p in modules[path].parameters())]
    return leaves + [path for path, module in modules.items() if module is head]


def keep_frozen(engine: Any) -> None:
    """Gather frozen parameters below the persistence threshold once instead of after every step.

    DeepSpeed partitions persistent parameters again at the end of a step and gathers them again, since the optimiser
    has changed them. Frozen ones have not changed, so they stay. `stage3_param_persistence_threshold` thereby trades
    memory for traffic, from all frozen weights partitioned to all of them resident.

    Of the others only what is gathered is partitioned, where DeepSpeed goes through all parameters twice; trained
    persistent ones keep their memory until the gather that follows the step replaces it. What stays gathered holds
    this rank's part too, whose own memory is given back at the end of a step.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    optimizer = engine.optimizer
    persistent = optimizer.persistent_parameters
    frozen = {id(p) for p in persistent if not p.requires_grad}
    trained = {id(p) for p in persistent if p.requires_grad}
    optimizer.persistent_parameters = [p for p in persistent if p.requires_grad]
    parameters = list(engine.module.parameters())
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    staying = [p for p in persistent if not p.requires_grad]
    within: dict[int, int] = {}  # id of a parameter -> where the whole one lay that took its part in
    first = True  # step, in which DeepSpeed shards everything again after each use, whatever is to stay

    def shard_the_rest() -> None:
        nonlocal first
        gathered_since = [
            p for p in staying if p.ds_status == ZeroParamStatus.AVAILABLE and within.get(id(p)) != p.data_ptr()
        ]
        for p in gathered_since:  # anew after an evaluation that took other modules, for which DeepSpeed shards all
            part_within_whole(p)
            within[id(p)] = p.data_ptr()
        if gathered_since or first:
            give_back_freed()
        first = False
        rest = []
        for p in parameters:
            gathered = p.ds_status == ZeroParamStatus.AVAILABLE
            if gathered and id(p) in trained:
                p.ds_status = ZeroParamStatus.NOT_AVAILABLE
            elif p.ds_status != ZeroParamStatus.NOT_AVAILABLE and not (gathered and id(p) in frozen):
                rest.append(p)
            p.ds_active_sub_modules.clear()
        coordinator.release_and_reset_all(_Some(rest))

    optimizer._partition_all_parameters = shard_the_rest


def part_within_whole(parameter: nn.Parameter) -> None:
    """Let this rank's part of a gathered parameter, which nothing changes, lie in the memory of the whole one.

    Left as it is where it has padding at its end, lies on another device (offload), or has a second copy (hpZ).
    """
    part, whole = parameter.ds_tensor, parameter.data
    size = part.ds_numel
    start = torch.distributed.get_rank(group=parameter.ds_process_group) * size
    alike = (part.device, part.dtype, part.numel()) == (whole.device, whole.dtype, size)
    if alike and whole.is_contiguous() and start + size <= whole.numel() and parameter.ds_secondary_tensor is None:
        part.data = whole.view(-1)[start : start + size]


class _Some:
    """Parameters with the methods by which DeepSpeed's `release_and_reset_all` asks a module for its own."""

    def __init__(self, parameters: list[nn.Parameter]):
        self._parameters = parameters

    def named_parameters(self, recurse: bool = True) -> list[tuple[str, nn.Parameter]]:
        """Without names."""
        return [("", p) for p in self._parameters]

    def ds_external_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """None."""
        return []


def list_modules_once(engine: Any) -> None:
    """Before and after every forward pass DeepSpeed marks all modules; let it go through those with parameters, which
    are all there by now."""
    model = engine.module
    holders = [module for module in model.modules() if module._parameters]

    def of_holders(plain: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any) -> Any:
            vars(model)["modules"] = lambda: holders
            try:
                return plain(*args)
            finally:
                del vars(model)["modules"]

        return marked

    engine._forward_prologue = of_holders(engine._forward_prologue)
    engine._forward_epilogue = of_holders(engine._forward_epilogue)


def list_parameters_once(model: nn.Module) -> None:
    """Let DeepSpeed keep the lists of the parameters of these modules, which are all there by now and stay.

    It asks for them at every fetch and release of a module, and for a leaf, or for the whole model at the end of a
    step, walks through all modules inside each time.
    """
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    for module in model.modules():
        _LISTS[module] = {}
    for user in (parameter_offload, partitioned_param_coordinator):
        if not isinstance(user.iter_params, _Listed):
            user.iter_params = _Listed(user.iter_params)


_LISTS: weakref.WeakKeyDictionary[nn.Module, dict[bool, list[nn.Parameter]]] = weakref.WeakKeyDictionary()


class _Listed:
    """DeepSpeed's `iter_params`, which walks no known module twice."""

    def __init__(self, walk: Callable[..., Iterable[nn.Parameter]]):
        self.walk = walk

    def __call__(self, module: nn.Module, recurse: bool = False) -> Iterable[nn.Parameter]:
        lists = _LISTS.get(module)
        if lists is None:
            return self.walk(module, recurse)
        if recurse not in lists:
            lists[recurse] = list(module.parameters(recurse))
        outside = module.ds_external_parameters()  # may become more in any forward pass
        return itertools.chain(lists[recurse], (parameter for _, parameter in outside))


def gather_flat(engine: Any) -> None:
    """Gather trained parameters below the persistence threshold together after a step, not one after another.

    DeepSpeed starts one collective a parameter there, hundreds for the vectors and small matrices of an adapter.
    """
    optimizer = engine.optimizer
    trained, optimizer.persistent_parameters = optimizer.persistent_parameters, []
    finish_step = optimizer._post_step

    def finish_and_gather(*args: Any, **kwargs: Any) -> None:
        finish_step(*args, **kwargs)  # drops copies of old values that hpZ keeps, from which it would gather
        for parameters in _buckets(trained):
            parameters[0].all_gather_coalesced(parameters).wait()

    optimizer._post_step = finish_and_gather


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those that are not gathered, in lists of at most BUCKET bytes (of one parameter, if it has more)."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    bucket, size = [], 0
    for parameter in parameters:
        if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
            continue
        nbytes = parameter.ds_numel * parameter.ds_tensor.element_size()
        if bucket and size + nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += nbytes
    if bucket:
        yield bucket


def input_with_gradient(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Make the first argument of a leaf with trainables positional, and let it require gradient.

    DeepSpeed reduces a leaf's gradients in its full backward hook. torch runs that hook when the gradient of the
    positional inputs is complete; if none of them requires one, it runs before the leaf's own backward, too early.
    """
    if not args and "hidden_states" in kwargs:
        kwargs = dict(kwargs)
        args = (kwargs.pop("hidden_states"),)
    if torch.is_grad_enabled() and not args[0].requires_grad:
        args = (args[0].detach().requires_grad_(), *args[1:])
    return args, kwargs


def block_paths(sites: Sites) -> list[str]:
    """Path of every transformer block: the deepest module that holds all sites of one layer of one tower."""
    members: dict[tuple[str, int], list[list[str]]] = defaultdict(list)
    for site in [*sites.attention, *sites.ffn]:
        members[site.tower, site.layer].append(site.path.split("."))
    blocks = []
    for (tower, _), paths in members.items():
        shared = os.path.commonprefix(paths)
        if len(paths) == 1:
            shared = shared[:-1]
        if len(shared) > len(tower.split(".")):
            blocks.append(".".join(shared))
    return blocks


def plain(name: str) -> str:
    """Path of a module below the base model, from one below the PeftModel."""
    return name.removeprefix("base_model.model.")
