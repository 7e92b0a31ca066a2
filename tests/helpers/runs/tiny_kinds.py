"""Recipes that differ in everything a restart has to bring back: sources, accumulation, graphs, losses, precision,
packing, loader processes, saves. Each trains a tiny model for `STEPS` steps on two ranks and saves every other one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mmpeft_ds import recipe as recipes
from tests.helpers.runs import endless, tiny_adapters, tiny_talk, tiny_tasks, tiny_vqa

STEPS = 16
KINDS = ("several sources", "accumulation", "ga_net", "retrieval", "bfloat16", "packed", "in the background")


def prepare(folder: Path, kind: str) -> Path:
    """Write models, data and FOLDER/recipe.yaml of a kind; the run directory is FOLDER/run. Returns the recipe."""
    raw = _RAW[kind](folder)
    raw["optim"] |= {"max_steps": STEPS, "lr": 0.01}
    raw["engine"] |= {"save_every": 2, "eval_every": 6, "threads": 1}
    raw["monitor"] = {"tensorboard": False, "samples": 0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


def _several(folder: Path) -> dict[str, Any]:
    tiny_tasks.prepare(folder)
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    raw["data"]["workers"] = 1
    return raw


def _pictures(folder: Path, stage: int, **changes: dict[str, Any]) -> dict[str, Any]:
    tiny_vqa.prepare(folder)
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    for section, change in changes.items():
        raw[section] |= change
    raw["engine"]["deepspeed"] = f"ds_configs/zero{stage}.json"
    return raw


def _graph(folder: Path) -> dict[str, Any]:
    raw = yaml.safe_load(endless.prepare(folder).read_text())
    raw["data"]["workers"] = 1
    return raw


def _talk(folder: Path) -> dict[str, Any]:
    tiny_talk.write(folder)
    path = tiny_talk.recipe(folder, "run", 2, data__pack=160, data__workers=1)
    return yaml.safe_load(Path(path).read_text())


_RAW = {
    "several sources": _several,
    "accumulation": lambda folder: _pictures(folder, 1, optim={"accumulation": 3}, data={"workers": 1}),
    "in the background": lambda folder: _pictures(folder, 3, engine={"save_in_background": True}),
    "ga_net": _graph,
    "retrieval": lambda folder: recipes.to_dict(tiny_adapters.recipe(folder, "retrieval")),
    "bfloat16": lambda folder: _pictures(folder, 3, engine={"dtype": "bfloat16"}),
    "packed": _talk,
}
