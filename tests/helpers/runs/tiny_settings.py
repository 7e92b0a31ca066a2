"""A setting of a recipe's header carried out in small: miniatures for the data sets, tiny weights, two steps.

Every command is the header's own. Only this is changed: DATA/NAME becomes a miniature of the layout, data/ and runs/
lie in the test's folder, hub names become tiny models, and sizes of the recipe that belong to the big model shrink.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep import prepare
from mmpeft_ds import recipe as recipes
from tests.helpers import ROOT, launch
from tests.helpers.data.layouts import LAYOUTS
from tests.helpers.models import tiny_hub
from tests.helpers.runs.headers import Command, Setting

# Largest values that the tiny models take.
BACKBONE = {"image_size": 8, "max_text_length": 30, "max_target_length": 19, "grid": 2, "order_tokens": 9, "queue": 8}
METHOD = {"r": 4, "r2": 2, "groups": 2, "first_layer": 2}
STEPS, BATCH = 2, 2
# The same for commands that make captions or features; CLIP takes as many tokens as it has positions by itself.
MAKERS = ("--set", "image_size=8")
LENGTH = ("--set", "max_text_length=19")


def carry_out(settings: list[Setting], folder: Path, models: Path) -> dict[str, Path]:
    """Carry out settings one after the other on one rank, in one process.

    Args:
        folder: gets a folder of each setting.
        models: of the tiny models, which they share.

    Returns:
        setting -> its run directory, of those in which no command failed.
    """
    smalls = {str(setting): Small(setting, folder / str(setting), models) for setting in settings}
    path = folder / "jobs.json"
    path.write_text(json.dumps({name: small.lines() for name, small in smalls.items()}), "utf-8")
    done = launch.run_forked("tests.helpers.rank_scripts.in_turn", str(path), ranks=1)
    failed = [name for name in smalls if f"failed: {name}:" in done.output]
    if done.code:
        print(done.tail(200))
    assert bool(done.code) == bool(failed), "the rank itself broke off"
    return {name: Path(small.recipe().run_dir) for name, small in smalls.items() if name not in failed}


class Small:
    """A setting in small, in a folder of its own."""

    def __init__(self, setting: Setting, folder: Path, models: Path):
        self.setting, self.folder, self.models = setting, folder, models

    def lines(self) -> list[list[str]]:
        """Prepare the data, in this process; scripts and arguments of all commands after that."""
        for command in (c for c in self.setting.before if c.name == "prepare"):
            self._prepare(command)
        path = self.folder / "recipe.yaml"
        path.write_text(recipes.to_yaml(self.recipe()), "utf-8")
        train = [str(ROOT / self.setting.train.script), "--recipe", str(path)]
        before = [self._line(c) for c in self.setting.before if c.name != "prepare"]
        return [*before, train, *map(self._line, self.setting.after)]

    def evaluated(self, ranks: int, jobs: Path, *more: str) -> dict[str, bytes]:
        """Give the header's evaluations again on so many ranks; name -> bytes of each file of predictions.

        Args:
            jobs: file for the list of commands.
            more: words behind each command.
        """
        lines = [[*self._line(c), *more] for c in self.setting.after if c.name == "evaluate"]
        jobs.write_text(json.dumps({str(self.setting): lines}), "utf-8")
        done = launch.run_forked("tests.helpers.rank_scripts.in_turn", str(jobs), ranks=ranks)
        assert not done.code, done.tail(60)
        written = sorted(Path(self.recipe().run_dir).iterdir())
        of_this = [p for p in written if p.name.startswith(("predictions", "submission")) and "." not in p.stem]
        return {p.name: p.read_bytes() for p in of_this}  # names with a number are of the evaluation before

    def recipe(self) -> recipes.Recipe:
        """The recipe with the overrides of the setting, shrunk."""
        recipe = recipes.load(self.setting.recipe, self.setting.train.values("--set"))
        recipe.run_dir = self._moved(recipe.run_dir)
        for source in (*recipe.data.sources, *recipe.data.validation):
            source.dir = self._moved(source.dir)
        recipe.backbone = self._shrunk(recipe.backbone, BACKBONE)
        recipe.method = self._shrunk(recipe.method, METHOD)
        if "template" in recipe.method:
            recipe.method["template"] = "{}"  # tiny text towers take few tokens
        recipe.data.global_batch, recipe.data.workers = BATCH, 0
        recipe.optim.max_steps, recipe.optim.warmup = STEPS, 0.0
        if recipe.optim.schedule == "cosine_epoch":  # takes a whole epoch to begin
            recipe.optim.schedule = "cosine"
        recipe.engine.threads = 1
        if recipe.engine.deepspeed.endswith("_nodes.json"):
            recipe.engine.deepspeed = "ds_configs/zero3.json"
        return recipe

    def _shrunk(self, section: dict[str, Any], most: dict[str, int]) -> dict[str, Any]:
        small = {key: min(value, most[key]) if key in most else value for key, value in section.items()}
        small |= {k: self._shrunk(v, most) for k, v in small.items() if isinstance(v, dict)}  # an encoder inside
        return {k: tiny_hub.local(v, self.models) if isinstance(v, str) else v for k, v in small.items()}

    def _moved(self, word: str) -> str:
        return str(self.folder / word) if word.startswith(("data/", "runs/")) else word

    def _prepare(self, command: Command) -> None:
        args = [self._root(word) if word.startswith("DATA/") else self._moved(word) for word in command.args]
        prepare.main([*args, "--processes", "1"])

    def _root(self, word: str) -> str:
        root = self.folder / word
        if not root.is_dir():
            LAYOUTS[root.name](root)
        return str(root)

    def _line(self, command: Command) -> list[str]:
        line = [str(ROOT / command.script)]
        for word in command.args:
            key, equals, value = word.partition("=")
            line.append(key + equals + tiny_hub.local(value, self.models) if equals else self._moved(word))
        if command.name not in ("describe", "features"):
            return line
        return [*line, *MAKERS, *(() if "clip" in command.args else LENGTH)]
