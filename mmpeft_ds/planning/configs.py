"""DeepSpeed configurations that a plan compares, and the file that it writes; imports nothing that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmpeft_ds.engine.zero.config import find
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import REPOSITORY, write_json
from mmpeft_ds.recipe import Recipe

SHIPPED = ("zero0", "zero1", "zero2", "zero3", "zero3_lean", "zero3_nodes", "zero3_offload")


def of(recipe: Recipe, ds_config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> `zero_optimization` of the shipped configurations, and of the recipe's own where it is another one."""
    read = {name: json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text()) for name in SHIPPED}
    configs = {name: config["zero_optimization"] for name, config in read.items()}
    if ds_config["zero_optimization"] not in configs.values():
        path = find(recipe.engine.deepspeed)
        configs = {path.stem if path.stem not in configs else "recipe": ds_config["zero_optimization"]} | configs
    return configs


def write(path: str, chosen: Any) -> None:
    """Write a choice as a JSON that `engine.deepspeed` may name. Raises BadInput where there is none."""
    if chosen is None:
        raise BadInput(f"--apply {path}: no configuration fits into these GPUs, so none was written.")
    write_json(Path(path), {"zero_optimization": chosen.zero})
    print(f"wrote {path}: --set engine.deepspeed={path}")
