"""Command-line options from a source's `Options` dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """One `--field-name` for each field of the dataclass `options`; helps come from its docstring's `Attributes`."""
    helps = _attribute_docs(options)
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kind, many = _item_type(hints[field.name])
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        settings: dict[str, Any] = {"help": helps.get(field.name, ""), "dest": field.name}
        if default is dataclasses.MISSING:
            settings["required"] = True
        else:
            settings["default"] = default
            settings["help"] += f" (default {default})" if default not in (None, "", []) else ""
        settings["help"] = settings["help"].replace("%", "%%")
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            settings["choices"] = typing.get_args(kind)
        else:
            settings["type"] = kind
        if many:
            settings["nargs"] = "+"
        parser.add_argument("--" + field.name.replace("_", "-"), **settings)


def read_options(options: type, parsed: argparse.Namespace) -> Any:
    """An instance of the dataclass from what was parsed."""
    return options(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(options)})


def compared(options: Any) -> dict[str, Any]:
    """The options that shape the shards. Paths do not: what lies there is the business of the fingerprint."""
    hints = typing.get_type_hints(type(options))
    return {k: v for k, v in dataclasses.asdict(options).items() if _item_type(hints[k])[0] is not Path}


def as_json(options: Any) -> dict[str, Any]:
    """The options as JSON values, paths as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return {k: plain(v) for k, v in dataclasses.asdict(options).items()}


def _item_type(hint: Any) -> tuple[Any, bool]:
    """(type of one value, whether several may be given) of a field's type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


def _attribute_docs(options: type) -> dict[str, str]:
    """Field -> its text in the docstrings of the dataclass and of those that it inherits from."""
    helps: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        text = inspect.cleandoc(cls.__doc__ or "")
        documented = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", text, re.MULTILINE)
        helps |= {name: " ".join(words.split()) for name, words in documented}
    return helps
