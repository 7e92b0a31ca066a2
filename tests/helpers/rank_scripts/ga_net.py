"""Ranks of test_ga_net_zero.py: GA-Net through the engine at every ZeRO stage, one case after the other in one launch.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.ga_net CASES.json OUT

Each case is {name, stage, persistence, rows, options, steps, dtype}; rank 0 writes OUT/NAME.pt with what came out.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy

from mmpeft_ds import recipe as recipes
from mmpeft_ds.backbones.features.backbone import FeaturesBackbone, Options
from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.batch import Described, PackedBatch, Sample, pack
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed import processes
from mmpeft_ds.engine.assembly import resolve as resolving
from mmpeft_ds.engine.assembly.build import build
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import gradients
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.engine.zero.config import check_ds_config
from tests.helpers import engine_state

WIDTH, CLASSES, SLOTS, R, LR = 6, 4, 12, 5, 0.01  # WIDTH of each modality
TOWERS = {"key": "toy", "image_width": WIDTH, "text_width": WIDTH, "logit_scale": 1.0}


class Task:
    """Mean cross-entropy over classes."""

    fields: tuple[str, ...] = ()
    couples_samples = False
    main_metric, better = "loss", "min"

    def collate(self, targets):
        return {"label": torch.tensor(targets)}

    def dummy_text(self, text):
        return text

    def dummy_target(self):
        return 0

    def weight(self, batch):
        return float(batch.text_weight.sum())

    def loss(self, outputs, batch):
        return (batch.text_weight * cross_entropy(outputs.logits, batch.targets["label"], reduction="none")).sum()


def rows_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (SLOTS, 2 WIDTH), text first, in loose clusters, and classes of one step."""
    made = torch.Generator().manual_seed(100 + step)
    centres = torch.randn(3, 2 * WIDTH, generator=made)
    x = centres[torch.arange(SLOTS) % 3] + 0.8 * torch.randn(SLOTS, 2 * WIDTH, generator=made)
    return x, torch.randint(CLASSES, (SLOTS,), generator=made)


def shares(kind: str, world: int) -> list[list[int]]:
    """Which rows each rank has: `even`, `uneven`, or `one`: the first rank has all of them, the others none."""
    if kind == "one":
        return [list(range(SLOTS))] + [[] for _ in range(world - 1)]
    cut = SLOTS // world + (2 if kind == "uneven" else 0)
    return [
        list(range(cut)),
        *([i for i in range(SLOTS) if i >= cut and i % (world - 1) == r] for r in range(world - 1)),
    ]


def packed(step: int, mine: list[int], backbone) -> PackedBatch:
    """This rank's slots, and one of padding."""
    x, labels = rows_of(step)
    slots = [
        Sample(f"t/{step}-{i}", 1.0, [x[i, WIDTH:]], [Described("", x[i, :WIDTH])], [int(labels[i])]) for i in mine
    ]
    return pack([*slots, Sample()], backbone.collate_images, backbone.collate_texts, Task().collate)


def resolved(case: dict, folder: Path):
    """What `resolve` would give, without a data set."""
    recipe = recipes.Recipe(
        run_dir=str(folder / "run"),
        backbone={"name": "features"},
        method={"name": "ga_net", "r": R, **case["options"]},
    )
    recipe.engine.deepspeed = f"ds_configs/zero{case['stage']}.json"
    recipe.engine.dtype = case.get("dtype", "float32")
    recipe.optim.lr, recipe.optim.warmup, recipe.optim.max_steps = LR, 0.0, case["steps"]
    recipe.optim.schedule, recipe.optim.clip = "constant", 0.0
    recipe.data.global_batch = SLOTS
    ds_config = check_ds_config(recipe)
    if "persistence" in case:
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = case["persistence"]
    method, config = resolving.make_method(recipes.components(recipe).method)
    backbone = FeaturesBackbone(Options(), [str(c) for c in range(CLASSES)])
    backbone.use_features(TOWERS)
    source = SimpleNamespace(task=Task(), manifest=SimpleNamespace(towers={}))
    return resolving.Resolved(recipe, ds_config, backbone, method, config, [source], [source], None, None)


def whole_gradients(engine, trainables) -> dict[str, torch.Tensor]:
    """The gradient of every trained parameter after reduction."""
    flat = {id(p): torch.zeros(torch.Size(zero_state.full_shape(p)).numel()) for p in trainables.values()}
    if not gradients.replicated(engine):
        for shard in gradients.shards(engine):
            flat[id(shard.parameter)][shard.start : shard.start + shard.gradient.numel()] = shard.gradient
    found = {}
    for name, p in trainables.items():
        torch.distributed.all_reduce(flat[id(p)])
        found[name] = flat[id(p)].view(zero_state.full_shape(p))
    return found


def run_case(case: dict, folder: Path, ranks: processes.Ranks) -> dict:
    parts = resolved(case, folder)
    built = build(parts, ranks)
    stepper = Stepper(parts, built, ranks, case["steps"], TrainState(), BadBudget(1.0, 1000))
    mine = shares(case["rows"], ranks.world_size)[ranks.rank]
    start = {n: engine_state.read_weight(p).clone() for n, p in built.trainables.items()}
    batch = packed(0, mine, parts.backbone)
    agreed = stepper.agree([batch], Task())
    stepper.accumulate([batch], Task(), agreed)
    found = whole_gradients(built.engine, built.trainables)
    gradients.discard(built.engine)
    rows = [
        stepper.train_step(Step(0, step, [packed(step, mine, parts.backbone)]), 0.0) for step in range(case["steps"])
    ]
    end = {n: engine_state.read_weight(p).clone() for n, p in built.trainables.items()}
    buffers = {n: b.clone() for n, b in built.model.get_base_model().features.head.named_buffers()}
    built.engine.destroy()
    return {
        "gradients": found,
        "losses": [r["loss"] for r in rows],
        "skipped": [r["skipped"] for r in rows],
        "start": start,
        "end": end,
        "buffers": buffers,
    }


def main() -> None:
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    cases, out = json.loads(Path(args[0]).read_text()), Path(args[1])
    ranks = processes.start(threads=1)
    for case in cases:
        result = run_case(case, out, ranks)
        if ranks.rank == 0:
            torch.save(result, out / f"{case['name']}.pt")
            print(f"case done: {case['name']}.", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
