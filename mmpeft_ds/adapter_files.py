"""Files of an adapter directory. Imports neither torch nor peft, so that a wrong path is reported at once."""

from __future__ import annotations

import functools
import json
import logging
import math
from pathlib import Path
from types import NoneType
from typing import Any

from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import check_regular, sha256, write_json

logger = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHECKSUMS = "checksums.json"
READ_BY_PEOPLE = ("README.md", "metrics.json", CHECKSUMS)  # which may be edited
READ = (".json", ".yaml", ".safetensors", ".bin", ".pt")  # endings of files that somebody may load
FILES = (CONFIG, WEIGHTS, "recipe.yaml", "backbone.json", "labels.json", "base_fingerprint.json")
# What the directory needs when a file of it is damaged, or of another run.
REMEDY = (
    "All files of an adapter directory belong to one run and its base: restore the directory, or train its recipe "
    "again in a new run_dir."
)


def whole(directory: str | Path) -> Path:
    """The directory, if all its files are there and as they were written. Raises BadInput.

    Directories of before have no checksums: what can be seen of damage in them is seen where files are read, and a
    warning says once that this is not all.
    """
    directory = Path(directory)
    absent = [name for name in FILES if not (directory / name).is_file()]
    if absent:
        raise BadInput(f"{directory}: {_what_else(directory, absent[0])}")
    if (directory / CHECKSUMS).exists():
        _check(directory)
    else:
        _warn_unchecked(directory)
    return directory


def _what_else(directory: Path, absent: str) -> str:
    """Why this is no adapter directory of ours, and what to give in its place."""
    inner = directory / "adapter"
    if (inner / CONFIG).is_file():
        return f"holds no adapter itself. Did you mean {inner}?"
    if absent == "recipe.yaml":  # the config and the weights are there
        return (
            "an adapter of peft without the recipe that says how to rebuild its base. Load it with "
            "peft.PeftModel.from_pretrained, or train on from it with `start_from` in a recipe."
        )
    return f"no adapter directory, {absent} is missing. Give the `adapter` folder of a run."


@functools.cache  # a command looks at its adapter more than once
def _warn_unchecked(directory: Path) -> None:
    logger.warning(
        "%s: has no %s, so a changed number in its files would not be noticed. Restore it if the run wrote it.",
        directory,
        CHECKSUMS,
    )


def write_checksums(directory: Path) -> None:
    """Note the sha256 of every file that says what the adapter computes; the last file that is written."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name not in READ_BY_PEOPLE)
    write_json(directory / CHECKSUMS, {path.name: sha256(path) for path in files})


def _check(directory: Path) -> None:
    listed = read_json(directory / CHECKSUMS, dict)
    if left_out := [name for name in FILES if name not in listed]:
        raise BadInput(f"{directory / CHECKSUMS}: leaves out {left_out[0]}. {REMEDY}")
    for path in sorted(directory.iterdir()):
        if path.suffix in READ and path.name not in (*READ_BY_PEOPLE, *listed):
            raise BadInput(f"{path}: {CHECKSUMS} leaves it out. {REMEDY}")
    for name, expected in listed.items():
        path = directory / name
        if Path(name).name != name or not path.is_file():
            raise BadInput(f"{path}: is missing, {CHECKSUMS} names it. {REMEDY}")
        if sha256(path) != expected:
            raise BadInput(f"{path}: is not as it was written ({CHECKSUMS} has another sha256). {REMEDY}")


def read_json(path: Path, kinds: type | tuple[type, ...]) -> Any:
    """The value in a JSON file of the directory.

    Args:
        kinds: of which it must be.

    Raises:
        BadInput: the file cannot be read, or holds something else.
    """
    try:
        check_regular(path)
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{path}: cannot be read ({e}). {REMEDY}") from e
    if not isinstance(value, kinds):
        raise BadInput(f"{path}: holds a {type(value).__name__}, which does not belong there. {REMEDY}")
    return value


def read_labels(directory: Path) -> list[str] | None:
    """The answers in class order, each once; None where the task has no closed list. Raises BadInput."""
    labels = read_json(directory / "labels.json", (list, NoneType))
    if labels is not None and not (all(isinstance(x, str) for x in labels) and len(set(labels)) == len(labels)):
        raise BadInput(f"{directory / 'labels.json'}: is no list of texts, each once. {REMEDY}")
    return labels


def read_statistics(directory: Path) -> dict[str, Any] | None:
    """Mean and deviation of the condition, lists of equal length; None where there are none. Raises BadInput."""
    path = directory / "feature_statistics.json"
    statistics = read_json(path, (dict, NoneType))
    for name in ("mean", "std") if statistics is not None else ():
        numbers = statistics.get(name)
        if not isinstance(numbers, list) or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
            raise BadInput(f"{path}: `{name}` is no list of numbers, all finite. {REMEDY}")
    if statistics is not None and len(statistics["mean"]) != len(statistics["std"]):
        raise BadInput(f"{path}: `mean` and `std` differ in length. {REMEDY}")
    return statistics


def read_backbone(directory: Path) -> dict[str, Any]:
    """`options` of the backbone and `config` of the base model, besides others. Raises BadInput."""
    backbone = read_json(directory / "backbone.json", dict)
    if not all(isinstance(backbone.get(name), dict) for name in ("options", "config")):
        raise BadInput(f"{directory / 'backbone.json'}: does not hold `options` and `config`. {REMEDY}")
    return backbone
