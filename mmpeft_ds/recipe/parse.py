"""Reading of recipes: YAML, overrides, and dataclasses with every key and type checked."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import MISSING
from typing import Any

import pydantic
import yaml

from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe import elsewhere


class Origin:
    """Origin of a value for error messages: the recipe file, or the `--set` that changed it.

    Args:
        path: of the file.
        overrides: keys that `--set` gave.
        replaced: of those that name a component (`method.name`), the name that stood in the file.
    """

    def __init__(self, path: str = "recipe", overrides: tuple[str, ...] = (), replaced: dict[str, str] | None = None):
        self.path = path
        self.overrides = overrides
        self.replaced = replaced or {}

    def __call__(self, key: str) -> str:
        for given in self.overrides:
            if key == given or key.startswith(given + ".") or given.startswith(key + "."):
                return f"--set {key}"
        return f"{self.path}: {key}" if key else self.path


def typed(
    cls: type,
    given: Any,
    key: str,
    origin: Origin,
    fields: list[dataclasses.Field] | None = None,
    also: tuple[str, ...] = (),
) -> Any:
    """An instance of the dataclass `cls` from a mapping, every key and type checked.

    Args:
        key: dotted position of `given` in the recipe, empty at the top.
        fields: the fields a recipe may set, where not all of them (peft configs have internal ones).
        also: keys of the section that the caller has taken out of `given`; messages name them with the others.

    Raises:
        BadInput: unknown or missing key, wrong type, or a value that the dataclass itself refuses.
    """
    if not isinstance(given, dict):
        raise BadInput(f"{origin(key)}: expected a mapping with the keys of {cls.__name__}, got {shown(given)}.")
    known = {f.name: f for f in (fields or dataclasses.fields(cls)) if f.init}
    types_of = hints(cls)
    for name in given:
        if name not in known:
            raise BadInput(_unknown(str(name), [*also, *known], key, origin))
    for name, f in known.items():
        if name not in given and f.default is MISSING and f.default_factory is MISSING:
            what = type_name(types_of[name])
            raise BadInput(f"{origin(key)}: required key {name!r} is missing. Add `{name}: <{what}>`.")
    values = {
        name: _value(types_of[name], value, _join(key, name), origin, known[name]) for name, value in given.items()
    }
    try:
        return cls(**values)
    except (ValueError, TypeError, BadInput) as e:
        raise BadInput(f"{origin(key)}: {one_line(e)}") from e


def _unknown(name: str, known: Collection[str], key: str, origin: Origin) -> str:
    """The message about an unknown key."""
    position = _join(key, name)
    former = origin.replaced.get(f"{key}.name")
    if former and position not in origin.overrides:
        return (
            f"{origin.path}: {position}: belongs to {former!r}, which --set {key}.name replaced, and the new one does "
            f"not know it. Replace the section as a whole: --set '{key}={{name: ..., ...}}'. Known there: "
            f"{', '.join(known)}."
        )
    near = difflib.get_close_matches(name, known, n=1)
    hint = elsewhere.hint(name, position, known) or (f"Did you mean {near[0]!r}? " if near else "")
    return f"{origin(position)}: unknown key. {hint}Known: {', '.join(known)}."


def parse_yaml(text: str, name: str) -> Any:
    """YAML with floats such as `1e-3` read as numbers and doubled keys refused. Raises BadInput."""
    try:
        return copy.deepcopy(_parsed(text))
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        at = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(e, "problem", None) or one_line(e)
        raise BadInput(f"{name}:{at} not valid YAML ({problem}). Check indentation, colons and quotes there.") from e


@functools.lru_cache(maxsize=32)
def _parsed(text: str) -> Any:
    """One command reads the recipe of an adapter up to four times, and each takes some milliseconds."""
    return yaml.load(text, _Loader)


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


def override_all(raw: dict[str, Any], items: Sequence[str], path: str) -> Origin:
    """Set all `a.b=value` in the mapping of a recipe, in place; where its values come from. Raises BadInput."""
    before = _names(raw)
    keys = tuple(override(raw, item) for item in items)
    after = _names(raw)
    replaced = {key: name for key, name in before.items() if key in keys and after.get(key) != name}
    return Origin(path, keys, replaced)


def _names(raw: Any, key: str = "") -> dict[str, str]:
    """Dotted key -> the name of every component in a mapping."""
    entries = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    names: dict[str, str] = {}
    for part, value in entries:
        if part == "name" and isinstance(value, str):
            names[_join(key, part)] = value
        names |= _names(value, _join(key, part))
    return names


def override(raw: dict[str, Any], item: str, option: str = "--set") -> str:
    """Set `a.b=value` in the mapping of a recipe, in place; list elements by number.

    Args:
        option: which gave it, for messages.

    Returns:
        the dotted key.

    Raises:
        BadInput: no `key=value`, or a key that leads nowhere.
    """
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise BadInput(f"{option} {item}: expected key=value, such as {option} optim.lr=1e-3.")
    value = parse_yaml(text, f"{option} {key}")
    at: Any = raw
    *parents, last = key.split(".")
    for depth, part in enumerate([*parents, last]):
        end = depth == len(parents)
        if isinstance(at, list):
            if not part.isdigit() or int(part) >= len(at):
                above = ".".join(parents[:depth])
                raise BadInput(f"{option} {key}: {part!r} is no index of {above}, which has {len(at)} element(s).")
            part = int(part)
        elif not isinstance(at, dict):
            raise BadInput(f"{option} {key}: {'.'.join(parents[:depth])} is {shown(at)} and has no keys below it.")
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
        if isinstance(value, bool) and "on" in {f.name for f in dataclasses.fields(hint)}:
            value = {"on": value}
        return typed(hint, {} if value is None else value, key, origin)
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list and inner and dataclasses.is_dataclass(inner[0]) and isinstance(value, list):
        return [typed(inner[0], v, _join(key, i), origin) for i, v in enumerate(value)]
    if typing.get_origin(hint) is dict and dataclasses.is_dataclass(inner[1]) and isinstance(value, dict):
        return {str(name): typed(inner[1], v, _join(key, name), origin) for name, v in value.items()}
    try:
        return validated(hint, json.loads(json.dumps(value, default=str)))
    except ValueError:
        example = "" if f.default in (MISSING, None) else f", such as {json.dumps(f.default, default=str)}"
        raise BadInput(f"{origin(key)}: expected {type_name(hint)}{example}, got {shown(value)}.") from None


def validated(hint: Any, value: Any) -> Any:
    """`value` as the type `hint` has it: no "8" for 8 and no 1 for true, yet a list for a tuple and 1 for 1.0.

    Raises:
        ValueError: if it is of another type.
        TypeError: if it is nothing that JSON can hold.
    """
    return _adapter(hint).validate_json(json.dumps(value), strict=True)


@functools.cache
def _adapter(hint: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(hint)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Types of the fields of a dataclass by name, not to be changed."""
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a name imported for type checkers only
        return {f.name: Any if isinstance(f.type, str) else f.type for f in dataclasses.fields(cls)}


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a `Literal`, or an optional one, allows; empty for other types."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    inner = [choices(h) for h in typing.get_args(hint) if h is not types.NoneType]
    return inner[0] if len(inner) == 1 and _is_union(hint) else ()


def type_name(hint: Any) -> str:
    """A type as error messages name it."""
    simple = {int: "an integer", float: "a number", str: "a text", bool: "true or false", types.NoneType: "null"}
    if hint in simple:
        return simple[hint]
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if _is_union(hint):
        return " or ".join(map(type_name, typing.get_args(hint)))
    if origin in (list, tuple):
        return "a list"
    if dataclasses.is_dataclass(hint) or origin is dict:
        return "a mapping"
    return str(hint).replace("typing.", "")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def shown(value: Any) -> str:
    """A value as an error message shows it: JSON, cut at 60 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{text if len(text) <= 60 else text[:57] + '...'}"


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())
