"""The header of a recipe, read as the commands it holds: each training run with what prepares and scores it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

PROGRAMS = ("python", "deepspeed")


class BadHeader(Exception):
    """A header that does not lead from a download to a score."""


@dataclass(frozen=True)
class Command:
    """A script of this repository with its arguments, without what stands in front of it, such as `--num_gpus 8`."""

    script: str
    args: tuple[str, ...]

    @property
    def name(self) -> str:
        """The script's file name without ending."""
        return Path(self.script).stem

    def values(self, option: str) -> list[str]:
        """Every value that follows an option, up to the next one."""
        places = [i + 1 for i, arg in enumerate(self.args) if arg == option]
        return [arg for i in places for arg in takewhile(lambda a: not a.startswith("--"), self.args[i:])]


@dataclass
class Setting:
    """One training run of a header.

    Attributes:
        recipe: file of the recipe.
        before: commands that prepare its data, in order.
        train: the command that trains.
        after: commands that follow, evaluation among them.
    """

    recipe: Path
    before: list[Command]
    train: Command
    after: list[Command] = field(default_factory=list)

    @property
    def run_dir(self) -> str:
        """Where the run goes, as the command line has it; empty: as the recipe has it."""
        given = [value for value in self.train.values("--set") if value.startswith("run_dir=")]
        return given[-1].removeprefix("run_dir=") if given else ""

    def __str__(self) -> str:
        return Path(self.run_dir or self.recipe.stem).name


def commands(text: str) -> list[Command]:
    """Commands of a recipe's header: its indented comment lines that begin with a known program. Raises BadHeader."""
    header = re.match(r"(?:#.*\n|\n)*", text).group()
    lines = re.sub(r"[ \t]*\\\n#[ \t]*", " ", header).splitlines()
    found = []
    for line in lines:
        if not re.match(rf"#\s{{2,}}({'|'.join(PROGRAMS)})\s", line):
            continue
        words = shlex.split(line[1:])
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if at is None:
            raise BadHeader(f"starts no script: {line}")
        found.append(Command(words[at], tuple(words[at + 1 :])))
    return found


def settings(path: Path) -> list[Setting]:
    """Every training run of a recipe's header. Raises BadHeader that says what is missing."""
    found: list[Setting] = []
    waiting: list[Command] = []
    for command in commands(path.read_text("utf-8")):
        if command.name == "train":
            if command.values("--recipe") != [f"recipes/{path.name}"]:
                raise BadHeader(f"{path.name}: trains another recipe: {' '.join(command.args)}")
            found.append(Setting(path, waiting, command))
            waiting = []
        elif "--run" in command.args and found:
            found[-1].after.append(command)
        else:
            waiting.append(command)
    if not found:
        raise BadHeader(f"{path.name}: no command that trains")
    if waiting:
        raise BadHeader(f"{path.name}: nothing trains on what {waiting[0].script} makes")
    for setting in found:
        if not any(c.name == "prepare" for c in setting.before):
            raise BadHeader(f"{path.name}: {setting}: no command that prepares the data")
        if not any(c.name == "evaluate" for c in setting.after):
            raise BadHeader(f"{path.name}: {setting}: no command that evaluates")
    return found
