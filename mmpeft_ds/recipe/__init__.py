"""A recipe: everything a run depends on, typed. The options of a component stand beside the component."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import REPOSITORY
from mmpeft_ds.recipe.components import Section, components, filled
from mmpeft_ds.recipe.options import EngineOptions, MonitorOptions, OptimOptions
from mmpeft_ds.recipe.parse import Origin, override_all, parse_yaml, shown, typed
from mmpeft_ds.redaction import masked_values

__all__ = [
    "Origin", "Recipe", "Section", "components", "filled", "former", "from_dict", "load", "of_run", "overridden",
    "parse_yaml", "read", "to_dict", "to_yaml", "typed", "where", "written",
]  # fmt: skip

RENAMED = {"fewshot": "few_shot"}  # sections under an earlier name


@dataclass
class Recipe:
    """The recipe that `launchers/train.py --recipe` reads.

    Attributes:
        run_dir: where checkpoints, curves and the adapter go; continued if it holds a valid checkpoint.
        seed: of initialisation and dropout, and of data order and augmentation unless `data.seed` gives another.
        backbone: `name` of a file in backbones/ and its options.
        method: `name` of a file or folder in methods/ and the fields of its config.
        data: what is read, in which order and how much at a time.
        optim: optimiser, learning rate schedule and length.
        engine: DeepSpeed, precision, checkpoints.
        monitor: TensorBoard and the pictures on it.
        start_from: adapter directory whose weights a new run begins with: of this package, of HF Trainer with peft, or
            of ms-swift; empty: the method's own start. A run that is continued does not read it.
    """

    run_dir: str
    backbone: dict[str, Any]
    method: dict[str, Any]
    seed: int = 0
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    monitor: MonitorOptions = field(default_factory=MonitorOptions)
    start_from: str = ""

    def start_options(self) -> dict[str, Any]:
        """Arguments of `distributed.processes.start`."""
        engine = self.engine
        return {
            "threads": engine.threads,
            "seed": self.seed,
            "matmul": engine.matmul,
            "stall": engine.stall,
            "timeout": engine.timeout,
        }

    # Set by `from_dict`; not a field, so that two equal recipes from two files are equal.
    origin: ClassVar[Origin] = Origin()


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a YAML file after `a.b=value` overrides (list elements by number: `data.sources.0.dir=...`).

    The sections of components (`backbone`, `method`, a source's `task`) are checked, but stay plain mappings.

    Raises:
        BadInput: unreadable file, unknown or missing key, wrong type; one line naming file, key and remedy.
    """
    raw, origin = read(path, overrides or [])
    if "few_shot" in raw:
        raise BadInput(f"{path}: a study of many runs. Start it with launchers/few_shot.py --recipe {path}.")
    if "study" in raw:
        raise BadInput(f"{path}: a study of many adapters. Start it with launchers/study.py --recipe {path}.")
    return from_dict(raw, origin)


def read(path: str | Path, overrides: list[str]) -> tuple[dict[str, Any], Origin]:
    """The mapping of a YAML file after overrides, and where its values come from. Raises BadInput."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "is not UTF-8 text"
        raise BadInput(f"{path}: {reason}. Give the path of a YAML file, such as recipes/quickstart.yaml.") from e
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise BadInput(f"{path}: holds {shown(raw)} instead of a mapping. Start from recipes/quickstart.yaml.")
    for old in RENAMED.keys() & raw.keys():
        raise BadInput(f"{path}: the section `{old}` is called `{RENAMED[old]}` now. Rename it there.")
    return raw, override_all(raw, overrides, str(path))


def of_run(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run directory after `overrides`, as of `--set`. Raises BadInput."""
    if not (run / "recipe.yaml").is_file():
        raise BadInput(f"{run}: no run directory (it has no recipe.yaml). Give --run the run_dir of a recipe.")
    return written(run / "recipe.yaml", list(overrides))


def written(path: Path, overrides: list[str] | None = None) -> Recipe:
    """A recipe as a run or an export wrote it, with every option, after `overrides`. Options of the backbone that did
    not exist then get the values that they had without a name. Raises BadInput."""
    recipe = load(path, overrides)
    lacking = [f"backbone.{key}={json.dumps(value)}" for key, value in former(read(path, [])[0], recipe).items()]
    return load(path, [*lacking, *(overrides or [])]) if lacking else recipe


def former(raw: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Options of the backbone that `raw`, of which `recipe` was made, does not name, with the values that they had
    before they existed."""
    values = components(recipe).backbone.options.former
    return {key: values[key] for key in sorted(values.keys() - raw.get("backbone", {}).keys())}


def overridden(raw: dict[str, Any], overrides: list[str], name: str = "recipe") -> Recipe:
    """The recipe of a plain mapping, which is changed, after `a.b=value` overrides; `name` is for error messages."""
    return from_dict(raw, override_all(raw, overrides, name))


def from_dict(raw: dict[str, Any], origin: Origin | None = None) -> Recipe:
    """A recipe from a plain mapping, such as the copy in a checkpoint or an adapter directory. Raises BadInput."""
    origin = origin or Origin()
    recipe = typed(Recipe, raw, "", origin)
    recipe.origin = origin
    components(recipe)  # for the errors
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-able mappings with every default filled in."""
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=sorted))


def to_yaml(recipe: Recipe, change: Callable[[str, Any], Any] = lambda section, value: masked_values(value)) -> str:
    """The recipe as YAML text that `load` reads back to an equal recipe, but for credentials in URLs.

    Args:
        change: gives each section, by its name, as it is to be written.
    """
    written = {section: change(section, value) for section, value in to_dict(recipe).items()}
    return yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=110)


def where(recipe: Recipe, key: str) -> str:
    """Name of `key` of this recipe for error messages: `file.yaml: key` or `--set key`."""
    return recipe.origin(key)


def find_file(name: str) -> Path:
    """`name` below the working directory, else below the repository; the former where neither exists."""
    here = Path(name)
    beside = REPOSITORY / name
    return beside if not here.is_absolute() and not here.exists() and beside.exists() else here
