"""From a resolved recipe to a DeepSpeed engine: process environment, frozen base, adapters, optimiser."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import logging
import os
import socket
import subprocess
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmpeft_ds.engine.assembly import feature_bank
from mmpeft_ds.engine.optim import optimizers
from mmpeft_ds.engine.zero.config import check_ds_config, merge
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.layers import gathered
from mmpeft_ds.recipe import REPOSITORY, Recipe
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.base import Sites

__all__ = ["Built", "Ranks", "build", "check_ds_config", "start"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_TIMEOUT = datetime.timedelta(minutes=30)  # of one collective; loading a large base from a slow disk takes minutes


@dataclass(frozen=True)
class Ranks:
    """Where this process stands.

    Attributes:
        rank, world_size: over all machines.
        local_rank, local_size: on this machine.
        device: `cuda:K` or `cpu`.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device


@dataclass
class Built:
    """A model ready to train.

    Attributes:
        engine: DeepSpeed engine around `model`.
        model: the `PeftModel`.
        trainables: parameter name -> parameter, in the model's order.
        stage: ZeRO stage.
        ewc: what pulls the trainables towards an earlier task (`engine.ewc.Pull`), or None.
    """

    engine: Any
    model: nn.Module
    trainables: dict[str, nn.Parameter]
    stage: int
    ewc: Any = None


# ---------------------------------------------------------------------------------------------------- processes


def start(recipe: Recipe) -> Ranks:
    """Join the process group that `deepspeed`, `torchrun`, `srun` or nobody (one process) has laid out.

    Raises:
        BadInput: more ranks on this machine than GPUs, or the port of rank 0 is taken.
    """
    environment()
    cuda = torch.cuda.is_available()
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if cuda and local_rank >= torch.cuda.device_count():
        raise BadInput(
            f"local rank {local_rank}: this machine shows {torch.cuda.device_count()} GPU(s). Start as many ranks, or "
            "hide the GPUs and train on the CPU: CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu."
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(recipe.engine.threads or max(1, _cores() // local_size))
    if not cuda:
        keep_freed_memory()
    quiet()
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not torch.distributed.is_initialized():
        with no_shared_buffers():
            try:
                deepspeed.init_distributed(
                    "nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False, timeout=_TIMEOUT
                )
            except torch.distributed.DistNetworkError as error:
                if "EADDRINUSE" not in str(error) and "address already in use" not in str(error).lower():
                    raise
                raise BadInput(
                    f"port {os.environ['MASTER_PORT']} is taken: another run is on this machine, or the last one is "
                    "still saving. Wait for it, or give the launcher another --master_port."
                ) from error
    torch.manual_seed(recipe.seed)
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, local_size, device)


def environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not."""
    env = os.environ
    env.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers fork; the tokenizer's threads would not survive
    compiled = REPOSITORY / ".cache" / "torch_extensions"
    if compiled.is_dir():
        env.setdefault("TORCH_EXTENSIONS_DIR", str(compiled))
    if "RANK" in env:  # deepspeed, torchrun
        env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))
        return
    if "SLURM_STEP_NUM_TASKS" in env:  # srun; a bare process inside salloc has SLURM_NTASKS but no step
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
        # "4(x2),3": tasks of each node; the widest is right for all but a ragged last node, where it is cautious.
        tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")
        env.setdefault("LOCAL_WORLD_SIZE", str(max(int(t.split("(")[0]) for t in tasks)))
        env.setdefault("MASTER_ADDR", _first_host(env))
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
        return
    env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env["MASTER_PORT"] = str(free.getsockname()[1])


@contextlib.contextmanager
def no_shared_buffers() -> Iterator[None]:
    """Keep DeepSpeed on CPU from laying 69 MB a rank into /dev/shm, which it never takes away again.

    Only its inference all-reduce would use them. They stay after the run under a name that holds the port, so every
    launch costs that much memory until the machine restarts, and in a container with 64 MB of /dev/shm they leave no
    room for the batches of loader workers. DeepSpeed makes them where LOCAL_SIZE says that all ranks share a machine.
    """
    before = os.environ.pop("LOCAL_SIZE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_SIZE"] = before


def _first_host(env: Any) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "127.0.0.1")
    if "[" not in nodes:
        return nodes.split(",")[0]
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


def _cores() -> int:
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed; otherwise the kernel maps and zeroes every large tensor of every step anew."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def quiet() -> None:
    """Hide the two deprecation warnings that torch prints for calls inside DeepSpeed, and nothing else."""
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", category)


# -------------------------------------------------------------------------------------------------------- model


def build(resolved: Any, ranks: Ranks) -> Built:
    """The frozen base, its adapters and DeepSpeed around them.

    Raises:
        BadInput: when nothing is trainable.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from mmpeft_ds.engine.assembly.resolve import attach

    recipe: Recipe = resolved.recipe
    stage = resolved.ds_config["zero_optimization"].get("stage", 0)
    # from_pretrained partitions while it loads as long as this object lives, so it must exist before the backbone.
    config = merge(resolved.ds_config, recipe, ranks.world_size, trainable=0)
    partitioning = HfDeepSpeedConfig(config) if stage == 3 else None
    prepare_backbone(resolved.backbone, recipe)
    if hasattr(resolved.backbone, "use_bank"):
        wanted = feature_bank.needed(resolved.method, resolved.method_config)
        resolved.backbone.use_bank(feature_bank.read(resolved.train, resolved.labels, wanted))
    torch.manual_seed(recipe.seed)
    base = resolved.backbone.build()
    if hasattr(resolved.backbone, "read_classes"):
        with gathered(list(base.parameters())):
            resolved.backbone.read_classes(base)
    sites = find_sites(base)
    # Loading under ZeRO-3 draws other numbers than loading whole; the adapters must start alike at every stage.
    torch.manual_seed(recipe.seed)
    model = attach(resolved, base)
    del partitioning
    if recipe.engine.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainables and getattr(resolved.method_config, "gradient_free", False):
        return Built(FrozenEngine(model.to(ranks.device), ranks), model, {}, 0)
    check_trainables(trainables)
    if stage == 3:
        mark_leaves(model, sites)
    numel = sum(_numel(p) for p in trainables.values())
    decays = getattr(resolved.method, "decays", None)
    groups = parameter_groups(trainables, recipe, decays and functools.partial(decays, resolved.method_config))
    optimizer = optimizers.make(groups, recipe.optim)
    # model_parameters is left out: DeepSpeed takes the optimiser's, which are the trainables and nothing else.
    config = merge(resolved.ds_config, recipe, ranks.world_size, numel)
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        # Nothing was loaded in parts, as with stored features: DeepSpeed would cast the trainables like the rest.
        config["bf16"] = {"enabled": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    check_engine(engine, trainables)
    if stage == 3:
        keep_frozen(engine)
    return Built(engine, model, trainables, stage)


class FrozenEngine:
    """In the place of DeepSpeed's engine around a model in which nothing trains."""

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.module, self.device, self.global_rank = model, ranks.device, ranks.rank
        self.optimizer = types.SimpleNamespace(param_groups=[], state={})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def zero_optimization_stage(self) -> int:
        """0: nothing is split."""
        return 0

    def destroy(self) -> None:
        """Nothing to take off."""


def prepare_backbone(backbone: Any, recipe: Recipe) -> None:
    """Tell a backbone, before `build`, what the recipe's `engine` section says of it."""
    backbone.dtype = getattr(torch, recipe.engine.dtype)
    backbone.attention = recipe.engine.attention
    backbone.train_dropout = recipe.engine.train_dropout


def check_trainables(trainables: dict[str, nn.Parameter]) -> None:
    """Trainables exist and are float32.

    Raises:
        BadInput: if there is none.
        TypeError: if one is not float32: bf16 adapters lose updates below their 8 bits.
    """
    if not trainables:
        raise BadInput("recipe: method: it leaves nothing to train. Name target layers, a head, norms or biases.")
    wrong = [f"{n} ({p.dtype})" for n, p in trainables.items() if p.dtype != torch.float32]
    if wrong:
        raise TypeError(
            f"trainable parameters must be float32: {', '.join(wrong[:3])} and {max(0, len(wrong) - 3)} more"
        )


def check_engine(engine: Any, trainables: dict[str, nn.Parameter]) -> None:
    """After `initialize`: DeepSpeed trains exactly what the recipe trains, still in float32."""
    now = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    if list(now) != list(trainables):
        raise RuntimeError(f"DeepSpeed changed the trainable set: {sorted(set(now) ^ set(trainables))[:5]}")
    check_trainables(now)
    held = getattr(engine.optimizer, "fp16_groups", None) or getattr(engine.optimizer, "bit16_groups", None)
    groups = held if held is not None else [g["params"] for g in engine.optimizer.param_groups]
    if {id(p) for group in groups for p in group} != {id(p) for p in now.values()}:
        raise RuntimeError("the optimizer does not hold exactly the trainable parameters")


def parameter_groups(
    trainables: dict[str, nn.Parameter], recipe: Recipe, decays: Callable[[str], bool] | None = None
) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, norms) do not, except those whose name `decays` accepts, and names that contain
    one of `optim.no_decay` never do."""
    decay = recipe.optim.weight_decay
    if not decay:  # one group: half the collectives of ZeRO's per-group reductions
        return [{"params": list(trainables.values()), "weight_decay": 0.0}]

    def exempt(name: str, parameter: nn.Parameter) -> bool:
        vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
        return (vector and not (decays and decays(name))) or any(f in name for f in recipe.optim.no_decay)

    plain = [p for n, p in trainables.items() if exempt(n, p)]
    decayed = [p for n, p in trainables.items() if not exempt(n, p)]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def mark_leaves(model: nn.Module, sites: Sites) -> list[str]:
    """Make ZeRO-3 fetch each transformer block as a whole; returns the paths of the blocks.

    By default DeepSpeed hooks every Linear and LayerNorm: some twenty hooks and four gathers a block, forward and once
    more in backward, which at few tokens a step costs more than the arithmetic. One leaf a block needs one gather and
    keeps the memory bound of a block.

    Trained blocks of vision towers keep the many hooks. What a tower returns as hidden states (LLaVA reads the last
    but one) is taken before the hook of a leaf, and the gradients of that block would never be reduced: measured.
    So do trained blocks of towers that a model names in `runs_again`, since one forward runs them several times:
    DeepSpeed reduces a leaf after each backward pass through it, and stops at the second (measured).
    """
    from deepspeed.utils import set_z3_leaf_module

    modules = {_plain(name): module for name, module in model.named_modules()}
    images = tuple(f"{tower}." if tower else "" for tower, modality in sites.towers.items() if modality == "image")
    again = tuple(f"{tower}." for tower in getattr(model.get_base_model(), "runs_again", ()))
    leaves = []
    for path in block_paths(sites):
        if path not in modules:
            continue
        trained = any(p.requires_grad for p in modules[path].parameters())
        if trained and path.startswith(images + again):
            continue
        leaves.append(path)
        set_z3_leaf_module(modules[path], True)
        if trained:
            modules[path].register_forward_pre_hook(_input_with_gradient, with_kwargs=True)
    return leaves


def keep_frozen(engine: Any) -> None:
    """Below the persistence threshold, gather a frozen parameter once instead of after every step.

    DeepSpeed shards persistent parameters at the end of a step and gathers them again, since the optimiser has changed
    them. It has not changed the frozen ones, so those stay. `stage3_param_persistence_threshold` thereby trades memory
    for traffic, from all frozen weights sharded to all of them resident.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    optimizer = engine.optimizer
    kept = [p for p in optimizer.persistent_parameters if not p.requires_grad]
    optimizer.persistent_parameters = [p for p in optimizer.persistent_parameters if p.requires_grad]
    shard_all = optimizer._partition_all_parameters

    def shard_the_rest() -> None:
        resident = [p for p in kept if p.ds_status == ZeroParamStatus.AVAILABLE]
        for p in resident:  # what looks sharded already is left alone
            p.ds_status = ZeroParamStatus.NOT_AVAILABLE
            p.ds_active_sub_modules.clear()
        shard_all()
        for p in resident:
            p.ds_status = ZeroParamStatus.AVAILABLE

    optimizer._partition_all_parameters = shard_the_rest


def _input_with_gradient(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Let the first argument of a leaf with trainables require gradient, and be positional.

    DeepSpeed reduces a leaf's gradients in its full backward hook. torch runs that hook when the gradient of the
    positional inputs is complete, or, if none of them requires one, before the leaf's own backward: too early.
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


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
