"""A study: a recipe whose runs differ in method, optimiser or seed and share everything else. Imports no torch.

    study:
      - {name: low, optim: {lr: 1.0e-4}}
      - {name: other, method: {name: adapter, r: 16}, seed: 1}

A member is the recipe with the sections of its entry laid over it, and its run directory is RUN_DIR/NAME.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft_ds import recipe as recipes
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.merging import deep_merge
from mmpeft_ds.recipe.parse import Origin, override, parse_yaml, shown

MAY_VARY = ("method", "optim", "seed")  # all else is of the frozen base, of the batches, or of the process
FILES = ("study.md", "study.json")  # the table, beside the members' directories
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass
class Study:
    """A parsed study.

    Attributes:
        run_dir: directory of the members' run directories and of the table.
        members: name -> recipe, in order.
        settings: name -> dotted key -> value, of the keys in which members differ.
        path: of the recipe, for messages.
    """

    run_dir: Path
    members: dict[str, recipes.Recipe]
    settings: dict[str, dict[str, Any]]
    path: str

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), vary: Sequence[str] = ()) -> Study:
        """Read a recipe with a section `study`, or any recipe with something to vary.

        Args:
            vary: `key=value,value,...` below `method`, `optim` or `seed`; every member is made once for each
                combination.

        Raises:
            BadInput: one line naming file, key and remedy.
        """
        raw, origin = recipes.read(path, list(overrides))
        entries = raw.pop("study", None)
        if entries is None and not vary:
            raise BadInput(
                f"{path}: has no section `study`, and nothing varies. Add one, or --vary optim.lr=1e-3,3e-4."
            )
        listed = _listed(entries, origin) if entries is not None else [("", {})]
        if "run_dir" not in raw:
            raise BadInput(f"{origin('')}: required key 'run_dir' is missing. Add `run_dir: <a directory>`.")
        if not isinstance(raw["run_dir"], str):
            raise BadInput(f"{origin('run_dir')}: expected a text, got {shown(raw['run_dir'])}.")
        run_dir = Path(raw["run_dir"])
        members: dict[str, recipes.Recipe] = {}
        given: list[str] = []
        for (own, entry), *chosen in itertools.product(listed, *_varied(vary)):
            name = "-".join(filter(None, (own, *(_label(key, value) for key, value in chosen))))
            if not _NAME.fullmatch(name):
                raise BadInput(
                    f"{origin('study')}: the name {shown(name)} becomes a directory. Use letters, digits, `.`, `_` "
                    "and `-`; give each entry a `name` where values are no numbers or words."
                )
            if name in FILES:
                raise BadInput(f"{origin('study')}: {name} is the table of the study. Give the member another name.")
            if name in members:
                raise BadInput(f"{origin('study')}: two members are named {name}. Give each its own name.")
            members[name] = _member(raw, entry, chosen, run_dir / name, f"{origin.path} ({name})", origin)
            given += [key for key in [*flat(entry), *(key for key, _ in chosen)] if key not in given]
        settings = {name: {key: _value(recipe, key) for key in given} for name, recipe in members.items()}
        equal = [
            key for key in given if all(own[key] == next(iter(settings.values()))[key] for own in settings.values())
        ]
        settings = {name: {k: v for k, v in own.items() if k not in equal} for name, own in settings.items()}
        return cls(run_dir, members, settings, str(path))

    def move(self, run_dir: Path) -> None:
        """Take another directory."""
        self.run_dir = run_dir
        for name, recipe in self.members.items():
            recipe.run_dir = str(run_dir / name)


def _listed(entries: Any, origin: Origin) -> list[tuple[str, dict[str, Any]]]:
    """Name and sections of each entry. Raises BadInput."""
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) and "name" in e for e in entries):
        raise BadInput(
            f"{origin('study')}: expected a list of mappings with a `name` and any of {', '.join(MAY_VARY)}, one a "
            "member."
        )
    for number, entry in enumerate(entries):
        for key in entry.keys() - {"name", *MAY_VARY}:
            raise BadInput(f"{origin(f'study.{number}.{key}')}: {_fixed(str(key))}")
    return [(str(entry["name"]), {k: v for k, v in entry.items() if k != "name"}) for entry in entries]


def _fixed(key: str) -> str:
    return (
        f"members of a study share {key}; they may differ in {', '.join(MAY_VARY)}. Set it for all outside `study`, "
        "or train this one by launchers/train.py."
    )


def _varied(items: Sequence[str]) -> list[list[tuple[str, Any]]]:
    """The choices of every `--vary`. Raises BadInput."""
    choices = [_values(item) for item in items]
    keys = [values[0][0] for values in choices]
    for number, key in enumerate(keys):
        for earlier in keys[:number]:
            if earlier == key:
                raise BadInput(f"--vary {key}: is given twice. Name all its values in one, separated by commas.")
            if earlier.startswith(f"{key}."):
                raise BadInput(f"--vary {key}: would replace what --vary {earlier} sets. Give it before that.")
    return choices


def _values(item: str) -> list[tuple[str, Any]]:
    """Key and value of each choice of a `--vary`. Raises BadInput."""
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise BadInput(f"--vary {item}: expected key=value,value, such as --vary optim.lr=1e-3,3e-4.")
    if key.partition(".")[0] not in MAY_VARY:
        raise BadInput(f"--vary {key}: {_fixed(key)}")
    values = parse_yaml(f"[{text}]", f"--vary {key}")
    if not values:
        raise BadInput(f"--vary {key}: names no value.")
    if len(set(map(_flow, values))) < len(values):
        raise BadInput(f"--vary {key}: names a value twice. Leave one of them out.")
    return [(key, value) for value in values]


def _label(key: str, value: Any) -> str:
    """Part of a member's name, such as `lr0.001`."""
    if isinstance(value, dict):
        value = value.get("name", "")
    return f"{key.rpartition('.')[2] if key != 'method' else ''}{value}".removeprefix("name")


def _member(
    common: dict[str, Any],
    entry: dict[str, Any],
    chosen: Iterable[tuple[str, Any]],
    run_dir: Path,
    title: str,
    origin: Origin,
) -> recipes.Recipe:
    """The recipe of one member. Raises BadInput."""
    raw = deep_merge(common, entry)
    for key, value in chosen:
        top, _, below = key.partition(".")
        if below:
            override(raw, f"{key}={_flow(value)}", "--vary")
        else:
            raw[top] = deep_merge(raw.get(top), value)
    raw["run_dir"] = str(run_dir)
    data = raw.get("data") or {}
    if isinstance(data, dict) and data.get("seed") is None:  # all members see the same batches
        raw["data"] = {**data, "seed": common.get("seed", 0)}
    return recipes.from_dict(raw, Origin(title, origin.overrides, origin.replaced))


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    dotted: dict[str, Any] = {}
    for key, value in settings.items():
        dotted |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return dotted


def _value(recipe: recipes.Recipe, key: str) -> Any:
    """Value of a dotted key, or the mapping there; None if the recipe leaves it to a default."""
    value: Any = recipes.to_dict(recipe)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _flow(value: Any) -> str:
    return json.dumps(value, default=str)  # a mapping in YAML as well
