#!/usr/bin/env python
"""Our engine beside HF Trainer + peft + accelerate + deepspeed: the quickstart's model, data and batch, from pixels.

    python benchmarks/trainer.py             ZeRO-3 and ZeRO-1, 3 runs each in turn; writes docs/benchmarks/trainer.*
    python benchmarks/trainer.py --runs 1 --steps 20
    python benchmarks/trainer.py --cache     ours besides with `engine.cache_frozen`, values written before
    python benchmarks/trainer.py --same      only the losses of both on the very same batches, and how far each is from
                                             plain torch in float64
    python benchmarks/trainer.py --instruction --repeats 3    instruction tuning; writes docs/benchmarks/instruction.*

The peer trains as its users do: a map-style data set of (image, question, answer), one image a question. Ours reads
the shards, runs the vision tower once per image, and ends the last text layer at the position that the head reads.
Both have the same towers and the same routed LoRA through the same
tuner, AdamW, 2 ranks x 1 thread. A sample is a question.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _launch, _page  # noqa: E402

QUESTIONS_PER_RANK = 38  # 8 images of easy-VQA have 77 questions on average
IMAGES_PER_RANK = 4
STEPS = 60
RANKS = 2
WARM = 5  # steps left out of the timing


# ------------------------------------------------------------------------------------------------- the systems


def ours(args: argparse.Namespace) -> dict:
    """Steps through our stream and stepper."""
    from mmpeft_ds import console

    with console.quick_imports():  # as launchers/train.py does
        from mmpeft_ds.data.bad_budget import BadBudget
        from mmpeft_ds.distributed import processes
        from mmpeft_ds.engine import frozen_images
        from mmpeft_ds.engine.assembly.build import build
        from mmpeft_ds.engine.assembly.resolve import resolve
        from mmpeft_ds.engine.step import Stepper
        from mmpeft_ds.engine.streams import make_stream
        from mmpeft_ds.engine.train_state import TrainState

    recipe = _recipe(args)
    ranks = processes.start(recipe.engine.threads, recipe.seed)
    resolved = resolve(recipe)
    stream = make_stream(resolved, resolved.train, ranks, train=True)
    built = build(resolved, ranks)
    built.frozen = frozen_images.of_built(resolved, built, ranks)
    stream.keep_frozen(built.frozen and built.frozen.spec)
    budget = BadBudget(0, 1)
    stepper = Stepper(resolved, built, ranks, args.steps, TrainState(), budget)
    rows, ends = [], []
    steps = stream.epoch(0)
    while len(rows) < args.steps:
        began = time.perf_counter()
        step = next(steps)
        rows.append(stepper.train_step(step, time.perf_counter() - began))
        ends.append(time.perf_counter())
    samples = sum(row["samples"] for row in rows[WARM:])
    stream.close()
    return {
        "rank": ranks.rank,
        "losses": [row["loss"] for row in rows],
        "samples_per_second": samples / (ends[-1] - ends[WARM - 1]),
        "step_seconds": (ends[-1] - ends[WARM - 1]) / (args.steps - WARM),
        "rss_mib": rows[-1]["peak_rss_mib"],
        "computed": sum(row.get("images_computed", 0) for row in rows),
    }


def peer(args: argparse.Namespace) -> dict:
    """HF Trainer with the same model; `--same` gives it our batches in place of its own."""
    import accelerate
    import torch

    from mmpeft_ds.distributed import processes
    from mmpeft_ds.distributed.own_process import Memory
    from mmpeft_ds.engine.assembly.resolve import attach, resolve

    recipe = _recipe(args)
    processes.quiet()
    torch.set_num_threads(1)
    resolved = resolve(recipe)
    # TrainingArguments names no backend when it starts DeepSpeed; without a GPU accelerate then counts one process.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    accelerate.PartialState(backend="nccl" if torch.cuda.is_available() else "gloo")
    options = _training_arguments(args, recipe)  # before the model: at stage 3 they have it built in shards
    torch.manual_seed(recipe.seed)
    base = resolved.backbone.build()
    torch.manual_seed(recipe.seed)
    model = attach(resolved, base).eval()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if args.same:
        data, collate = _our_batches(recipe, resolved, world, args.steps), _first
    else:
        data, collate = Questions(resolved), Collate(resolved.backbone)
    hf = _trainer_class(args, resolved)(model=model, args=options, train_dataset=data, data_collator=collate)
    hf.train()
    seconds = time.perf_counter() - hf.began[WARM]
    return {
        "rank": rank,
        "losses": hf.losses,
        "samples_per_second": QUESTIONS_PER_RANK * world * (args.steps - WARM) / seconds,
        "step_seconds": seconds / (args.steps - WARM),
        "rss_mib": [round(Memory.most() / 2**20)],
    }


def _training_arguments(args: argparse.Namespace, recipe):
    """The recipe's settings as HF Trainer has them."""
    import transformers

    zero = {"stage": args.stage, **({"stage3_gather_16bit_weights_on_model_save": False} if args.stage == 3 else {})}
    adam = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return transformers.TrainingArguments(
        output_dir=args.out + ".hf",
        per_device_train_batch_size=1 if args.same else QUESTIONS_PER_RANK,
        max_steps=args.steps,
        learning_rate=recipe.optim.lr,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=recipe.optim.clip,
        accelerator_config={"use_configured_state": True},
        seed=recipe.seed,
        logging_steps=10**9,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0 if args.same else recipe.data.workers,
        deepspeed={
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": adam},
            **dict.fromkeys(batch, "auto"),
        },
    )


def _trainer_class(args: argparse.Namespace, resolved):
    """HF Trainer that notes when each step `began` and the `losses`, means over all ranks."""
    import torch
    import transformers

    def of_our_batch(model, batch):
        task = resolved.train[0].task
        total = task.loss(model(**resolved.backbone.inputs(batch)), batch)
        weight = torch.tensor(task.weight(batch))
        torch.distributed.all_reduce(weight)
        return total * torch.distributed.get_world_size() / weight

    def of_questions(model, labels, **inputs):
        # stock layers to their end, as a user's own composition of both towers has them
        logits = model(**inputs, return_last_hidden_state=True).logits
        return torch.nn.functional.cross_entropy(logits, labels)

    class Peer(transformers.Trainer):
        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            self.began, self.losses = [], []

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            model.eval()  # no dropout, as in the recipe
            loss = (of_our_batch if args.same else of_questions)(model, **inputs)
            mean = loss.detach().clone()
            torch.distributed.all_reduce(mean)
            self.losses.append(mean.item() / torch.distributed.get_world_size())
            return loss

        def training_step(self, *a, **k):
            self.began.append(time.perf_counter())
            return super().training_step(*a, **k)

        def _get_train_sampler(self, *a, **k):
            if args.same:
                return torch.utils.data.SequentialSampler(self.train_dataset)
            return super()._get_train_sampler(*a, **k)

    return Peer


def plain(args: argparse.Namespace) -> dict:
    """The same batches without DeepSpeed, in `args.dtype`."""
    from benchmarks._reference import reference
    from mmpeft_ds.distributed import processes
    from mmpeft_ds.engine.assembly.resolve import resolve

    recipe = _recipe(args)
    ranks = processes.start(recipe.engine.threads, recipe.seed)
    batches = [item["batch"] for item in _our_batches(recipe, resolve(recipe), RANKS, args.steps)]
    return {"rank": ranks.rank, "losses": reference(recipe, batches, RANKS, args.steps, args.dtype)}


class Questions:
    """Map-style data set of the train split: one (image, question, class) an item; the image is decoded for each."""

    def __init__(self, resolved):
        import torch

        from mmpeft_ds.data.shards import ShardReader, members

        source = resolved.train[0]
        reader = ShardReader(source.manifest, source.options.split)
        self.transform = resolved.backbone.image_transform(True)
        self.items, self.generator = [], torch.Generator()
        for shard, info in enumerate(source.manifest.shards(source.options.split)):
            for piece in reader.read([(shard, i) for i in range(info.samples)]):
                _, parts = members(piece)
                image = next(v for k, v in parts.items() if k in ("png", "jpg"))
                texts, targets = source.task.read(json.loads(parts["json"]), self.generator)
                labels = source.task.collate(targets)["label"].tolist()
                self.items += [(image, text, label) for text, label in zip(texts, labels, strict=True)]
        reader.close()

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        from mmpeft_ds.data.decode import decode

        image, text, label = self.items[i]
        return self.transform(decode(image), self.generator), text, label


class Collate:
    """Stack images, tokenize questions."""

    def __init__(self, backbone):
        self.backbone = backbone

    def __call__(self, items):
        import torch

        images, texts, labels = zip(*items, strict=True)
        return {
            **self.backbone.collate_images(list(images)),
            **self.backbone.collate_texts(list(texts)),
            "labels": torch.tensor(labels),
        }


def _first(items):
    return items[0]


def _our_batches(recipe, resolved, world: int, steps: int) -> list:
    """Our stream's batches in the order in which accelerate hands them out: rank by rank, step by step."""
    import torch

    from mmpeft_ds.distributed import processes
    from mmpeft_ds.engine.streams import make_stream

    recipe.data.workers = 0
    cpu = torch.device("cpu")
    streams = [
        make_stream(resolved, resolved.train, processes.Ranks(rank, world, rank, world, cpu), train=True)
        for rank in range(world)
    ]
    epochs = [stream.epoch(0) for stream in streams]
    return [{"batch": next(epoch).micro[0]} for _ in range(steps) for epoch in epochs]


def _recipe(args: argparse.Namespace):
    from mmpeft_ds import recipe as recipes

    kept = f"engine.cache_frozen={{dir: {args.kept}}}"
    return recipes.load(
        ROOT / "recipes" / "quickstart.yaml",
        [
            f"data.sources.0.dir={args.data}",
            f"data.validation.0.dir={args.data}",
            f"engine.deepspeed=ds_configs/{'zero3_cpu' if args.stage == 3 else f'zero{args.stage}'}.json",
            f"optim.max_steps={args.steps}",
            "optim.warmup=0",
            "data.verify=size",
            *([kept, f"engine.tower_batch={IMAGES_PER_RANK}"] if args.kept else []),
        ],
    )


# -------------------------------------------------------------------------------------------------- the driver


def launch(
    system: str, stage: int, args: argparse.Namespace, same: bool = False, dtype: str = "", kept: str = ""
) -> dict:
    """One system in its own launch of 2 ranks x 1 thread; with a `dtype`, of one rank. `kept`: directory of values of
    the frozen tower."""
    arguments = ["--system", system, "--stage", str(stage), "--steps", str(args.steps), "--data", args.data]
    arguments += [*(["--same"] if same else []), *(["--dtype", dtype] if dtype else [])]
    arguments += ["--kept", kept] if kept else []
    return _launch.launch(__file__, arguments, ROOT / "runs" / "benchmark-trainer.json", 1 if dtype else RANKS)


def compare(args: argparse.Namespace) -> dict:
    """Losses of all systems on the same batches: by how much both differ, and each from plain torch in float64."""
    losses = {dtype: launch("plain", 1, args, same=True, dtype=dtype)["losses"] for dtype in ("float64", "float32")}
    apart = {"plain float32": _apart(losses["float64"], losses["float32"])}
    print(f"plain torch in float32: at most {apart['plain float32']:.1e} from float64", flush=True)
    for stage in args.stages:
        same = {system: launch(system, stage, args, same=True)["losses"] for system in ("ours", "peer")}
        found = {
            "largest_loss_difference": _apart(*same.values()),
            "from_float64": {system: _apart(losses["float64"], own) for system, own in same.items()},
            "losses": same,
        }
        print(
            f"ZeRO-{stage}: losses on the same batches differ by at most {found['largest_loss_difference']:.1e} over "
            f"{args.steps} steps; from float64 ours by {found['from_float64']['ours']:.1e}, "
            f"the peer's by {found['from_float64']['peer']:.1e}",
            flush=True,
        )
        apart[stage] = found
    return {**apart, "float64": losses["float64"]}


def _apart(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def drive(args: argparse.Namespace) -> None:
    """Run everything in turn, print and write the table."""
    result: dict = {"machine": _page.machine(), "steps": args.steps, "runs": args.runs, "stages": {}}
    same = result["same_batches"] = compare(args)
    for stage in [] if args.same else args.stages:
        with tempfile.TemporaryDirectory(prefix="frozen-") as kept:
            result["stages"][stage] = {
                "largest_loss_difference": same[stage]["largest_loss_difference"],
                **measure(stage, args, kept),
            }
    if not args.same:
        _page.write("trainer", _table(result), result)


def measure(stage: int, args: argparse.Namespace, kept: str) -> dict:
    """Medians of the systems at a stage, which run in turn. With `--cache` values are written before, and the losses
    are asserted to be those without them, to the bit."""
    systems = ["ours", *(["cached"] if args.cache else []), "peer"]
    if args.cache:
        launch("ours", stage, args, kept=kept)
    runs: dict = {system: [] for system in systems}
    for turn in range(args.runs):
        for system in systems:
            cached = system == "cached"
            run = launch("ours" if cached else system, stage, args, kept=kept if cached else "")
            runs[system].append(run)
            print(
                f"ZeRO-{stage} {system} run {turn + 1}: {run['samples_per_second']:.1f} samples/s, "
                f"step {run['step_seconds']:.3f} s, RSS {max(run['rss_mib'])} MiB",
                flush=True,
            )
    for run in runs.get("cached", []):
        assert run["computed"] == 0, "a value was not stored"
        assert run["losses"] == runs["ours"][0]["losses"], "stored values change losses"
    found = {system: _median(of_system) for system, of_system in runs.items()}
    peer = found["peer"]["samples_per_second"]
    ratios = {f"ratio_{system}": found[system]["samples_per_second"] / peer for system in systems[:-1]}
    return found | ratios


def _median(runs: list[dict]) -> dict:
    return {
        "samples_per_second": statistics.median(r["samples_per_second"] for r in runs),
        "all": [r["samples_per_second"] for r in runs],
        "step_seconds": statistics.median(r["step_seconds"] for r in runs),
        "rss_mib": max(max(r["rss_mib"]) for r in runs),
    }


def _table(result: dict) -> str:
    lines = [
        "# Training: our engine and HF Trainer + peft + accelerate + deepspeed",
        "",
        "easy-VQA from pixels, frozen ViT-S/14 (11 layers, 70 px) and MiniLM, routed LoRA r 16, float32, about 77",
        "questions per step, 2 ranks x 1 thread, all systems in turn, "
        f"median of {result['runs']} runs of {result['steps']} steps.",
        f"Machine: {result['machine']}.",
        "`python benchmarks/trainer.py --cache` repeats it.",
        "",
        "| ZeRO | system | samples/s | ratio to HF Trainer | step s | peak RSS MiB | same batches: losses differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {"ours": "ours", "cached": "ours, `engine.cache_frozen`, from the second epoch on", "peer": "HF Trainer"}
    for stage, found in result["stages"].items():
        for system in (s for s in names if s in found):
            e, ratio = found[system], found.get(f"ratio_{system}", 1.0)
            apart = {"ours": f"{found['largest_loss_difference']:.1e}", "cached": "0 from ours"}.get(system, "")
            lines.append(
                f"| {stage} | {names[system]} | {e['samples_per_second']:.0f} | {ratio:.2f} | {e['step_seconds']:.3f} "
                f"| {e['rss_mib']} | {apart} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", "--repeats", type=int, default=3, help="launches of each system at each stage")
    steps = f"optimizer steps a launch, default {STEPS}; the first {WARM} are not timed"
    parser.add_argument("--steps", type=int, default=0, help=steps)
    parser.add_argument("--stages", type=int, nargs="+", default=[3, 1], help="ZeRO stages")
    parser.add_argument("--data", default="data/easy-vqa", help="prepared shards with feature statistics")
    parser.add_argument("--cache", action="store_true", help="ours with stored values of the frozen tower too")
    parser.add_argument("--same", action="store_true", help="compare losses on the same batches only")
    parser.add_argument("--instruction", action="store_true", help="instruction tuning in place of the quickstart")
    parser.add_argument("--families", nargs="+", default=["llava", "qwen2_vl"], help="of --instruction")
    parser.add_argument("--shorter", type=int, nargs="+", default=[1, 9], help="of --instruction: divisors of lengths")
    parser.add_argument("--pack", type=int, default=16384, help="of --instruction: tokens of a micro-batch of ours")
    parser.add_argument(
        "--out", default="", help="of --instruction: directory of the page, in place of docs/benchmarks"
    )
    parser.add_argument("--system", choices=["ours", "peer", "plain", "host"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="", help=argparse.SUPPRESS)
    parser.add_argument("--kept", default="", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, default=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    parser.add_argument("--group", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--order", default="", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.instruction:
        from benchmarks import _instruction, _instruction_runs

        if args.system is None:
            return _instruction_runs.drive(args, __file__)
        return _launch.close(_instruction.SYSTEMS[args.system](args), args.out)
    args.steps = args.steps or STEPS
    if args.steps <= WARM:
        parser.error(f"--steps must be {WARM + 1} or more: the first {WARM} are not timed")
    if args.system is None:
        return drive(args)
    _launch.close({"ours": ours, "peer": peer, "plain": plain}[args.system](args), args.out)


if __name__ == "__main__":
    main()
