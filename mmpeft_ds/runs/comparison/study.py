"""A comparison of methods: its settings, its rows and the runs of each, one after the other, resumable.

OUT/comparison.json         settings, rows with the widths that were chosen, and what does not fit the backbone
OUT/recipes/ROW-seedN.yaml  recipe of a run, which launchers/train.py takes by itself
OUT/runs/ROW-seedN          run directory
OUT/results/ROW-seedN.json  result, see `result`
OUT/table.md, OUT/pareto.png  see `report`
"""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import write_atomic, write_json, writing
from mmpeft_ds.runs.comparison import forgetting, result
from mmpeft_ds.runs.comparison.rows import Fitted, fit, named, trained_of, usual, with_method

FILE = "comparison.json"
SECOND_SAMPLES = 200
Launch = Callable[..., int]


@dataclass(frozen=True)
class Settings:
    """Settings that all rows share; a comparison that was begun with others is not continued.

    Attributes:
        steps: optimizer steps of each run.
        evaluations: on the validation data in a run, evenly spread; the last is at its end.
        budget: parameters that each method may train; 0: as many as the recipe's own method.
        tolerance: share of the budget by which a row may differ.
        split: of the training data, on which the exported adapter is scored; empty: the best validation score counts.
        second: directory of the second task's data, and `second_split`; empty: no forgetting is measured.
    """

    steps: int = 120
    evaluations: int = 4
    budget: int = 0
    tolerance: float = 0.1
    split: str = ""
    second: str = ""
    second_split: str = "test"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("evaluations", 1), ("budget", 0)):
            if getattr(self, name) < least:
                raise BadInput(f"--{name}: must be {least} or more, got {getattr(self, name)}.")
        if not 0 < self.tolerance < 1:
            raise BadInput(f"--tolerance: must lie between 0 and 1, got {self.tolerance}.")
        if self.second:
            Manifest.load(self.second).shards(self.second_split)  # refuses what is not there, before anything is run


@dataclass
class Comparison:
    """A comparison in its directory.

    Attributes:
        recipe: of the user; its `method`, `run_dir` and `seed` are those of the first row at most.
        rows: those that are asked for and fit the backbone.
        refused: row -> why it does not.
    """

    out: Path
    recipe: recipes.Recipe
    settings: Settings
    rows: list[Fitted] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, out: Path, recipe: recipes.Recipe, settings: Settings, asked: Sequence[str]) -> Comparison:
        """A new comparison, or the one that `out` holds, with the rows that are asked for.

        Args:
            asked: rows as of `rows.section`; empty: all that `rows.usual` has, without those that do not fit.

        Raises:
            BadInput: `out` holds a comparison with other settings; a row that is asked for by name does not fit.
        """
        if not recipe.data.validation:
            raise BadInput(
                f"{recipes.where(recipe, 'data.validation')}: empty, and a comparison needs scores. Add one."
            )
        if twice := {named(spec) for spec in asked if [named(s) for s in asked].count(named(spec)) > 1}:
            raise BadInput(f"--methods: {min(twice)} is there twice. Name each row once.")
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        kept = _kept(out / FILE)
        if not settings.budget:
            budget = kept["settings"]["budget"] if kept else trained_of(recipe, recipe.method)
            settings = dataclasses.replace(settings, budget=budget)
        same = {**dataclasses.asdict(settings), "recipe": _shared(recipe)}
        if kept and kept["settings"] != same:
            keys = [key for key in same if same[key] != kept["settings"].get(key)]
            raise BadInput(f"{out}: holds a comparison with another {', '.join(keys)}. Give a new one another --out.")
        made = cls(out, recipe, settings)
        rows, refused = (kept or {}).get("rows", {}), (kept or {}).get("refused", {})
        for spec in asked or usual():
            name = named(spec)
            if name not in rows and (asked or name not in refused):
                try:
                    rows[name] = dataclasses.asdict(fit(spec, recipe, settings.budget, settings.tolerance))
                except BadInput as problem:
                    if asked:
                        raise
                    refused[name] = str(problem).removeprefix("recipe: ")
            if name in rows:
                made.rows.append(Fitted(**rows[name]))
        write_json(out / FILE, {"settings": same, "rows": rows, "refused": refused})
        made.refused = {} if asked else refused
        return made

    def cells(self, seeds: int) -> Iterator[tuple[Fitted, recipes.Recipe, Path]]:
        """Row, recipe and result file of each run: all rows with the first seed, then with the next."""
        for number in range(seeds):
            for row in self.rows:
                recipe = self.recipe_of(row, self.recipe.seed + number)
                yield row, recipe, self.out / "results" / f"{row.name}-seed{recipe.seed}.json"

    def recipe_of(self, row: Fitted, seed: int) -> recipes.Recipe:
        """The recipe of one run."""
        made = with_method(self.recipe, row.method, row.cached)
        made.seed = seed
        made.run_dir = str(self.out / "runs" / f"{row.name}-seed{seed}")
        made.optim.max_steps = self.settings.steps
        made.engine.eval_every = max(1, self.settings.steps // self.settings.evaluations)
        made.engine.save_every, made.engine.keep_last, made.engine.patience = 0, 1, 0
        made.monitor.tensorboard, made.monitor.samples = True, 0  # the scores of evaluations stand there
        return made

    def run(self, seeds: int, launch: Launch) -> tuple[int, bool]:
        """Run what is missing, and write a result file for each.

        A row whose training fails gets a file that says so, and is tried again at the next start; where nothing has
        succeeded yet, its exit code ends the comparison.

        Args:
            launch: starts a launcher with its arguments under `deepspeed` and returns the exit code.

        Returns:
            exit code; and whether all runs are done, False where one was stopped.
        """
        failures = 0
        cells = list(self.cells(seeds))
        for number, (row, recipe, path) in enumerate(cells, 1):
            if _succeeded(path):
                continue
            print(f"\n--- {number}/{len(cells)} {row.name}, seed {recipe.seed}", flush=True)
            began, created_at = time.perf_counter(), result.now()
            code = self._train(recipe, launch)
            run = Path(recipe.run_dir)
            if code == 0 and not (run / "finished.json").is_file():
                return 0, False
            if code == 0 and self.settings.split:
                words = ("--run", str(run), "--split", self.settings.split)
                code = launch("launchers/evaluate.py", *words)
            times = {"created_at": created_at, "total_time": time.perf_counter() - began}
            if code:
                write_json(path, result.failed(row, recipe, error=f"exit code {code}", **times))
                if code < 0 or code > 128 or not any(_succeeded(p) for _, _, p in cells):
                    return code, False
                failures += 1
                continue
            second, test = self._second(run), self._test(run)
            times["total_time"] = time.perf_counter() - began
            budget = {"parameters": self.settings.budget, "tolerance": self.settings.tolerance}
            made = result.make(row, recipe, run, test=test, second=second, budget=budget, **times)
            write_json(path, made)
        return int(failures > 0), failures == 0

    def _train(self, recipe: recipes.Recipe, launch: Launch) -> int:
        path = self.out / "recipes" / f"{Path(recipe.run_dir).name}.yaml"
        for folder in (path.parent, self.out / "results"):
            folder.mkdir(exist_ok=True)
        write_atomic(path, recipes.to_yaml(recipe))
        return launch("launchers/train.py", "--recipe", str(path))

    def _second(self, run: Path) -> dict[str, Any] | None:
        if not self.settings.second:
            return None
        place = (self.settings.second, self.settings.second_split)
        measured = forgetting.measure(run / "adapter", *place, SECOND_SAMPLES)
        gc.collect()  # the next run needs the memory
        return measured

    def _test(self, run: Path) -> dict[str, Any] | None:
        if not self.settings.split:
            return None
        return json.loads((run / f"evaluation-{self.settings.split}.json").read_text("utf-8"))[0]


def _shared(recipe: recipes.Recipe) -> dict[str, Any]:
    """The part of the recipe that is the same in every run."""
    return {key: value for key, value in recipes.to_dict(recipe).items() if key != "run_dir"}


def _kept(path: Path) -> dict[str, Any] | None:
    """Settings written by an earlier start; None if there was none."""
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_text("utf-8"))
        kept["settings"]["budget"], kept["rows"], kept["refused"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise BadInput(f"{path}: cannot be read ({problem}). Remove it, or give another --out.") from problem
    return kept


def _succeeded(path: Path) -> bool:
    """Whether a result file is there and says that its run was done."""
    try:
        return json.loads(path.read_text("utf-8"))["train_info"]["status"] == "success"
    except (OSError, ValueError, KeyError, TypeError):
        return False
