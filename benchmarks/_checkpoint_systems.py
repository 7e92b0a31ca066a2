"""The ranks of benchmarks/checkpoint.py: one DeepSpeed engine with a LoRA, saved and resumed by each system in turn.

The engine is that of HF Trainer after a step, so that all systems save the very same run. A resume counts only
where the fingerprints of weights and moments are those from before, after everything that trains was set to 7.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 1
HIDDEN, LAYERS, VOCABULARY, LENGTH = 512, 4, 4000, 16


class Ours:
    """`mmpeft_ds.engine.checkpoint`, as training calls it: a resume begins with the search for a whole checkpoint."""

    title = "ours"
    background: Any = None

    def __init__(self, run: Run) -> None:
        from mmpeft_ds.engine.zero import fingerprint

        self.run = run
        self.fingerprint = fingerprint.of_frozen(run.engine.module)

    def save(self, folder: Path) -> None:
        from mmpeft_ds.engine import checkpoint
        from mmpeft_ds.engine.train_state import TrainState

        checkpoint.save(
            folder,
            self.run.engine,
            self.run.trainables,
            TrainState(step=STEPS),
            recipe={"benchmark": "checkpoint"},
            fingerprint=self.fingerprint,
            keep_last=1,
            background=self.background,
        )

    def load(self, folder: Path) -> None:
        from mmpeft_ds.engine import checkpoint

        path = checkpoint.newest_valid(folder)
        checkpoint.load(path, self.run.engine, self.run.trainables, self.fingerprint)


class OursInBackground(Ours):
    """The same with `engine.save_in_background`; `finish` waits as the next save would."""

    title = "ours, in the background"

    def __init__(self, run: Run) -> None:
        from mmpeft_ds.engine.background import Background

        super().__init__(run)
        self.background = Background()

    def finish(self) -> None:
        self.background.wait()


class DeepSpeed:
    """`engine.save_checkpoint` and `load_checkpoint` with their defaults: the frozen weights are saved too."""

    title = "DeepSpeed"
    lean = False

    def __init__(self, run: Run) -> None:
        self.engine = run.engine

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), exclude_frozen_parameters=self.lean)

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), load_module_strict=not self.lean)


class DeepSpeedLean(DeepSpeed):
    """The same with `exclude_frozen_parameters=True`."""

    title = "DeepSpeed, no frozen"
    lean = True


class Trainer:
    """What HF Trainer writes at `save_steps` and reads at `resume_from_checkpoint`: adapter, DeepSpeed's checkpoint
    without frozen weights, random states and its own state."""

    title = "HF Trainer"

    def __init__(self, run: Run) -> None:
        self.trainer = run.trainer

    def save(self, folder: Path) -> None:
        self.trainer.args.output_dir = str(folder)
        self.trainer._save_checkpoint(self.trainer.model, trial=None)

    def load(self, folder: Path) -> None:
        from transformers.integrations.deepspeed import deepspeed_load_checkpoint
        from transformers.trainer_callback import TrainerState

        path = folder / f"checkpoint-{self.trainer.state.global_step}"
        deepspeed_load_checkpoint(self.trainer.model_wrapped, str(path), load_module_strict=False)
        self.trainer._load_optimizer_and_scheduler(str(path))
        TrainerState.load_from_json(str(path / "trainer_state.json"))
        self.trainer._load_rng_state(str(path))


class Distributed:
    """torch.distributed.checkpoint of the flat masters and moments as DTensors, a third each and nothing else.

    It is the least that can be resumed at the same number of ranks: no names, no adapter, no configuration.
    """

    title = "torch DCP"

    def __init__(self, run: Run) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        from mmpeft_ds.distributed.collectives import world_size

        self.zero = run.engine.optimizer
        self.stage = run.engine.zero_optimization_stage()
        self.mesh = init_device_mesh("cpu", (world_size(),))

    @property
    def masters(self) -> list[Any]:
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return self.zero.single_partition_of_fp32_groups

    def state(self) -> dict[str, Any]:
        from torch.distributed.tensor import DTensor, Shard

        state = {}
        for i, master in enumerate(self.masters):
            held = self.zero.optimizer.state[master]
            for key, flat in {"weight": master, "exp_avg": held["exp_avg"], "exp_avg_sq": held["exp_avg_sq"]}.items():
                state[f"{i}.{key}"] = DTensor.from_local(flat.detach(), self.mesh, [Shard(0)], run_check=False)
            state[f"{i}.step"] = held["step"]
        return state

    def save(self, folder: Path) -> None:
        from torch.distributed import checkpoint

        checkpoint.save(self.state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        from torch.distributed import checkpoint

        checkpoint.load(self.state(), checkpoint_id=folder)
        if self.stage == 3:
            for part, master in zip(self.zero.fp16_partitioned_groups_flat, self.masters, strict=True):
                part.data.copy_(master.data)
            if self.zero.persistent_parameters:
                self.zero.persistent_parameters[0].partition(self.zero.persistent_parameters)
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
        else:
            self.zero.update_lp_params()


class DistributedAsync(Distributed):
    """Its `async_save`, which copies to the host and writes in a thread, with a process group of its own."""

    title = "torch DCP, async"

    def __init__(self, run: Run) -> None:
        import torch

        super().__init__(run)
        self.group, self.saving = torch.distributed.new_group(backend="gloo"), None

    def save(self, folder: Path) -> None:
        from torch.distributed import checkpoint

        self.saving = checkpoint.async_save(self.state(), checkpoint_id=folder, process_group=self.group)

    def finish(self) -> None:
        self.saving.result()


class Bytes:
    """The least that any of them can do: as many bytes as `ours` has, written by rank 0 at once and synced, and read
    into memory that is there already. Nothing is resumed from it."""

    title = "the bytes alone"

    def __init__(self, elements: int) -> None:
        self.data = bytearray(12 * elements)

    def save(self, folder: Path) -> None:
        self._on_rank0(folder / "bytes", "wb")

    def load(self, folder: Path) -> None:
        self._on_rank0(folder / "bytes", "rb")

    def _on_rank0(self, path: Path, mode: str) -> None:
        from mmpeft_ds.distributed.collectives import rank

        if rank() == 0:
            with open(path, mode, buffering=0) as file:
                if mode == "rb":
                    file.readinto(self.data)
                else:
                    file.write(self.data)
                    os.fsync(file.fileno())


SYSTEMS = [OursInBackground, Ours, DeepSpeed, DeepSpeedLean, Trainer, Distributed, DistributedAsync]


class Run:
    """HF Trainer with DeepSpeed and a LoRA on a random language model, after a step.

    Attributes:
        trainer, engine: of transformers and of DeepSpeed.
        trainables: name -> parameter that trains.
    """

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        import accelerate
        import peft
        import torch
        import transformers

        from mmpeft_ds.distributed import processes

        processes.quiet()
        torch.set_num_threads(1)
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # TrainingArguments names no backend when it starts DeepSpeed
        accelerate.PartialState(backend="gloo")
        # As transformers' guide has it for ZeRO-3; without it the Trainer saves the frozen weights as well.
        zero = {
            "stage": args.stage,
            **({"stage3_gather_16bit_weights_on_model_save": True} if args.stage == 3 else {}),
        }
        options = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=STEPS,
            learning_rate=1e-3,
            accelerator_config={"use_configured_state": True},
            save_strategy="no",
            logging_steps=10**9,
            report_to=[],
            disable_tqdm=True,
            deepspeed={
                "zero_optimization": zero,
                "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
            },
        )
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            vocab_size=VOCABULARY,
        )
        base = transformers.AutoModelForCausalLM.from_config(config)
        model = peft.get_peft_model(base, peft.LoraConfig(r=args.r, target_modules="all-linear"))
        ids = torch.randint(VOCABULARY, (64, LENGTH))
        data = [{"input_ids": row, "labels": row} for row in ids]
        self.trainer = transformers.Trainer(model=model, args=options, train_dataset=data)
        self.trainer.train()
        self.engine = self.trainer.model_wrapped
        self.trainables = {n: p for n, p in self.engine.module.named_parameters() if p.requires_grad}

    def held(self) -> Any:
        """Fingerprints of all that trains. Collective."""
        from mmpeft_ds.engine.checkpoint import Held

        return Held.of(self.engine, self.trainables)

    def spoil(self) -> None:
        """Set parameters, masters and moments to 7. Collective."""
        import torch

        from mmpeft_ds.engine.zero import state as zero_state

        zero_state.ensure_optimizer_state(self.engine)  # DeepSpeed's load unlinks the parameters from their moments
        keys = ("weight", *zero_state.moments(self.engine))
        with torch.no_grad():
            for parameter in self.trainables.values():
                value = torch.full(zero_state.full_shape(parameter), 7.0)
                zero_state.write_full(self.engine, parameter, dict.fromkeys(keys, value))
                zero_state.write_parameter(parameter, value)


def measure(args: argparse.Namespace) -> dict:
    """Every system's rounds: CPU seconds of all ranks together until all is written, seconds from barrier to barrier
    for which a save keeps the training and until all is written, bytes."""
    from mmpeft_ds.distributed.collectives import rank
    from mmpeft_ds.engine.zero import state as zero_state

    folder = Path(args.out).with_suffix("")
    run = Run(args, f"{folder}.trainer")
    before, elements = run.held(), sum(map(zero_state.numel, run.trainables.values()))
    systems = [*(system(run) for system in SYSTEMS), Bytes(elements)]
    rounds: dict[str, list[dict]] = {system.title: [] for system in systems}
    for turn in range(args.runs + 1):  # the first one imports and compiles, and does not count
        for system in systems:
            if rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            saved = timed(lambda system=system: system.save(folder))
            finished = timed(getattr(system, "finish", lambda: None))
            saved = {
                "wait": saved["wall"],
                "own": saved["thread"],
                **{key: saved[key] + finished[key] for key in saved},
            }
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            resumes = not isinstance(system, Bytes)
            if resumes:
                run.spoil()
                if run.held() == before:
                    raise RuntimeError("what trains was not spoilt before the resume")
            loaded = timed(lambda system=system: system.load(folder))
            if resumes and run.held() != before:
                raise RuntimeError(f"{system.title} does not resume what it saved")
            if turn:
                entry = {f"{verb}_{k}": v for verb, t in (("save", saved), ("resume", loaded)) for k, v in t.items()}
                rounds[system.title].append(entry | {"bytes": size})
    if rank() == 0:
        shutil.rmtree(folder)
    frozen = sum(map(zero_state.numel, run.engine.module.parameters())) - elements
    tensors = len(run.trainables)
    return {"rank": rank(), "elements": elements, "tensors": tensors, "frozen": frozen, "rounds": rounds}


def timed(work: Callable[[], None]) -> dict[str, float]:
    """CPU seconds of all ranks, seconds from barrier to barrier, and CPU seconds of the training's own thread, on the
    rank that has most. Collective."""
    import torch

    from mmpeft_ds.distributed import collectives

    torch.distributed.barrier()
    began, used, own = time.perf_counter(), _cpu(), time.thread_time()
    work()
    own, used = time.thread_time() - own, _cpu() - used
    torch.distributed.barrier()
    seconds = time.perf_counter() - began
    (most,) = collectives.max_scalars([round(1e6 * own)])
    return {"cpu": collectives.sum_scalars([used], torch.device("cpu"))[0], "wall": seconds, "thread": most / 1e6}


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
