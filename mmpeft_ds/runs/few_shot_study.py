"""A few-shot study: its recipe, its cells (methods x shots x seeds) and their results. Imports no model."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.assumed import is_absent, is_subset_absent
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.merging import deep_merge, slug

RESULT = "result.json"
HALVES = ("base", "new")
PICTURES = "pictures"  # in place of a kind of features
SHOWN = 4  # subset files that a message names
NEVER = 10**9  # steps between evaluations, so that there is only the one at the end
SETTINGS = ("name", "features", "once", "base_to_new", "by_shots")  # keys of a method that no recipe has


@dataclass
class TestSet:
    """A data set that scores cells; nothing is chosen on it.

    Attributes:
        name: in tables.
        dir, split: of the data set.
        task: as of a train source; empty: that of the train source.
    """

    __test__ = False  # no test class of pytest

    name: str
    dir: str
    split: str = "test"
    task: dict[str, Any] = field(default_factory=dict)


@dataclass
class FewShotOptions:
    """Keys of the `few_shot` section.

    Attributes:
        shots, seeds: of the subsets that data_prep/few_shot.py wrote for the train source.
        select: `last`, the state at the end of training; `best`, the best on validation, evaluated every epoch.
        tests: test sets; the first is of the training data's own kind, others are shifted.
        base_to_new: shots for which methods are also trained on the first half of the classes and scored on both, on
            the first test set; a method's `base_to_new: false` leaves it out.
    """

    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    select: Literal["last", "best"] = "last"
    tests: list[TestSet] = field(default_factory=list)
    base_to_new: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Attributes:
        method: name of the row.
        shots, seed: of the subset.
        half: `all` classes, or `base`: trained on the first half of them, scored on both.
        recipe: of the run, made of the mapping `given`.
        tests: its test sets.
        once: the method depends on neither shots nor seeds, so this run stands for all.
    """

    method: str
    shots: int
    seed: int
    half: str
    recipe: recipes.Recipe
    given: dict[str, Any]
    tests: tuple[TestSet, ...]
    once: bool = False

    @property
    def path(self) -> Path:
        return Path(self.recipe.run_dir)

    @property
    def title(self) -> str:
        half = "" if self.half == "all" else ", base classes"
        return f"{self.method}, {self.shots} shot{'s' * (self.shots > 1)}, seed {self.seed}{half}"

    @property
    def key(self) -> str:
        """Hash of its settings in the study, without paths; new options do not change it while they have defaults."""
        where = {"run_dir": "", "shots": self.shots, "half": self.half, "select": self.recipe.engine.eval_every}
        content = self.given | where | {"tests": [vars(test) for test in self.tests]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class Study:
    """A parsed few-shot recipe.

    Attributes:
        out: directory of all cells and of the tables.
        options: of the section `few_shot`.
        methods: entries of `methods`, by the name of their row.
        common: everything else: the part of a recipe that all cells share.
    """

    out: Path
    options: FewShotOptions
    methods: dict[str, dict[str, Any]]
    common: dict[str, Any]
    origin: recipes.Origin

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Study:
        """Read a few-shot recipe: a recipe without `method`, with the sections `few_shot` and `methods`.

        Raises:
            BadInput: one line naming file, key and remedy.
        """
        raw, origin = recipes.read(path, overrides or [])
        entries, section = raw.pop("methods", None), raw.pop("few_shot", {})
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "name" in e for e in entries or [0]):
            raise BadInput(f"{origin('methods')}: expected a list of mappings with a `name`, one per table row.")
        names = [str(entry["name"]) for entry in entries]
        if len(set(map(slug, names))) < len(names):
            raise BadInput(f"{origin('methods')}: two rows have the same name. Give each its own.")
        options = recipes.typed(FewShotOptions, section, "few_shot", origin)
        for key, given in (("shots", options.shots), ("seeds", options.seeds), ("tests", options.tests)):
            if not given:
                raise BadInput(f"{origin('few_shot')}: `{key}` is empty. Name at least one.")
        if "run_dir" not in raw:
            raise BadInput(f"{origin('')}: required key 'run_dir' is missing. Add `run_dir: <a directory>`.")
        return cls(Path(raw["run_dir"]), options, dict(zip(names, entries, strict=True)), raw, origin)

    def only(self, methods: list[str], shots: list[int], seeds: list[int]) -> Study:
        """A part of the study; empty lists keep everything. Raises BadInput for names that it does not have."""
        for key, wanted, known in (
            ("methods", methods, list(self.methods)),
            ("shots", shots, self.options.shots),
            ("seeds", seeds, self.options.seeds),
        ):
            if strange := [w for w in wanted if w not in known]:
                raise BadInput(
                    f"--{key}: {strange[0]!r} is not in {self.origin('')}. Known: {', '.join(map(str, known))}."
                )
        part = copy.deepcopy(self)
        part.methods = {name: entry for name, entry in part.methods.items() if not methods or name in methods}
        part.options.shots = shots or part.options.shots
        part.options.seeds = seeds or part.options.seeds
        return part

    def cells(self) -> list[Cell]:
        """All runs, method by method. Raises BadInput."""
        cells = []
        for name, entry in self.methods.items():
            once = bool(entry.get("once"))
            for half in ("all", "base"):
                shots = self.options.shots
                if half == "base":
                    shots = [s for s in shots if s in self.options.base_to_new and entry.get("base_to_new", True)]
                for count in shots[-1:] if once else shots:
                    for seed in self.options.seeds[:1] if once else self.options.seeds:
                        cells.append(self.cell(name, count, seed, half))
        return cells

    def cell(self, name: str, shots: int, seed: int, half: str = "all") -> Cell:
        """One run: the common part, the method's, its settings for this number of shots, and the subset."""
        entry = self.methods[name]
        index = list(self.methods).index(name)
        merged = copy.deepcopy(self.common)
        by_shots = entry.get("by_shots") or {}
        for part in (entry, by_shots.get(shots) or by_shots.get(str(shots)) or {}):
            merged = deep_merge(merged, {k: v for k, v in part.items() if k not in SETTINGS})
        suffix = "" if half == "all" else f"-{half}"
        merged["run_dir"] = str(self.out / slug(name) / f"{shots}-seed{seed}{suffix}")
        merged["seed"] = seed
        origin = recipes.Origin(f"{self.origin.path}: methods.{index} ({name})", self.origin.overrides)
        given = with_features(merged, entry.get("features", ""))
        recipe = recipes.from_dict(given, origin)
        for role, split in (("sources", ""), ("validation", "-val")):
            for source in getattr(recipe.data, role):
                source.subset = source.subset or f"few_shot/{shots}-seed{seed}{split}{suffix}.json"
        if self.options.select == "last":
            recipe.engine.eval_every, recipe.engine.patience = NEVER, 0
        tests = [TestSet(**with_features(vars(test), entry.get("features", ""))) for test in self.options.tests]
        # The halves are of the classes of the training data, so only the first test set has them.
        tests = tuple(tests if half == "all" else tests[:1])
        return Cell(name, shots, seed, half, recipe, given, tests, bool(entry.get("once")))


def check_prepared(cells: list[Cell]) -> None:
    """Refuse cells whose data sets are not prepared, or whose samples are not chosen. Raises BadInput that names each
    data set, or each file of chosen samples, once."""
    dirs = [s.dir for cell in cells for s in (*cell.recipe.data.sources, *cell.recipe.data.validation, *cell.tests)]
    if absent := [dir for dir in dict.fromkeys(dirs) if is_absent(dir)]:
        raise BadInput(
            f"not prepared, since they have no manifest.json: {', '.join(absent)}. Prepare them "
            "(data_prep/prepare.py, launchers/features.py; the recipe says how), or leave out the methods that read "
            "them: --methods."
        )
    sources = [s for cell in cells for s in (*cell.recipe.data.sources, *cell.recipe.data.validation)]
    chosen = dict.fromkeys((s.subset, s.dir) for s in sources if s.subset)
    if absent := [f"{dir}/{subset}" for subset, dir in chosen if is_subset_absent(subset, dir)]:
        more = f" and {len(absent) - SHOWN} more" if len(absent) > SHOWN else ""
        raise BadInput(
            f"no such subset file: {', '.join(absent[:SHOWN])}{more}. data_prep/few_shot.py DIR writes those of a "
            "data set."
        )


def results(study: Study) -> list[dict[str, Any]]:
    """Results of the cells that are done, in order."""
    return [result for cell in study.cells() if (result := read_result(cell)) is not None]


def reads(recipe: recipes.Recipe) -> str:
    """Parts of a sample that the method reads: `image`, `captions` or both."""
    captions = recipe.data.sources[0].task.get("text", "none") == "captions"
    inputs = recipe.method.get("inputs", "both" if captions else "image")
    return {"image": "image", "text": "captions", "both": "image + captions" if captions else "image"}[inputs]


def is_done(cell: Cell) -> bool:
    """Whether the cell has its result, and its adapter, which is written after that.

    Raises:
        BadInput: if the result is of other settings.
    """
    result = read_result(cell)
    if result is not None and result["key"] != cell.key:
        raise BadInput(
            f"{cell.path / RESULT}: the settings of {cell.title} have changed since. Remove {cell.path} to run it "
            "again, or give another run_dir."
        )
    ended_between = (cell.path / "checkpoints").is_dir() and not (cell.path / "finished.json").is_file()
    return result is not None and not ended_between


def read_result(cell: Cell) -> dict[str, Any] | None:
    """The result of the cell, None if it is not done. Raises BadInput if it is damaged."""
    try:
        return json.loads((cell.path / RESULT).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BadInput(f"{cell.path / RESULT}: damaged. Remove {cell.path} to run it again.") from error


def with_features(value: Any, features: str) -> Any:
    """A copy of `value` with `features` in place of every `{features}` in texts; for `pictures` without
    `-{features}`: the data set that the features were made of."""
    if isinstance(value, dict):
        return {key: with_features(v, features) for key, v in value.items()}
    if isinstance(value, list):
        return [with_features(v, features) for v in value]
    if not isinstance(value, str):
        return value
    return value.replace("-{features}", "") if features == PICTURES else value.replace("{features}", features)
