"""Run directories that no training has made: a recipe, one checkpoint, curves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from mmpeft_ds.engine import checkpoint, checkpoint_files
from mmpeft_ds.engine.rundir import RunDir
from mmpeft_ds.files import save_tensors, write_json
from tests.helpers.runs.checkpoint_header import header

RECIPE = {
    "run_dir": "runs/a",
    "seed": 0,
    "optim": {"lr": 1e-3, "epochs": 1, "max_steps": 0, "betas": (0.9, 0.999)},
    "engine": {"deepspeed": "ds_configs/zero3.json", "dtype": "float32", "eval_every": 0},
    "data": {
        "workers": 2,
        "global_batch": 8,
        "max_bad_fraction": 0.001,
        "sources": [{"dir": "data/a", "weight": 1.0}],
    },
    "monitor": {"every": 1},
}


def started(path: Path) -> None:
    """A run of RECIPE with a checkpoint of step 5 that nothing can be loaded from, closed."""
    run = RunDir.open(path, RECIPE)
    writers = {
        "state.json": lambda p: write_json(p, header()),
        "recipe.json": lambda p: checkpoint.write_json(p, RECIPE),
    }
    for name in ("weights.safetensors", "optimizer.safetensors"):
        writers[name] = lambda p: p.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    checkpoint_files.write(run.checkpoints, 5, writers, 2, False)
    run.close()


def saved_after_5(run: Path, recipe: dict, extra: dict) -> Path:
    """A run of `recipe` with a checkpoint of step 5 that can be loaded; `extra`: what its train state holds beside."""
    RunDir.open(run, recipe).close()
    files = {"state.json": header(step=5, extra=extra), "recipe.json": recipe, "fingerprint.json": {}}
    writers = {name: lambda path, value=value: write_json(path, value) for name, value in files.items()}
    for name in ("weights.safetensors", "optimizer.safetensors"):
        writers[name] = lambda path: save_tensors(path, {"w": torch.zeros(1)})
    checkpoint_files.write(run / "checkpoints", 5, writers, 2, False)
    return run


def write_events(folder: Path, steps: range, value: float) -> None:
    """Write a curve of one value as TensorBoard files."""
    with SummaryWriter(str(folder)) as writer:
        writer.add_text("recipe", "seed: 0", 0)
        for step in steps:
            writer.add_scalar("loss", value, step)
