"""Files of an adapter directory. Imports neither torch nor peft, so that a wrong path is said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmpeft_ds.errors import BadInput

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS, "recipe.yaml", "backbone.json", "labels.json", "base_fingerprint.json")
# What the directory needs when a file of it is damaged, or of another run.
REMEDY = (
    "All files of an adapter directory belong to one run and its base: restore it as a whole, or give the train "
    "command of its run again in a new run_dir."
)


def whole(directory: str | Path) -> Path:
    """The directory, if all its files are there. Raises BadInput."""
    directory = Path(directory)
    absent = [name for name in FILES if not (directory / name).is_file()]
    if absent:
        raise BadInput(
            f"{directory}: no adapter directory, {absent[0]} is missing. Give the `adapter` folder of a run."
        )
    return directory


def read_json(path: Path, kinds: type | tuple[type, ...]) -> Any:
    """The value in a JSON file of the directory.

    Args:
        kinds: of which it must be.

    Raises:
        BadInput: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: cannot be read ({e}). {REMEDY}") from e
    if not isinstance(value, kinds):
        raise BadInput(f"{path}: holds a {type(value).__name__}, which does not belong there. {REMEDY}")
    return value
