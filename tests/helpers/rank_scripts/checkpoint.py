"""Ranks of test_checkpoint_ranks.py: a tiny model through real DeepSpeed engines, many cases in one launch.

    deepspeed --module tests.helpers.rank_scripts.checkpoint WORK write|read

`write` trains under every stage, saves after STEPS steps and records the losses that follow; `read` continues the
checkpoints of another world size. Results go to WORK/NAME.json; every case is (losses, ...) under its name.
"""

# B rows of the global batch, D width

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from mmpeft_ds.engine import checkpoint
from mmpeft_ds.engine.optim import optimizers
from mmpeft_ds.engine.zero import full_state, lean, stage1
from mmpeft_ds.engine.zero import matrices as matrices_of_zero
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.engine.zero.fingerprint import frozen_fingerprint, frozen_tensors
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import save_tensors
from mmpeft_ds.recipe.options import OptimOptions
from tests.helpers import engine_state
from tests.helpers.device.counters import counted

B, D, STEPS, MORE = 12, 7, 4, 3
OTHER_OPTIMIZERS = [f"stage{stage}-{name}" for name in ("sgd", "adam", "muon") for stage in (1, 3)]


class Block(nn.Module):
    """A frozen map with a trained low-rank side path; 7 x 3 and 5 are divisible by no rank count of the test."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(D, D)
        self.base.requires_grad_(False)
        self.down = nn.Linear(D, 3, bias=False)
        self.up = nn.Linear(3, D)
        self.register_buffer("mean", torch.linspace(-1, 1, D))

    def forward(self, x):
        frozen = self.base(x.to(self.base.weight.dtype)).float()
        return x + torch.tanh(frozen - self.mean) + self.up(self.down(x))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(D, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def config(stage: int, bf16: bool) -> dict:
    zero = {"stage": stage}
    if stage == 3:
        # the head's bias persists, the rest is partitioned: both paths are loaded
        zero |= {"stage3_param_persistence_threshold": 6, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16 and stage == 3},
    }


def make(stage: int, bf16: bool = False, seed: int = 0, flip: str | None = None, name: str = "adamw"):
    torch.manual_seed(seed)
    model = Toy()
    if bf16:
        for module in model.modules():
            if isinstance(module, Block):
                module.base.to(torch.bfloat16)
    if flip is not None:
        bits = model.get_parameter(flip).data.view(torch.int32).view(-1)
        bits[17] ^= 1  # the last bit of one mantissa
    if stage == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config(3, bf16), dtype=None)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    vectors = [p for n, p in named.items() if len(zero_state.full_shape(p)) < 2]
    matrices = [p for n, p in named.items() if len(zero_state.full_shape(p)) >= 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    if name == "muon":
        groups = [group | {"muon": group["params"] is matrices} for group in groups]
    optimizer = optimizers.make(groups, OptimOptions(name=name, lr=1e-2))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, bf16))
    matrices_of_zero.lay_out(engine)  # as a run does, and what follows
    lean.step_directly(engine)
    if stage == 1:
        assert stage1.reduce_flat(engine)
    trainables = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    return engine, trainables


def make_named(name: str, stage: int):
    """An engine at `stage` with the base and the optimizer of the checkpoint `name`, as `stage3-sgd`."""
    kind = name.partition("-")[2]
    return make(stage, kind == "bf16", name=kind if kind in optimizers.MOMENTS else "adamw")


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(B, D, generator=generator), torch.randint(0, 5, (B,), generator=generator)


def train(engine, first: int, steps: int) -> list[float]:
    """Global mean loss of each step; the batch is a function of the step, its rows are split over the ranks."""
    n, r = dist.get_world_size(), dist.get_rank()
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step)
        mine = slice(r * B // n, (r + 1) * B // n)
        total = nn.functional.cross_entropy(engine(x[mine]), y[mine], reduction="sum")
        engine.backward(n * total / B)
        engine.step()
        all_of_it = total.detach().clone()
        dist.all_reduce(all_of_it)
        losses.append((all_of_it / B).item())
    return losses


def frozen(engine) -> dict[str, str]:
    return frozen_fingerprint(frozen_tensors(engine.module))


def save(run_dir: Path, engine, trainables, step: int, fingerprint, **options) -> Path:
    state = checkpoint.TrainState(epoch=1, step=step, step_in_epoch=2, global_batch=B, best=0.5, bad={"image": 2})
    run_dir.mkdir(parents=True, exist_ok=True)
    return checkpoint.save(
        run_dir, engine, trainables, state, recipe={"seed": 0}, fingerprint=fingerprint, keep_last=2, **options
    )


def compare(path: Path, engine, trainables) -> dict:
    """The files of a checkpoint against those of DeepSpeed's own calls, and gathers with room for few numbers."""
    with counted() as counts:
        full = {name: engine_state.read_full(engine, p) for name, p in trainables.items()}
    keys = ("weight", *zero_state.moments(engine))
    weights = {name: tensors["weight"] for name, tensors in full.items()}
    moments = {f"{name}.{key}": full[name][key] for key in keys[1:] for name in full if key in full[name]}
    theirs = path.parent / "theirs"
    same = {}
    for file, tensors in (("weights.safetensors", weights), ("optimizer.safetensors", moments)):
        if dist.get_rank() == 0:
            save_tensors(theirs, tensors)
            same[file] = theirs.read_bytes() == (path / file).read_bytes()
            theirs.unlink()
    narrow = {}
    for bucket in (8, 40, 72):
        with counted() as few:
            held = full_state.on_rank0(engine, trainables, keys, bucket=bucket)
        expected = {key: {name: every[key] for name, every in full.items() if key in every} for key in keys}
        names = {key: list(tensors) for key, tensors in held.items()}
        equal = all(torch.equal(t, expected[key][n]) for key, tensors in held.items() for n, t in tensors.items())
        narrow[bucket] = {"equal": equal, "names": names, "sizes": few.sizes, "copies": few.names["cpu"]}
    with mock.patch.object(full_state, "LARGE", 1):  # every part has a gather of its own
        held = full_state.on_rank0(engine, trainables, keys)
    alone = [torch.equal(t, full[n][key]) for key, tensors in held.items() for n, t in tensors.items()]
    return {"same_bytes": same, "calls_of_deepspeed": counts.collectives, "narrow": narrow, "alone": alone}


def write(work: Path) -> dict:
    """Reference runs at this world size: losses before and after the checkpoint, in one go and resumed."""
    results: dict = {}
    for name in (*(f"stage{s}{kind}" for s in (0, 1, 2, 3) for kind in ("", "-bf16")), *OTHER_OPTIMIZERS):
        stage = int(name[5])
        engine, trainables = make_named(name, stage)
        if name in OTHER_OPTIMIZERS:
            save(work / "unstarted" / name, engine, trainables, 0, {})  # makes the state before the first step does
        losses = train(engine, 0, STEPS)
        prints = frozen(engine)
        dist.barrier()
        with counted() as counts:
            path = save(work / name, engine, trainables, STEPS, prints)
        compared = compare(path, engine, trainables)
        after = train(engine, STEPS, MORE)
        total = sum(p.numel() if stage < 3 else p.ds_numel for p in trainables.values())
        with counted() as everything, deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            pass  # what a save that gathers frozen weights would show
        results[name] = {
            "bytes_of_everything": sum(everything.sizes),
            "losses": losses,
            "after": after,
            "bytes": sum(counts.sizes),
            "calls": counts.collectives,
            **compared,
            "trainable_bytes": 4 * total,
        }
        results[name]["fingerprint"] = prints
        engine.destroy()
        if name in OTHER_OPTIMIZERS:
            engine, _ = make_named(name, stage)
            results[name]["never_saved"] = train(engine, 0, STEPS + MORE)
            engine.destroy()
    return results


def plain(names: list[str]) -> dict:
    """Losses of torch's own optimisers on one process's whole batches, nothing saved and nothing resumed."""
    results = {}
    for name in names:
        torch.manual_seed(0)
        model = Toy()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": 0.01},
            {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        if name == "sgd":
            stepped = [torch.optim.SGD(groups, lr=1e-2, momentum=0.9)]
        elif name == "muon":
            of_matrices = torch.optim.Muon(groups[:1], lr=1e-2, adjust_lr_fn="match_rms_adamw")
            stepped = [of_matrices, torch.optim.AdamW(groups[1:], lr=1e-2)]
        else:
            stepped = [{"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](groups, lr=1e-2)]
        losses = []
        for step in range(STEPS + MORE):
            x, y = batch(step)
            loss = nn.functional.cross_entropy(model(x), y)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(named.values(), 1.0)
            for optimizer in stepped:
                optimizer.step()
            losses.append(loss.item())
        results[name] = losses
    return results


def read(work: Path, written: dict, stages: dict[str, list[int]]) -> dict:
    """Continue each checkpoint under the given stages, from other initial weights."""
    results: dict = {}
    for name, into in stages.items():
        path = checkpoint.newest_valid(work / name)
        for stage in into:
            engine, trainables = make_named(name, stage)
            with torch.no_grad():  # the checkpoint alone must decide
                scramble(engine, trainables)
            state = checkpoint.load(path, engine, trainables, frozen(engine))
            results[f"{name}->{stage}"] = {
                "after": train(engine, state.step, MORE),
                "state": vars(state),
                "step": zero_state.optimizer_step(engine),
                "expected": written[name]["after"],
                "fingerprint_equal": frozen(engine) == written[name]["fingerprint"],
            }
            engine.destroy()
    return results


def scramble(engine, trainables) -> None:
    """Give the trained parameters other values, in master and parameter."""
    zero_state.ensure_optimizer_state(engine)
    for parameter in trainables.values():
        value = torch.full(zero_state.full_shape(parameter), 0.3)
        keys = ("weight", *zero_state.moments(engine, parameter))
        zero_state.write_full(engine, parameter, dict.fromkeys(keys, value))
        zero_state.write_parameter(parameter, value)


def refusals(work: Path) -> dict:
    """Messages of what must be refused: a flipped bit in a frozen weight, another trainable set or optimizer."""
    results = {}
    for stage in (1, 3):
        path = checkpoint.newest_valid(work / f"stage{stage}")
        engine, trainables = make(stage, flip="blocks.1.base.weight")
        results[f"flip{stage}"] = message(checkpoint.load, path, engine, trainables, frozen(engine))
        sgd = checkpoint.newest_valid(work / f"stage{stage}-sgd")
        results[f"optimizer{stage}"] = message(checkpoint.load, sgd, engine, trainables)
        renamed = {n.replace("head", "tail"): p for n, p in trainables.items()}
        results[f"names{stage}"] = message(checkpoint.load, path, engine, renamed)
        engine.destroy()
    return results


def message(function, *args) -> str:
    try:
        function(*args)
    except BadInput as e:
        return str(e)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("mode", choices=("write", "read"))
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    names = ["stage0", "stage1", "stage2", "stage3"]
    if args.mode == "write":
        results = write(args.work)
        every = {name: [0, 1, 2, 3] for name in ("stage3", "stage1", "stage3-sgd", "stage1-muon")}
        same = {name: [int(name[5])] for name in results if name not in every}
        results = {"written": results, "read": read(args.work, results, every | same | {"stage3-bf16": [1, 3]})}
        results["refusals"] = refusals(args.work)
        results["plain"] = plain(list(optimizers.MOMENTS))
    else:
        written = json.loads((args.work / "write-0.json").read_text())["written"]
        into = {"stage3": [3, 1, 0], "stage1": [3]} | {name: [2] for name in names if name in ("stage0", "stage2")}
        into |= {"stage1-sgd": [3], "stage3-sgd": [1], "stage1-adam": [3], "stage3-adam": [1]}
        into |= {"stage1-muon": [0, 3], "stage3-muon": [1, 2]}
        results = {"read": read(args.work, written, into)}
    suffix = "write" if args.mode == "write" else f"read{dist.get_world_size()}"
    (args.work / f"{suffix}-{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
