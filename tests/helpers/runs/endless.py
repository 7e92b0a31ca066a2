"""A training run of many more steps than a test waits for, of features and so without a tower."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.helpers.data import tiny_features

STEPS = 100_000


def prepare(folder: Path, **engine: object) -> Path:
    """Write data and recipe.yaml into a folder; the run directory is `run` in it.

    Args:
        engine: further keys of that section.
    """
    tiny_features.write_features(folder / "toy", [tiny_features.sample(i) for i in range(24)])
    source = {"dir": str(folder / "toy"), "task": {"name": "classification", "text": "captions"}}
    content = {
        "run_dir": str(folder / "run"),
        "backbone": {"name": "features"},
        "method": {"name": "ga_net", "r": 4, "tau": 0.2},
        "data": {"sources": [source], "validation": [source], "global_batch": 12, "workers": 0},
        "optim": {"lr": 0.01, "max_steps": STEPS},
        "engine": {"threads": 1, "save_every": 5, "eval_every": STEPS, **engine},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def steps_of(run: Path) -> list[int]:
    """Steps in its metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def reach(run: Path, step: int, living: Callable[[], bool], seconds: float = 300) -> None:
    """Wait until a run has done a step."""
    end = time.monotonic() + seconds
    while max(steps_of(run), default=0) < step:
        assert time.monotonic() < end and living(), f"step {step} was not reached"
        time.sleep(0.1)
