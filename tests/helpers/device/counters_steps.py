"""Counts of a step of the trainer on two ranks: the quickstart, and a tiny classifier that takes a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine.assembly import resolve
from tests.helpers import ROOT, launch
from tests.helpers.runs import tiny_classifier, tiny_vqa

SCRIPT = "tests.helpers.rank_scripts.step_counts"
TINY = [{"name": "zero1", "stage": 1}, {"name": "zero3", "stage": 3}]
CONTROLS = [
    {"name": "zero0", "stage": 0},
    {"name": "zero3 apart", "stage": 3, "together": False},
    {"name": "zero1 sent", "stage": 1, "sent": True},
    *({"name": f"zero{stage} differs", "stage": stage, "differs": True} for stage in (0, 1)),
]
STEPS = 3  # of a case, the last counted
METHODS = ("routed_lora", "lora", "p_adapter", "aurora")  # on the quickstart's towers


def run(cases: list[dict[str, Any]], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each case counted, by name, on rank 0 and rank 1."""
    if any("stage" in case for case in cases):
        tiny_classifier.make_towers(folder)
    (folder / "cases.json").write_text(json.dumps(cases))
    result = launch.run_forked(SCRIPT, str(folder / "cases.json"), str(folder), ranks=2)
    assert result.code == 0, result.tail()
    names = [case["name"] for case in cases]
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in names}


def quickstart(folder: Path) -> list[dict[str, Any]]:
    """Cases of the quickstart's model on a few pictures of noise: each method at ZeRO-1, its own at ZeRO-3 too."""
    manifest = tiny_vqa.write_data(folder / "data")
    places = [f"data.{kind}.0.dir={folder / 'data'}" for kind in ("sources", "validation")]
    own = [f"run_dir={folder / 'run'}", "data.workers=0", *places]
    recipe = recipes.load(ROOT / "recipes" / "quickstart.yaml", own)
    raw = recipes.to_dict(recipe)
    backbone = resolve.make_backbone(recipes.components(recipe).backbone, recipe.engine, tiny_vqa.LABELS)
    ones = np.ones(backbone.statistics_width).tolist()
    manifest.statistics[backbone.statistics_key()] = {"mean": ones, "std": ones, "count": 30}
    manifest.save(folder / "data")
    cases = []
    for method in METHODS:
        own = method == raw["method"]["name"]
        path = folder / f"{method}.yaml"
        path.write_text(yaml.safe_dump(raw if own else raw | {"method": {"name": method}}))
        for stage in (1, 3) if own else (1,):
            override = [f"engine.deepspeed=ds_configs/zero{stage}.json"]
            cases.append({"name": f"{method} zero{stage}", "recipe": str(path), "overrides": override})
    return cases
