"""Files of an adapter directory. Imports neither torch nor peft, so that a wrong path is said at once."""

from __future__ import annotations

from pathlib import Path

from mmpeft_ds.errors import BadInput

WEIGHTS = "adapter_model.safetensors"
FILES = ("adapter_config.json", WEIGHTS, "recipe.yaml", "backbone.json", "labels.json", "base_fingerprint.json")


def whole(directory: str | Path) -> Path:
    """The directory, if all its files are there. Raises BadInput."""
    directory = Path(directory)
    absent = [name for name in FILES if not (directory / name).is_file()]
    if absent:
        raise BadInput(
            f"{directory}: no adapter directory, {absent[0]} is missing. Give the `adapter` folder of a run."
        )
    return directory
