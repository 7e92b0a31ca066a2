"""Ranks of test_ewc_tasks.py: one task after another, with and without elastic weight consolidation.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.ewc_tasks FOLDER

Both tasks ask the same questions about the same images and want other answers.
"""

import sys
from pathlib import Path

import torch.distributed as dist

from mmpeft_ds.engine import trainer
from mmpeft_ds.runs import fisher
from tests.helpers.runs import tiny_vqa


def run(folder: Path, name: str, data: str, steps: int, **ewc) -> Path:
    optim = {"max_steps": steps, "lr": 0.02, "schedule": "constant", "warmup": 0, "weight_decay": 0.0, "ewc": ewc}
    recipe = tiny_vqa.recipe(folder, optim=optim, monitor={"tensorboard": name == "run_held"})
    recipe.run_dir = str(folder / name)
    recipe.data.sources[0].dir, recipe.data.validation, recipe.data.global_batch = str(folder / data), [], 10
    assert trainer.run(recipe) == 0
    return folder / name


def main() -> None:
    folder = Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
    first = run(folder, "run_a", "data_a", 15)
    out = folder / "fisher_two_ranks.safetensors"
    assert fisher.estimate(first, out) is not None
    # a strength of 0 starts from the same weights and does not pull
    run(folder, "run_free", "data_b", 10, file=str(out), strength=0.0)
    run(folder, "run_held", "data_b", 10, file=str(out), strength=2000.0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
