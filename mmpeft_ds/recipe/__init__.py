"""A recipe: everything a run depends on, typed. The options of a component stand beside the component."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import yaml

from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.options import EngineOptions, MonitorOptions, OptimOptions

REPOSITORY = Path(__file__).resolve().parents[2]
RENAMED = {"fewshot": "few_shot"}  # sections under an earlier name


@dataclass
class Recipe:
    """What `launchers/train.py --recipe` reads.

    Attributes:
        run_dir: where checkpoints, curves and the adapter go; continued if it holds a valid checkpoint.
        seed: of data order, augmentation, initialisation and dropout.
        backbone: `name` of a file in backbones/ and its options.
        method: `name` of a file or folder in methods/ and the fields of its config.
    """

    run_dir: str
    backbone: dict[str, Any]
    method: dict[str, Any]
    seed: int = 0
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    monitor: MonitorOptions = field(default_factory=MonitorOptions)


class Origin:
    """Where a value came from, for error messages: the recipe file, or the `--set` that changed it."""

    def __init__(self, path: str = "recipe", overrides: tuple[str, ...] = ()):
        self.path = path
        self.overrides = overrides

    def __call__(self, key: str) -> str:
        for given in self.overrides:
            if key == given or key.startswith(given + ".") or given.startswith(key + "."):
                return f"--set {key}"
        return f"{self.path}: {key}" if key else self.path


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a YAML file after `a.b=value` overrides (list elements by number: `data.sources.0.dir=...`).

    Components' own sections (`backbone`, `method`, a source's `task`) stay mappings here; `engine.resolve` types them.

    Raises:
        BadInput: unreadable file, unknown or missing key, wrong type; one line naming file, key and remedy.
    """
    raw, origin = read(path, overrides or [])
    if "few_shot" in raw:
        raise BadInput(f"{path}: a study of many runs. Start it with launchers/few_shot.py --recipe {path}.")
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
        raise BadInput(f"{path}: holds {_shown(raw)} instead of a mapping. Start from recipes/quickstart.yaml.")
    for old in RENAMED.keys() & raw.keys():
        raise BadInput(f"{path}: the section `{old}` is called `{RENAMED[old]}` now. Rename it there.")
    keys = [_override(raw, item) for item in overrides]
    return raw, Origin(str(path), tuple(keys))


def overridden(raw: dict[str, Any], overrides: list[str], name: str = "recipe") -> Recipe:
    """The recipe of a plain mapping, which is changed, after `a.b=value` overrides; `name` is for error messages."""
    keys = [_override(raw, item) for item in overrides]
    return from_dict(raw, Origin(name, tuple(keys)))


def from_dict(raw: dict[str, Any], origin: Origin | None = None) -> Recipe:
    """A recipe from a plain mapping, such as the copy in a checkpoint or an adapter directory. Raises BadInput."""
    origin = origin or Origin()
    recipe = typed(Recipe, raw, "", origin)
    recipe._origin = origin  # not a field: two equal recipes from two files are equal
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-able mappings with every default filled in."""
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=sorted))


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML text that `load` reads back to an equal recipe."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True, width=110)


def where(recipe: Recipe, key: str) -> str:
    """How an error message names `key` of this recipe: `file.yaml: key` or `--set key`."""
    return getattr(recipe, "_origin", Origin())(key)


def find_file(name: str) -> Path:
    """`name` below the working directory, else below the repository; the former where neither exists."""
    here = Path(name)
    beside = REPOSITORY / name
    return beside if not here.is_absolute() and not here.exists() and beside.exists() else here


def typed(cls: type, given: Any, key: str, origin: Origin, fields: list[dataclasses.Field] | None = None) -> Any:
    """An instance of the dataclass `cls` from a mapping, every key and type checked.

    Args:
        key: dotted position of `given` in the recipe, empty at the top.
        fields: the fields a recipe may set, where not all of them (peft configs have internal ones).

    Raises:
        BadInput: unknown or missing key, wrong type, or a value that the dataclass itself refuses.
    """
    if not isinstance(given, dict):
        raise BadInput(f"{origin(key)}: expected a mapping with the keys of {cls.__name__}, got {_shown(given)}.")
    known = {f.name: f for f in (fields or dataclasses.fields(cls)) if f.init}
    hints = _hints(cls)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise BadInput(f"{origin(_join(key, name))}: unknown key. {hint}Known: {', '.join(known)}.")
    for name, f in known.items():
        if name not in given and f.default is MISSING and f.default_factory is MISSING:
            what = _type_name(hints[name])
            raise BadInput(f"{origin(key)}: required key {name!r} is missing. Add `{name}: <{what}>`.")
    values = {name: _value(hints[name], value, _join(key, name), origin, known[name]) for name, value in given.items()}
    try:
        return cls(**values)
    except (ValueError, TypeError, BadInput) as e:
        raise BadInput(f"{origin(key)}: {_one_line(e)}") from e


def parse_yaml(text: str, name: str) -> Any:
    """YAML with floats such as `1e-3` read as numbers and doubled keys refused. Raises BadInput."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        at = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(e, "problem", None) or _one_line(e)
        raise BadInput(f"{name}:{at} not valid YAML ({problem}). Check indentation, colons and quotes there.") from e


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            name = str(key_node.value)
            if name in seen:
                problem = f"key {name!r} stands there twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in a float; people write 1e-3.
_FLOAT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def _override(raw: dict[str, Any], item: str) -> str:
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise BadInput(f"--set {item}: expected key=value, such as --set optim.lr=1e-3.")
    value = parse_yaml(text, f"--set {key}")
    at: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate([*parents, last]):
        end = depth == len(parents)
        if isinstance(at, list):
            if not part.isdigit() or int(part) >= len(at):
                above = ".".join(parents[:depth])
                raise BadInput(f"--set {key}: {part!r} is no index of {above}, which has {len(at)} element(s).")
            part = int(part)
        elif not isinstance(at, dict):
            raise BadInput(f"--set {key}: {'.'.join(parents[:depth])} is {_shown(at)} and has no keys below it.")
        if end:
            at[part] = value
        elif isinstance(at, dict):
            if at.get(part) is None:
                at[part] = {}
            at = at[part]
        else:
            at = at[part]
    return key


def _value(hint: Any, value: Any, key: str, origin: Origin, f: dataclasses.Field) -> Any:
    if dataclasses.is_dataclass(hint):
        return typed(hint, {} if value is None else value, key, origin)
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list and inner and dataclasses.is_dataclass(inner[0]) and isinstance(value, list):
        return [typed(inner[0], v, _join(key, i), origin) for i, v in enumerate(value)]
    try:
        # Through JSON: strict (no "8" for 8, no 1 for true), yet a list may stand for a tuple and 1 for 1.0.
        return pydantic.TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except pydantic.ValidationError:
        example = "" if f.default in (MISSING, None) else f", such as {json.dumps(f.default, default=str)}"
        raise BadInput(f"{origin(key)}: expected {_type_name(hint)}{example}, got {_shown(value)}.") from None


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a name imported for type checkers only
        return {f.name: Any if isinstance(f.type, str) else f.type for f in dataclasses.fields(cls)}


def _type_name(hint: Any) -> str:
    simple = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    if hint in simple:
        return simple[hint]
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    if typing.get_origin(hint) in (list, tuple):
        return "a list"
    if typing.get_origin(hint) is dict:
        return "a mapping"
    return str(hint).replace("typing.", "").replace("NoneType", "null")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{text if len(text) <= 60 else text[:57] + '...'}"


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
