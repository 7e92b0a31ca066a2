"""HeGraphAdapter through the engine: ranks of test_hegraph_zero.py, and one plain process to compare with.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.hegraph OUT

Trains under ZeRO-3 with nothing shared out, cache rows, or classes; rank 0 writes OUT/SHARD.pt.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import cross_entropy

from mmpeft_ds import recipe as recipes
from mmpeft_ds.backbones.features.backbone import FeaturesBackbone, Options
from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.batch import Described, Sample, pack
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed import processes
from mmpeft_ds.engine.assembly import feature_bank
from mmpeft_ds.engine.assembly import resolve as resolving
from mmpeft_ds.engine.assembly.build import build
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero.config import check_ds_config
from mmpeft_ds.methods.common.head import head_of
from tests.helpers import engine_state

WIDTH, CLASSES, SLOTS, STEPS, LR = 8, 5, 7, 6, 0.01
SHARDS = ("none", "cache", "classes")
TOWERS = {"key": "toy", "image_width": WIDTH, "text_width": WIDTH, "logit_scale": 5.0}


class Task:
    """Weighted cross-entropies, as the head asks for them; the mean over rows."""

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
        labels = batch.targets["label"]
        losses = sum(weight * cross_entropy(x, labels, reduction="none") for weight, x in outputs.terms)
        return (batch.text_weight * losses).sum()


def bank() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4])
    return {
        "positive": torch.randn(CLASSES, 2, WIDTH, generator=g),
        "negative": torch.randn(CLASSES, 2, WIDTH, generator=g),
        "support": torch.randn(len(labels), 2, WIDTH, generator=g),
        "support_labels": labels,
    }


def share_of(step: int, rank: int, world: int) -> list[int]:
    """Uneven; in every third step one rank has no row at all."""
    if world == 1:
        return list(range(SLOTS))
    cut = 0 if step % 3 == 2 else 5
    return list(range(cut)) if rank == 0 else [i for i in range(cut, SLOTS) if i % (world - 1) == rank - 1]


def packed(step: int, rows: list[int], backbone):
    """These rows of a step, and one of padding."""
    g = torch.Generator().manual_seed(100 + step)
    z, labels = torch.randn(SLOTS, WIDTH, generator=g), torch.randint(CLASSES, (SLOTS,), generator=g)
    slots = [Sample(f"t/{step}-{i}", 1.0, [z[i]], [Described()], [int(labels[i])]) for i in rows]
    return pack([*slots, Sample()], backbone.collate_images, backbone.collate_texts, Task().collate)


def resolved(shard: str, folder: Path):
    """What `resolve` would give, without a data set."""
    recipe = recipes.Recipe(
        run_dir=str(folder / "run"),
        backbone={"name": "features"},
        method={"name": "hegraph", "shard": shard, "learned": True},
    )
    recipe.engine.deepspeed = "ds_configs/zero3.json"
    recipe.optim.lr, recipe.optim.warmup, recipe.optim.max_steps = LR, 0.0, STEPS
    recipe.optim.schedule, recipe.optim.clip = "constant", 0.0
    recipe.data.global_batch = SLOTS
    ds_config = check_ds_config(recipe)
    ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # so that every weight is split
    method, config = resolving.make_method(recipes.components(recipe).method)
    backbone = FeaturesBackbone(Options(texts="none"), [str(c) for c in range(CLASSES)])
    backbone.use_features(TOWERS)
    source = SimpleNamespace(task=Task(), manifest=SimpleNamespace(towers={}))
    feature_bank.read = lambda *_: bank()  # there is no data set to read it from
    return resolving.Resolved(recipe, ds_config, backbone, method, config, [source], [source], None, None)


def run(shard: str, folder: Path, ranks: processes.Ranks) -> dict:
    parts = resolved(shard, folder)
    built = build(parts, ranks)
    stepper = Stepper(parts, built, ranks, STEPS, TrainState(), BadBudget(1.0, 1000))
    start = {n: engine_state.read_weight(p).clone() for n, p in built.trainables.items()}
    rows = []
    for step in range(STEPS):
        mine = packed(step, share_of(step, ranks.rank, ranks.world_size), parts.backbone)
        rows.append(stepper.train_step(Step(0, step, [mine]), 0.0))
    end = {n: engine_state.read_weight(p).clone() for n, p in built.trainables.items()}
    exported = head_of(built.model).export()
    built.engine.destroy()
    return {"losses": [r["loss"] for r in rows], "start": start, "end": end, "exported": exported}


def run_plainly(folder: Path) -> dict:
    """The same steps by one process in PyTorch, without DeepSpeed and without the engine's step."""
    parts = resolved("none", folder)
    parts.backbone.use_bank(bank())
    torch.manual_seed(parts.recipe.seed)
    base = parts.backbone.build()
    torch.manual_seed(parts.recipe.seed)
    model = resolving.attach(parts, base).train()
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trainables.items()}
    optimizer = torch.optim.AdamW(trainables.values(), lr=LR, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = packed(step, share_of(step, 0, 1), parts.backbone)
        loss = Task().loss(forward(model, parts.backbone, batch), batch) / SLOTS
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    end = {n: p.detach() for n, p in trainables.items()}
    return {"losses": losses, "start": start, "end": end, "exported": head_of(model).export()}


def main() -> None:
    folder = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    ranks = processes.start(threads=1)
    for shard in SHARDS:
        result = run(shard, folder, ranks)
        if ranks.rank == 0:
            torch.save(result, folder / f"{shard}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
