"""Sections of a recipe that name a component: backbone, method and tasks, typed by the component's own options.

Nothing here imports torch, so a wrong key is refused at once.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mmpeft_ds import backbones, methods, registry, tasks
from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.parse import Origin, shown, typed

if TYPE_CHECKING:
    from mmpeft_ds.recipe import Recipe

PACKAGES = {"backbones": backbones, "methods": methods, "tasks": tasks}


@dataclass(frozen=True)
class Section:
    """A component as a recipe names it.

    Attributes:
        package: `backbones`, `methods` or `tasks`.
        name: of the component.
        options: its `Options`.
        key: position of the section in the recipe.
        origin: where the recipe came from, for error messages.
        inner: sections inside this one by the option that holds them, such as a backbone's encoder.
    """

    package: ModuleType
    name: str
    options: Any
    key: str
    origin: Origin
    inner: dict[str, Section] = field(default_factory=dict)

    @classmethod
    def read(cls, package: ModuleType, given: Any, key: str, origin: Origin) -> Section:
        """The section at `key` of a recipe from its plain mapping.

        An option whose metadata say `component` is a section of that package itself.

        Raises:
            BadInput: no such component, an unknown key, a wrong type, or a value that the options refuse.
        """
        if not isinstance(given, dict):
            raise BadInput(f"{origin(key)}: expected a mapping with `name` and options, got {shown(given)}.")
        name = given.get("name")
        if not isinstance(name, str):
            known = ", ".join(registry.names(package))
            raise BadInput(f"{origin(key)}: `name` is missing or no text. Add `name:` with one of {known}.")
        kind = registry.options(package, name, origin(f"{key}.name"))
        options = typed(kind, {k: v for k, v in given.items() if k != "name"}, key, origin, also=("name",))
        inner = {
            f.name: cls.read(PACKAGES[f.metadata["component"]], value, f"{key}.{f.name}", origin)
            for f in dataclasses.fields(options)
            if "component" in f.metadata and (value := getattr(options, f.name)) is not None
        }
        return cls(package, name, options, key, origin, inner)

    @property
    def entry(self) -> Any:
        """The class of the component, which is imported with all that it needs. Raises BadInput."""
        return registry.load(self.package, self.name, self.where("name"))

    def where(self, option: str = "") -> str:
        """Name of the section, or of one of its options, for error messages."""
        return self.origin(f"{self.key}.{option}" if option else self.key)

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Inside, errors of the component say which section of the recipe they are about."""
        try:
            yield
        except BadInput as e:
            raise BadInput(f"{self.where()}: {e}") from e

    def plain(self) -> dict[str, Any]:
        """The section as a recipe holds it, with every default filled in."""
        return {"name": self.name, **dataclasses.asdict(self.options)}


@dataclass(frozen=True)
class Components:
    """All sections of a recipe that name a component.

    Attributes:
        tasks: by the position of their source in the recipe, such as `data.sources.0`.
    """

    backbone: Section
    method: Section
    tasks: dict[str, Section]


def components(recipe: Recipe) -> Components:
    """The components that a recipe names, with their options. Raises BadInput."""
    origin = recipe.origin
    return Components(
        Section.read(backbones, recipe.backbone, "backbone", origin),
        Section.read(methods, recipe.method, "method", origin),
        {
            key: Section.read(tasks, source.task, f"{key}.task", origin)
            for entries in keyed_sources(recipe).values()
            for key, source in entries.items()
        },
    )


def keyed_sources(recipe: Recipe) -> dict[str, dict[str, SourceOptions]]:
    """The data sources of `sources` and `validation` by their positions in the recipe, such as `data.sources.0`."""
    return {
        role: {f"data.{role}.{i}": source for i, source in enumerate(getattr(recipe.data, role))}
        for role in ("sources", "validation")
    }


def filled(recipe: Recipe, parts: Components | None = None) -> Recipe:
    """A copy of `recipe` with the defaults of its components filled in; `parts` are its components, if known."""
    parts = components(recipe) if parts is None else parts
    full = copy.deepcopy(recipe)
    full.backbone, full.method = parts.backbone.plain(), parts.method.plain()
    for entries in keyed_sources(full).values():
        for key, source in entries.items():
            source.task = parts.tasks[key].plain()
    return full
