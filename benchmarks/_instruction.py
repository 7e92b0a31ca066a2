"""Instruction tuning on one rank of `trainer.py --instruction`: our engine, and HF Trainer + peft + deepspeed.

Both train the model and samples that `_talks.py` writes, with LoRA in all linears of the language model, AdamW,
float32. The timed steps are one whole epoch of either: the same samples, each system in its own order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

TARGETS = r".*\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
RATE, RANK, SEED = 1e-3, 8, 0
PER_RANK = 16  # samples of a step, as in LLaVA's scripts
WARM = 2  # steps before the timed epoch
CHECKED = 4  # steps whose losses are compared


def recipe_of(folder: Path, stage: int, ranks: int, pack: int, same: bool) -> Any:
    """Our recipe, as a user would write it; for `same` losses images are scaled by Pillow, as the peer's may be."""
    from mmpeft_ds import recipe as recipes

    task = {"name": "instruction", "loss": "token", "max_new_tokens": 0}
    raw = {
        "run_dir": str(folder / "run"),
        "seed": SEED,
        "backbone": {"name": "mllm", "model": str(folder / "model"), "max_text_length": 2048}
        | ({"image_backend": "pil"} if same else {}),
        "method": {"name": "lora", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": TARGETS},
        "data": {
            "sources": [{"dir": str(folder / "data"), "split": "train", "task": task}],
            "global_batch": PER_RANK * ranks,
            "pack": pack,
            "workers": 1,
            "verify": "size",
        },
        "optim": {"lr": RATE, "weight_decay": 0.0, "max_steps": 10**6, "schedule": "constant", "warmup": 0.0},
        "engine": {"deepspeed": f"ds_configs/{'zero3_cpu' if stage == 3 else f'zero{stage}'}.json", "threads": 1},
    }
    path = folder / f"recipe-{stage}-{ranks}.yaml"
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(yaml.safe_dump(raw))
    partial.replace(path)
    return recipes.load(path, [])


def steps_of(stream: Any, warm: int, timed: int) -> Any:
    """The last `warm` steps of an epoch, then `timed` of the next."""
    yield from stream.epoch(0, stream.steps_per_epoch(0) - warm)
    for _, step in zip(range(timed), stream.epoch(1), strict=False):
        yield step


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Steps through our stream and stepper; `--same` gives losses, and the samples of each step."""
    from mmpeft_ds.distributed import processes
    from mmpeft_ds.distributed.collectives import world_size

    parts = _Ours(args, processes)
    warm, timed = (0, CHECKED) if args.same else (WARM, args.steps)
    rows, ends, used, numbers = [], [], [], []
    parts.stream.wait_for_workers()  # until then this process would make batches, which is no part of a later step
    steps, began = steps_of(parts.stream, warm, timed), time.perf_counter()
    for step in steps:
        rows.append(parts.stepper.train_step(step, time.perf_counter() - began))
        ends.append(began := time.perf_counter())
        used.append(processor_seconds())
        numbers.append([r["number"] for b in step.micro for r, w in zip(b.records, b.weight, strict=True) if w > 0])
    parts.stream.close()
    result: dict[str, Any] = {"rank": parts.ranks.rank}
    if args.same:
        everyone: list[Any] = [None] * world_size()
        torch.distributed.all_gather_object(everyone, numbers)
        order = [sum(of_step, []) for of_step in zip(*everyone, strict=True)]
        return {**result, "losses": [row["loss"] for row in rows], "order": order}
    seconds, cpu = ends[-1] - ends[warm - 1], used[-1] - used[warm - 1]
    return (
        result
        | _rates(seconds, cpu, timed, sum(row["weight"] for row in rows[warm:]))
        | {
            "padding": sum(row["padding"] for row in rows[warm:]) / timed,
            "samples": sum(row["samples"] for row in rows[warm:]),
            "rss_mib": max(rows[-1]["rss_mib"]),
        }
    )


def _rates(seconds: float, cpu: float, steps: int, tokens: float) -> dict[str, float]:
    """Rates by the clock, and by the processor time of all ranks and their loader processes. Collective."""
    total = torch.tensor(cpu).double()
    torch.distributed.all_reduce(total)
    per_step = {"step_seconds": seconds / steps, "cpu_step_seconds": float(total) / steps}
    return (
        {"tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / float(total)}
        | per_step
        | {"tokens": tokens}
    )


def processor_seconds() -> float:
    """Of this process and all that it has started, those that have ended too."""
    seconds, ended = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            seconds += sum(child.cpu_times()[:2])
    return seconds + ended.ru_utime + ended.ru_stime


class _Ours:
    """Stream and stepper of our engine."""

    def __init__(self, args: argparse.Namespace, processes: Any):
        from mmpeft_ds.data.bad_budget import BadBudget
        from mmpeft_ds.engine.assembly.build import build
        from mmpeft_ds.engine.assembly.resolve import resolve
        from mmpeft_ds.engine.step import Stepper
        from mmpeft_ds.engine.streams import make_stream
        from mmpeft_ds.engine.train_state import TrainState

        world = int(os.environ.get("WORLD_SIZE", "1"))
        recipe = recipe_of(Path(args.folder), args.stage, world, args.pack, args.same)
        self.ranks = processes.start(1, recipe.seed)
        self.resolved = resolve(recipe)
        self.stream = make_stream(self.resolved, self.resolved.train, self.ranks, train=True)
        self.built = build(self.resolved, self.ranks)
        self.stepper = Stepper(self.resolved, self.built, self.ranks, 10**6, TrainState(), BadBudget(0, 1))


def host(args: argparse.Namespace) -> dict[str, Any]:
    """One rank: how the time of a step is divided between the model's arithmetic and everything else."""
    from benchmarks._host_time import Split
    from mmpeft_ds.distributed import processes

    parts = _Ours(args, processes)
    split = Split(parts.built)
    rows = []
    for step in steps_of(parts.stream, WARM, args.steps):
        split.begin()
        parts.stepper.train_step(step, 0.0)
        rows.append(split.end())
    parts.stream.close()
    return {"rank": parts.ranks.rank, "steps": rows[WARM:]}


# ----------------------------------------------------------------------------------------------------- the peer


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """HF Trainer on the same samples, padded to the longest of a batch; `--group` sorts them by length."""
    import accelerate
    import peft
    import transformers
    from transformers.trainer_pt_utils import LengthGroupedSampler

    from mmpeft_ds.distributed import processes

    processes.quiet()
    torch.set_num_threads(1)
    # TrainingArguments names no backend when it starts DeepSpeed; without a GPU accelerate then counts one process.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    accelerate.PartialState(backend="nccl" if torch.cuda.is_available() else "gloo")
    folder, steps = Path(args.folder), CHECKED if args.same else WARM + args.steps
    options = transformers.TrainingArguments(**_arguments(args, steps))
    base = transformers.AutoModelForImageTextToText.from_pretrained(folder / "model", attn_implementation="sdpa")
    torch.manual_seed(SEED)  # as our build does, so that adapters start alike
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=TARGETS)
    )
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = Talks(folder, args.same)
    losses, times, used, counts = [], [], [], []

    class Order(torch.utils.data.Sampler):
        """Some samples for the steps before, then an epoch by the sampler of the Trainer."""

        def __iter__(self):
            if args.same:
                yield from sum(json.loads(Path(args.order).read_text()), [])
                return
            yield from range(WARM * PER_RANK * world)
            lengths = json.loads((folder / "lengths.json").read_text())
            draw = torch.Generator().manual_seed(SEED)
            yield from (
                LengthGroupedSampler(PER_RANK, lengths=lengths, generator=draw)
                if args.group
                else torch.utils.data.RandomSampler(data, generator=draw)
            )

        def __len__(self):
            return steps * PER_RANK * world

    class Peer(transformers.Trainer):
        def compute_loss(self, model, inputs, **options):
            counts.append([(inputs["labels"] != -100).sum(), inputs["attention_mask"].float().mean()])
            loss = super().compute_loss(model, inputs, **options)
            losses.append(loss.detach())
            return loss

        def training_step(self, *a, **k):
            times.append(time.perf_counter())
            used.append(processor_seconds())
            return super().training_step(*a, **k)

        def _get_train_sampler(self, *a, **k):
            return Order()

    Peer(model=model, args=options, train_dataset=data, data_collator=data.collate).train()
    first = min(WARM, len(times) - 1)
    seconds, cpu = time.perf_counter() - times[first], processor_seconds() - used[first]
    table = torch.tensor([[float(loss), *map(float, c)] for loss, c in zip(losses, counts, strict=True)]).double()
    torch.distributed.all_reduce(table)
    if args.same:
        return {"rank": rank, "losses": (table[:, 0] / world).tolist()}
    table = table[WARM:]
    return (
        {"rank": rank}
        | _rates(seconds, cpu, args.steps, float(table[:, 1].sum()))
        | {
            "padding": 1 - float(table[:, 2].mean()) / world,
            "samples": args.steps * PER_RANK * world,
            "rss_mib": round(psutil.Process().memory_info().rss / 2**20),
        }
    )


def _arguments(args: argparse.Namespace, steps: int) -> dict[str, Any]:
    zero = {"stage": args.stage, **({"stage3_gather_16bit_weights_on_model_save": False} if args.stage == 3 else {})}
    adam = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict(
        output_dir=args.out + ".hf",
        per_device_train_batch_size=PER_RANK,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        accelerator_config={"use_configured_state": True},
        seed=SEED,
        logging_steps=10**9,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=1,
        deepspeed={
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": adam},
            **dict.fromkeys(auto, "auto"),
        },
    )


class Talks(torch.utils.data.Dataset):
    """Map-style data set: an item is a conversation in tokens, and its image as the model's processor makes it."""

    def __init__(self, folder: Path, same: bool):
        from transformers import AutoConfig, AutoImageProcessor

        from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
        from mmpeft_ds.data.manifest import Manifest
        from mmpeft_ds.data.shards import ShardReader, members

        self.backbone = ENTRY(Options(str(folder / "model"), max_text_length=2048), None)
        self.config = AutoConfig.from_pretrained(folder / "model")
        self.processor = AutoImageProcessor.from_pretrained(folder / "model", backend="pil" if same else None)
        manifest = Manifest.load(folder / "data")
        reader = ShardReader(manifest, "train")
        self.items: list[Any] = []
        for shard, info in enumerate(manifest.shards("train")):
            pieces = reader.read([(shard, i) for i in range(info.samples)])
            self.items += [members(piece)[1] for piece in pieces]
        reader.close()
        self.items.sort(key=lambda item: json.loads(item["json"])["number"])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        from mmpeft_ds.data.decode import decode
        from mmpeft_ds.tasks.instruction.task import ENTRY as Instruction

        item = self.items[i]
        task = Instruction(Instruction.Options(max_new_tokens=0), None)
        texts = self.backbone.collate_texts(task.read(json.loads(item["json"]), None)[0])
        ids, labels, image = texts["input_ids"][0], texts["labels"][0], {}
        if "jpg" in item:
            made = self.processor(
                images=[decode(item["jpg"]).numpy()], input_data_format="channels_first", return_tensors="pt"
            )
            image = {name: made[name] for name in ("pixel_values", "image_grid_thw") if name in made}
        places = ids == self.config.image_token_id
        times = torch.where(places, self._tokens(image), 1)
        return {"input_ids": ids.repeat_interleave(times), "labels": labels.repeat_interleave(times), **image}

    def _tokens(self, image: dict[str, torch.Tensor]) -> int:
        if not image:
            return 1  # a text has no place for it
        if "image_grid_thw" in image:
            return int(image["image_grid_thw"].prod()) // self.config.vision_config.spatial_merge_size**2
        return (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2

    def collate(self, items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A batch padded to its longest."""
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([item["input_ids"] for item in items], batch_first=True)
        mask = pad([torch.ones_like(item["input_ids"]) for item in items], batch_first=True)
        labels = pad([item["labels"] for item in items], batch_first=True, padding_value=-100)
        names = [name for name in ("pixel_values", "image_grid_thw") if any(name in item for item in items)]
        images = {name: torch.cat([item[name] for item in items if name in item]) for name in names}
        if "image_grid_thw" in images:
            images["mm_token_type_ids"] = (ids == self.config.image_token_id).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **images}


SYSTEMS = {"ours": ours, "peer": peer, "host": host}
