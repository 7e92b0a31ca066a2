"""Ranks of test_mllm_ranks.py: trains and evaluates tiny multimodal language models in one launch.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.mllm CASES.json FOLDER

Each case is {name, family, method, ...}; rank 0 gets all samples with images, rank 1 the rest; rank 0 writes NAME.pt.
`optim` has other options of that section; with `accumulation` every sample is a micro-batch. With `packed` each rank
trains on its texts as one row; one plain process has them in padded rows. `steps`: how many, 4 by default.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.batch import IMAGE_MARK, Prompted, Sample
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed import processes
from mmpeft_ds.engine.assembly.build import build
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.assembly.resolve import attach
from mmpeft_ds.engine.evaluator import evaluate
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.tasks.instruction.task import Instruction, Options
from tests.helpers import engine_state
from tests.helpers.models import tiny_mllm
from tests.helpers.runs import tiny_classifier

STEPS = 4


def make_recipe(folder: Path, case: dict) -> recipes.Recipe:
    recipe = recipes.Recipe(
        run_dir=str(folder / "run"),
        backbone={
            "name": "mllm",
            "model": str(folder / case["family"]),
            "condition": case.get("condition", "none"),
            "quantise": case.get("quantise", "none"),
        },
        method=case["method"],
    )
    recipe.engine.deepspeed = str(folder / case.get("deepspeed", "ds.json"))
    recipe.engine.gradient_checkpointing = case.get("gradient_checkpointing", False)
    recipe.optim.lr, recipe.optim.warmup, recipe.optim.max_steps = 0.02, 0.0, 10
    recipe.optim.weight_decay, recipe.optim.clip = 0.0, 0.0
    for key, value in case.get("optim", {}).items():
        setattr(recipe.optim, key, value)
    recipe.engine.dtype = case.get("dtype", "float32")
    recipe.data.global_batch = 4
    return recipe


def slots(step: int, backbone) -> list[Sample]:
    """One image; two images of other sizes; text alone with an earlier answer; padding."""
    transform, g = backbone.image_transform(True), torch.Generator().manual_seed(step)

    def image(height: int, width: int):
        return transform(torch.randint(256, (3, height, width), dtype=torch.uint8, generator=g))

    asked, answer = Prompted("is it ?", "a red circle ."), ("yes", "no")[step % 2]
    if backbone.one_turn:  # it reads one question, and no text without an image
        shown = [(image(9, 14), asked), (image(16, 8), Prompted("same ?", answer)), (image(6, 16), asked)]
        return [*(Sample(f"{step}/{i}", 1.0, [see], [text], [{}]) for i, (see, text) in enumerate(shown)), Sample()]
    talk = Prompted("what color ?", "blue .", (("user", "is it round ?"), ("assistant", "no .")))
    pair = Prompted(f"{IMAGE_MARK} and {IMAGE_MARK} same ?", answer)
    return [
        Sample(f"{step}/one", 1.0, [image(9, 14)], [asked], [{}]),
        Sample(f"{step}/two", 1.0, [image(16, 8), image(6, 16)], [pair], [{}]),
        Sample(f"{step}/text", 1.0, [], [talk], [{}]),
        Sample(),
    ]


def run_case(case: dict, folder: Path, ranks: processes.Ranks) -> dict:
    task = Instruction(Options(max_new_tokens=3), None)
    resolved = tiny_classifier.make_resolved(make_recipe(folder, case), task)
    if packed := case.get("packed", False):
        read_rows(resolved.backbone)
    built = build(resolved, ranks)
    stepper = Stepper(resolved, built, ranks, 10, TrainState(), BadBudget(1.0, 1000))

    def mine(step: int, row: bool = False) -> Step:
        chosen = slots(step, resolved.backbone)
        part = chosen[:2] if ranks.rank == 0 else chosen[2:]
        micro = [part] if resolved.recipe.optim.accumulation == 1 else [[slot] for slot in part]
        batches = [tiny_classifier.pack_slots(slots, resolved.backbone, task) for slots in micro]
        return Step(0, step, [dataclasses.replace(batch, padding_free=row) for batch in batches])

    rows = [stepper.train_step(mine(step, packed), 0.0) for step in range(case.get("steps", STEPS))]
    found = evaluate(built.engine, resolved.backbone, task, [mine(8), mine(9)], ranks.device)
    zero_state.ensure_optimizer_state(built.engine)
    weights = {n: engine_state.read_full(built.engine, p)["weight"] for n, p in built.trainables.items()}
    partitioned = sum(hasattr(p, "ds_id") for p in built.model.parameters())
    built.engine.destroy()
    return {"losses": [r["loss"] for r in rows], "weights": weights, "rows": found.rows, "partitioned": partitioned}


def read_rows(backbone: BackboneBase) -> None:
    """Set the attention that a recipe with `data.pack` has."""
    usual = backbone.attentions[0] if backbone.attentions else "sdpa"
    backbone.attention = (backbone.row_attention or usual) if usual == "sdpa" else usual


def plainly(folder: Path, case: dict) -> dict:
    """The same steps by one process, without DeepSpeed and with the whole batch at once, or each sample by itself."""
    recipe, task = make_recipe(folder, case), Instruction(Options(max_new_tokens=3), None)
    resolved = tiny_classifier.make_resolved(recipe, task)
    torch.manual_seed(recipe.seed)
    base = resolved.backbone.build()
    torch.manual_seed(recipe.seed)
    model = attach(resolved, base).eval()
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    stepped = optimizers_of_torch(recipe, trainables, resolved.method.is_map)
    losses = []
    for step in range(case.get("steps", STEPS)):
        chosen = slots(step, resolved.backbone)
        micro = [chosen] if recipe.optim.accumulation == 1 else [[slot] for slot in chosen]
        batches = [tiny_classifier.pack_slots(part, resolved.backbone, task) for part in micro]
        weight = sum(map(task.weight, batches))
        exact = recipe.engine.dtype != "float32"  # logits in bfloat16 would round what the engine does not
        model.zero_grad()
        losses.append(0.0)
        for batch in (batch for batch in batches if task.weight(batch)):
            loss = task.loss(forward(model, resolved.backbone, batch, scores=exact), batch) / weight
            loss.backward()
            losses[-1] += loss.item()
        if recipe.optim.clip:
            torch.nn.utils.clip_grad_norm_(trainables.values(), recipe.optim.clip)
        for optimizer in stepped:
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (1 - step / 10)
            optimizer.step()
    batches = [tiny_classifier.pack_slots(slots(step, resolved.backbone), resolved.backbone, task) for step in (8, 9)]
    found = evaluate(model, resolved.backbone, task, [Step(0, 0, [b]) for b in batches], "cpu")
    return {"losses": losses, "weights": {n: p.detach() for n, p in trainables.items()}, "rows": found.rows}


def optimizers_of_torch(recipe: recipes.Recipe, trainables: dict, is_map: Callable[[str], bool]) -> list:
    """torch's own AdamW, or its Muon beside it for the matrices that map hidden vectors."""
    decay = recipe.optim.weight_decay
    maps = {n for n, p in trainables.items() if recipe.optim.name == "muon" and p.dim() == 2 and is_map(n)}
    rest = {n: p for n, p in trainables.items() if n not in maps}
    groups = [
        {"params": [p for p in rest.values() if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    stepped = [torch.optim.AdamW([group for group in groups if group["params"]])] if rest else []
    if maps:
        matrices = [trainables[name] for name in trainables if name in maps]
        stepped.append(torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return stepped


def main() -> None:
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    cases, folder = json.loads(Path(args[0]).read_text()), Path(args[1])
    ranks = processes.start(threads=1)
    for case in cases:
        result = run_case(case, folder, ranks)
        if ranks.rank == 0:
            torch.save(result, folder / f"{case['name']}.pt")
            print("case done", case["name"], flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert tiny_mllm.FAMILIES
    main()
