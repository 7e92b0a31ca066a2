"""Options of the recipe's `optim`, `engine` and `monitor` sections."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from mmpeft_ds.errors import BadInput

ATTENTION = ("auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass
class EwcOptions:
    """Elastic weight consolidation: stay near the optimum of an earlier task where that task's loss is steep.

    Attributes:
        file: written by launchers/fisher.py for a run of the earlier task; empty: off.
        strength: lambda of lambda * sum F (theta - theta*)^2, without a half.
        start: a new run starts at theta*, where the file knows the parameter.
        allow_missing: leave parameters free whose shape has changed, such as a head for other classes, and accept
            that some of the file are not in the model.
    """

    file: str = ""
    strength: float = 1.0
    start: bool = True
    allow_missing: bool = False


@dataclass
class GroupOptions:
    """Settings of the trained parameters whose names fit a pattern of `optim.groups`.

    Attributes:
        lr: peak learning rate; null: as `optim.lr`. The schedule is that of all.
        weight_decay: null: as for all, so matrices alone decay.
        optimizer: under `optim.name: muon`, who steps the matrices among them; null: muon for those of adapters.
    """

    lr: float | None = None
    weight_decay: float | None = None
    optimizer: Literal["muon", "adamw"] | None = None


@dataclass
class MuonOptions:
    """Options of `optim.name: muon`, as in `torch.optim.Muon`; its `lr` and `weight_decay` are those of `optim`.

    Attributes:
        momentum: weight of the past in the average of gradients.
        nesterov: the gradient of the step is averaged in once more.
        ns_steps: Newton-Schulz iterations by which a matrix is orthogonalised.
        adjust_lr_fn: how the rate follows the shape of a matrix. `match_rms_adamw` makes updates as large as AdamW's,
            so that its learning rates fit; `original` is torch's default, by which rates are some ten times higher.
        adamw_lr: peak learning rate of what AdamW steps; null: as `optim.lr`.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    adamw_lr: float | None = None


@dataclass
class OptimOptions:
    """Optimiser and schedule, of the trainable parameters only.

    Attributes:
        name: `adamw` shrinks the weights by the decay, apart from the gradient; `adam` and `sgd` add decay times
            weight to the gradient (L2). `muon` orthogonalises the update of each matrix of an adapter; vectors,
            embeddings, heads and tensors of three axes are stepped by `adamw`.
        lr: peak learning rate.
        weight_decay: applied to matrices; biases, norms and names in `no_decay` are excluded.
        no_decay: further parameter name fragments without decay.
        groups: shell-style pattern of full parameter names, such as `*.lora_B.*` -> `lr` and `weight_decay` of its
            own. The first pattern that fits decides; one that fits nothing is refused.
        lora_plus: learning rate of LoRA's `up` (`lora_B`), and of vectors, as a multiple of `lr` (LoRA+, arXiv
            2402.12354); 0 = off. Factors of embeddings get 1e-6, as in peft.
        betas: moment decay rates of `adamw` and `adam`, and of what `muon` leaves to AdamW.
        eps: epsilon, as `betas`.
        momentum: of `sgd`, without Nesterov's.
        muon: of `muon`.
        epochs: passes over the data; ignored where `max_steps` is set.
        max_steps: optimizer steps of the run, 0 = from `epochs`.
        warmup: warm-up steps if >= 1, else that share of all steps; `cosine_epoch` has its own.
        warmup_lr: learning rate of the first epoch under `cosine_epoch`.
        schedule: decay after warm-up to `min_lr_ratio` times lr, per step; `cosine_epoch` per epoch, after one epoch
            at `warmup_lr`, as the few-shot baselines were published.
        min_lr_ratio: final learning rate as a share of the peak.
        clip: maximum global gradient norm, 0 = off.
        accumulation: micro-steps per optimizer step; `data.global_batch` is split by it.
        ewc: elastic weight consolidation towards an earlier task.
    """

    name: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    no_decay: list[str] = field(default_factory=list)
    groups: dict[str, GroupOptions] = field(default_factory=dict)
    lora_plus: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    muon: MuonOptions = field(default_factory=MuonOptions)
    epochs: int = 1
    max_steps: int = 0
    warmup: float = 0.05
    warmup_lr: float = 1e-5
    schedule: Literal["linear", "cosine", "constant", "cosine_epoch"] = "linear"
    min_lr_ratio: float = 0.0
    clip: float = 1.0
    accumulation: int = 1
    ewc: EwcOptions = field(default_factory=EwcOptions)


@dataclass
class FrozenCacheOptions:
    """Values of frozen towers are computed once and kept on disk; `true` alone takes the defaults.

    Attributes:
        on: whether they are.
        dir: directory, which runs may share; relative to the working directory.
        limit: GiB of the directory from which on nothing is written any more, 0 = none.
    """

    on: bool = True
    dir: str = ".cache/frozen"
    limit: float = 0.0

    def __post_init__(self) -> None:
        if not self.dir.strip() or self.limit < 0:
            raise BadInput("cache_frozen: `dir` must name a directory, and `limit` be 0 (none) or more GiB.")


@dataclass
class EngineOptions:
    """DeepSpeed, precision, checkpoints.

    Attributes:
        deepspeed: path of a ds_configs JSON (zero_optimization, offload, communication only), relative to the
            working directory or the repository.
        dtype: of the frozen base; trainables are float32 at every stage.
        train_dropout: run the model with dropout in the trained part; frozen towers stay in eval mode regardless.
        gradient_checkpointing: recompute blocks in backward.
        attention: implementation: one of `ATTENTION`, or `owner/name` of a kernel on the hub, as transformers takes
            them. `auto` is flash-attn on CUDA where it is installed, the base is half precision, and backbone and
            method work with it; else SDPA, and eager where a family has no other.
        matmul: how float32 matrices are multiplied on CUDA: `tf32` rounds the factors to 10 bits and runs on tensor
            cores, `float32` does not. Graphs are decided in float32 either way.
        adapter_matmul: dtype in which adapters multiply. `bfloat16` needs a bfloat16 base: float32 parameters are
            rounded for each product, and their gradients, moments and checkpoints stay float32.
        cache_frozen: compute what lies below the lowest trainable once per image, and keep it on disk for later epochs
            and runs, see docs/frozen_cache.md; `true`, or a mapping with the keys of `engine.cache_frozen`.
        tower_batch: images that a frozen vision tower sees at a time, filled up with the last one, so that what it
            gives for an image never depends on its batch; 0: all of a micro-batch, with `cache_frozen` 8.
        compile: fuse the arithmetic of adapter layers with `torch.compile`, below ZeRO stage 3.
        save_every: optimizer steps between checkpoints, 0 = at every evaluation and at the end.
        save_in_background: gather and write checkpoints from copies in host memory while the training goes on, see
            docs/resume.md for the memory; a save waits for the one before.
        keep_last: checkpoints kept beside the best.
        eval_every: optimizer steps between evaluations, 0 = at the end of every epoch.
        patience: evaluations without a better main score before the run stops, 0 = never.
        stop_grace: seconds within which a signalled run has saved and left.
        stall: seconds after which a rank that waits for another says for whom, since when and where.
        timeout: seconds after which ranks that wait for one that is missing or stuck end.
        max_skipped: steps skipped in a row for a non-finite loss or gradient before the run stops.
        threads: torch threads per rank, 0 = physical cores / ranks of the machine.
    """

    deepspeed: str = "ds_configs/zero3.json"
    dtype: Literal["float32", "bfloat16"] = "float32"
    train_dropout: bool = False
    gradient_checkpointing: bool = False
    attention: str = "auto"
    matmul: Literal["tf32", "float32"] = "tf32"
    adapter_matmul: Literal["float32", "bfloat16"] = "float32"
    cache_frozen: FrozenCacheOptions = field(default_factory=lambda: FrozenCacheOptions(on=False))
    tower_batch: int = 0
    compile: bool = False
    save_every: int = 0
    save_in_background: bool = False
    keep_last: int = 2
    eval_every: int = 0
    patience: int = 0
    stop_grace: float = 30.0
    stall: float = 60.0
    timeout: float = 1800.0
    max_skipped: int = 10
    threads: int = 0

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", self.attention):
            raise BadInput(
                f"attention: {self.attention!r} is unknown. Known: {', '.join(ATTENTION)}, or owner/name of a kernel "
                "on the hub."
            )


@dataclass
class MonitorOptions:
    """Curves, pages of predictions and TensorBoard files of a run.

    Attributes:
        tensorboard: write event files.
        every: steps between TensorBoard scalars; metrics.jsonl has every step.
        samples: predictions shown with their images at each evaluation.
        graph_every: steps between measurements of the graph over a batch, which wait for the device; 0 = none.
    """

    tensorboard: bool = True
    every: int = 1
    samples: int = 16
    graph_every: int = 10

    def __post_init__(self) -> None:
        if self.graph_every < 0:
            raise BadInput(f"graph_every: {self.graph_every} is below 0. Give a number of steps, or 0 for never.")
