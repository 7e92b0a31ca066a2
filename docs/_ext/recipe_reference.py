"""Directives that write out the keys of a recipe, or the options of a data source, from the dataclasses themselves.

    ```{recipe-keys} mmpeft_ds.data.options:DataOptions      a table of one dataclass
    ```{component-keys} backbones                            a heading and a table for each backbone
    ```{source-keys}                                         the command-line options of each data source

What a key means stands in the dataclass: `metadata={"help": ...}` of the field, or its line under `Attributes:`. A key
without either is a warning, so it ends a build with warnings as errors.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)
SIMPLE = {int: "integer", float: "number", str: "text", bool: "true / false", type(None): "null", dict: "mapping"}


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("recipe-keys", RecipeKeys)
    app.add_directive("component-keys", ComponentKeys)
    app.add_directive("source-keys", SourceKeys)
    return {"version": "1", "parallel_read_safe": True}


class _Written(SphinxDirective):
    """A directive whose content is Markdown that it makes itself."""

    optional_arguments = 1
    final_argument_whitespace = False

    def run(self) -> list[nodes.Node]:
        """The parsed Markdown."""
        from docutils.statemachine import StringList

        container = nodes.Element()
        lines = StringList(self.text().splitlines(), source=self.env.docname)
        self.state.nested_parse(lines, self.content_offset, container, match_titles=True)
        return container.children

    def text(self) -> str:
        """Markdown."""
        raise NotImplementedError


class RecipeKeys(_Written):
    """One dataclass, named as `module:Class`."""

    def text(self) -> str:
        """A table."""
        module, _, name = self.arguments[0].partition(":")
        cls = getattr(importlib.import_module(module), name)
        return table(cls, dataclasses.fields(cls))


class ComponentKeys(_Written):
    """Every entry of `backbones`, `methods` or `tasks`."""

    def text(self) -> str:
        """Headings and tables."""
        from mmpeft_ds import registry

        kind = self.arguments[0]
        package = importlib.import_module(f"mmpeft_ds.{kind}")
        parts = []
        for name in registry.names(package):
            cls = registry.options(package, name, kind)
            parts += [f"### {kind.removesuffix('s')} `{name}`", "", table(cls, dataclasses.fields(cls)), ""]
        return "\n".join(parts)


class SourceKeys(_Written):
    """Every source of data_prep/prepare.py."""

    def text(self) -> str:
        """Headings and tables."""
        from data_prep import sources
        from mmpeft_ds import registry

        parts = []
        for name in registry.names(sources):
            options = registry.options(sources, name, "SOURCE")
            shown = name.replace("_", "-")
            rows = table(options, dataclasses.fields(options), flags=True)
            parts += [f"### `{shown}`", "", rows, ""]
        return "\n".join(parts)


def table(cls: type, fields: Any, flags: bool = False) -> str:
    """A Markdown table of key, type, default and meaning."""
    hints, helps = typing.get_type_hints(cls), descriptions(cls)
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for f in fields:
        meaning = helps.get(f.name) or " ".join(f.metadata.get("help", "").split())
        if not meaning:
            logger.warning("%s.%s: no text says what this key means", cls.__module__, f"{cls.__name__}.{f.name}")
        key = "--" + f.name.replace("_", "-") if flags else f.name
        cells = (f"`{key}`", taken(hints[f.name]), default(f), meaning)
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(rows)


def descriptions(cls: type) -> dict[str, str]:
    """Field -> its lines under `Attributes:` in the docstring of the class or of one that it inherits from."""
    found: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__):
        text = inspect.cleandoc(ancestor.__dict__.get("__doc__") or "")
        _, _, section = text.partition("Attributes:\n")
        for names, words in re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8,}.*)*)", section, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(words.split()))
    return found


def taken(hint: Any) -> str:
    """The type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in SIMPLE:
        return SIMPLE[hint]
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is list:
        return f"list of {taken(inner[0])}" if inner else "list"
    if origin is tuple:
        return f"list of {len(inner)}: {taken(inner[0])}"
    if origin is dict:
        return "mapping"
    if inner:  # a union
        return " or ".join(taken(i) for i in inner)
    if dataclasses.is_dataclass(hint):
        return "mapping, see below"
    return "path" if getattr(hint, "__name__", "") == "Path" else "anything" if hint is Any else hint.__name__


def default(f: dataclasses.Field) -> str:
    """The default as a recipe would say it."""
    value = f.default
    if f.default_factory is not dataclasses.MISSING:
        value = f.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        return ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value in ("", [], {}):
        return "empty"
    return f"`{list(value) if isinstance(value, tuple) else value}`"
