"""Checks of the documentation's commands, Python blocks and YAML blocks, in this process and without starting work."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmpeft_ds import console, registry
from mmpeft_ds import recipe as recipes
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.study import Study
from tests.helpers import ROOT, commands
from tests.helpers.doc_pages import NEEDS, Block
from tests.helpers.doc_pages import commands as commands_of

PLACEHOLDER = re.compile(r"[A-Z]{2,}|^[A-Z]\b|\.\.\.")
# A stand-in for a recipe that the page leaves open, as R.yaml.
STAND_IN = ROOT / "recipes" / "quickstart.yaml"
# What make demo, make few-shot-data, make few-shot and make openclipart-data leave; every page may use it.
MADE = (
    "data/raw",
    "data/easy-vqa",
    "data/emoji-*",
    "data/stamps",
    "data/openclipart",
    "runs/quickstart",
    "runs/few_shot_emoji",
    "runs",
    "models/*",
)
INPUTS = ("data", "adapter", "run", "images", "texts", "captions", "templates", "train", "val", "test", "folder",
          "root", "splits_file", "dir", "image_root")  # fmt: skip
# Programs that no test machine has, and what a block that calls them must be marked with.
ABSENT = {"srun": "cluster", "sbatch": "cluster", "mpirun": "cluster", "ssh": "cluster", "docker": "docker",
          "ip": "root", "jq": "data set", "git": "network", "pip": "network", "nvidia-smi": "GPU",
          "lmms-eval": "lmms-eval"}  # fmt: skip
MAKES_TIME = {
    "demo",
    "compare",
    "few-shot",
    "few-shot-data",
    "openclipart-data",
    "test",
    "test-slow",
    "bench",
    "setup",
    "docs",
}


class Wrong(Exception):
    """A command or block of a page that does not work as it stands."""


class _Parsed(Exception):
    def __init__(self, args: Any):
        self.args_read = args


@dataclass
class Page:
    """What the commands of a page so far have made."""

    made: set[str] = field(default_factory=lambda: set(MADE))


def check_block(block: Block, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of a shell block. Raises Wrong."""
    unknown = block.needs - NEEDS.keys()
    if unknown:
        raise Wrong(f"{block}: marked with {sorted(unknown)}; known: {', '.join(NEEDS)}")
    for words in commands_of(block):
        try:
            check_command(words, block, page, monkeypatch)
        except Wrong as e:
            raise Wrong(f"{block}: {' '.join(words)}: {e}") from None


def check_command(words: list[str], block: Block, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command. Raises Wrong."""
    program, rest = words[0], words[1:]
    if program in ABSENT and ABSENT[program] not in block.needs:
        raise Wrong(f"needs a mark: <!-- needs: {ABSENT[program]} -->")
    if "-c" in rest and rest[rest.index("-c") - 1] == "bash":
        inner = Block(block.page, block.line, "sh", rest[rest.index("-c") + 1], block.needs)
        check_block(inner, page, monkeypatch)
    elif program == "make":
        _make(rest)
    elif program in ("deepspeed", "torchrun", "srun", "mpirun", "accelerate"):
        at = next((i for i, w in enumerate(rest) if w.endswith(".py")), None)
        if at is None:
            raise Wrong("starts no script")
        before = rest[:at]
        _launcher_options(program, [w for w in before if w != "python"])
        _script(rest[at], rest[at + 1 :], block, page, monkeypatch)
    elif program == "python":
        _python(rest, block, page, monkeypatch)
    elif program == "tensorboard":
        if rest[:1] != ["--logdir"]:
            raise Wrong("expected --logdir DIR")
        _is_there(rest[1], block, page)
    elif program not in ABSENT and program not in ("pytest", "kill", "ruff"):
        raise Wrong(f"no check knows the program {program!r}")


def _make(rest: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in rest:
        if "=" not in word and word not in targets:
            raise Wrong(f"the Makefile has no target {word!r}")


def _launcher_options(program: str, words: list[str]) -> None:
    """Options of the launcher in front, read by its own parser."""
    if program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        parse = parse_args
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        parse = get_args_parser().parse_args
    else:
        return
    try:
        parse([*words, "script.py"])
    except SystemExit:
        raise Wrong(f"{program} does not take {' '.join(words)}") from None


def _python(rest: list[str], block: Block, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    if rest[:1] == ["-m"]:
        if importlib.util.find_spec(rest[1]) is None:
            raise Wrong(f"no module {rest[1]}")
    elif rest[:1] == ["-c"]:
        ast.parse(rest[1])
    else:
        _script(rest[0], rest[1:], block, page, monkeypatch)


def _script(name: str, arguments: list[str], block: Block, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / name
    if not path.is_file():
        ours = name.startswith(("launchers/", "data_prep/", "benchmarks/", "tests/"))
        if "your files" in block.needs and not ours:
            return
        raise Wrong(f"there is no {name}")
    if path.parent.name not in ("launchers", "data_prep"):
        return
    args = read_arguments(path, arguments, monkeypatch)
    if args is None:
        return
    _check_recipe(path, args, page)
    for key in INPUTS:
        values = getattr(args, key, None)
        for value in values if isinstance(values, list) else [values] if values else []:
            _is_there(str(value), block, page)
    if getattr(args, "out", None):
        page.made.add(str(args.out))


def read_arguments(path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the script's own parser reads, and nothing after that; None where it prints its usage. Raises Wrong."""
    plain = console.Parser.parse_args

    def parse(self: console.Parser, *given: Any, **named: Any) -> Any:
        raise _Parsed(plain(self, *given, **named))

    # In a name of its own, so that a source of data_prep is not asked for files.
    globals_of = commands.load_script(path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(console.Parser, "parse_args", parse)
        patch.setattr("sys.argv", [str(path), *arguments])
        try:
            globals_of["main"]()
        except _Parsed as e:
            return e.args_read
        except SystemExit:
            return None
        except BadInput as e:
            raise Wrong(str(e)) from None
    raise Wrong("the script reads its arguments with another parser")


def _check_recipe(path: Path, args: Any, page: Page) -> None:
    """The recipe is there, and takes every `--set`. Raises Wrong."""
    changes = getattr(args, "set", None) or []
    try:
        if getattr(args, "recipe", None):
            recipe = ROOT / args.recipe
            if PLACEHOLDER.search(Path(args.recipe).name):
                recipe = STAND_IN
            if not recipe.is_file():
                raise Wrong(f"there is no recipe {args.recipe}")
            if path.name == "few_shot.py":
                raw, _ = recipes.read(recipe, changes)
                page.made.add(raw["run_dir"])
                return
            if path.name == "study.py":
                made = Study.load(recipe, changes, args.vary)
                page.made.add(str(made.run_dir))
                return
            if path.name in ("features.py", "describe.py"):
                return
            page.made.add(check_recipe(recipe, changes).run_dir)
        elif getattr(args, "backbone", None):
            _check_component("backbones", args.backbone, changes)
    except BadInput as e:
        raise Wrong(str(e)) from None


def check_recipe(path: Path, changes: list[str]) -> Any:
    """The recipe with every component's section typed, as `--print-recipe` does. Raises BadInput."""
    recipe = recipes.filled(recipes.load(path, changes))
    config = recipe.engine.deepspeed
    if not PLACEHOLDER.search(config) and not (ROOT / config).is_file():
        raise BadInput(f"engine.deepspeed: there is no {config}")
    return recipe


def _check_component(kind: str, name: str, changes: list[str]) -> None:
    package = importlib.import_module(f"mmpeft_ds.{kind}")
    raw: dict[str, Any] = {}
    for change in changes:
        key, _, value = change.partition("=")
        raw[key] = recipes.parse_yaml(value, change)
    recipes.typed(registry.options(package, name, kind), raw, kind, recipes.Origin())


def _is_there(name: str, block: Block, page: Page) -> None:
    """A path that a command reads is in the repository, made by an earlier command, or a marked or open one."""
    if PLACEHOLDER.search(name) or "your files" in block.needs or "data set" in block.needs:
        return
    made = any(fnmatch(name, p) or name.startswith(f"{p}/") or fnmatch(name, f"{p}/*") for p in page.made)
    if not made and not (ROOT / name).exists():
        raise Wrong(f"nothing on this page makes {name}; mark the block: <!-- needs: your files -->")


# ---------------------------------------------------------------------------------------------------- Python


def check_marked_python(block: Block) -> None:
    """Of a block that cannot run here: it parses, its imports resolve, and calls of our configs take their fields."""
    import peft

    import mmpeft_ds

    tree = ast.parse(block.text)
    imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    names: dict[str, Any] = {"mmpeft_ds": mmpeft_ds, "peft": peft}
    for node in imports:
        exec(compile(ast.Module([node], []), str(block), "exec"), names)
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called.endswith("Config") and called.split(".")[0] in names:
            with contextlib.suppress(NameError):  # an argument that the block takes from what cannot run here
                eval(compile(ast.Expression(node), str(block), "eval"), names)


# ------------------------------------------------------------------------------------------------------ YAML

SECTIONS = {"backbone", "method", "data", "optim", "engine", "monitor", "seed", "run_dir"}


def _check_study(given: dict[str, Any], block: Block) -> None:
    """The sections `few_shot` and `methods`, with the rest of the shipped study; every run of it is typed."""
    from mmpeft_ds.runs.few_shot_study import Study as FewShotStudy

    raw = recipes.parse_yaml((ROOT / "recipes" / "few_shot_emoji.yaml").read_text(), "few_shot_emoji")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(yaml.safe_dump(raw | given))
        try:
            for cell in FewShotStudy.load(path).cells():
                recipes.filled(cell.recipe)
        except BadInput as e:
            raise Wrong(f"{block}: {e}") from None


def _check_members(given: dict[str, Any], block: Block) -> None:
    """The section `study`, laid over the quickstart's recipe; every member is typed."""
    raw = recipes.parse_yaml(STAND_IN.read_text(), "quickstart")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yaml"
        path.write_text(yaml.safe_dump(raw | given))
        try:
            for recipe in Study.load(path).members.values():
                recipes.filled(recipe)
        except BadInput as e:
            raise Wrong(f"{block}: {e}") from None


def check_yaml(block: Block) -> None:
    """A fragment of a recipe, laid over the quickstart's, has known keys and types. Raises Wrong."""
    given = recipes.parse_yaml(block.text, str(block))
    if isinstance(given, dict) and "few_shot" in given:
        return _check_study(given, block)
    if isinstance(given, dict) and "study" in given:
        return _check_members(given, block)
    if not isinstance(given, dict) or not given.keys() <= SECTIONS | {"task"}:
        return
    raw = recipes.parse_yaml(STAND_IN.read_text(), "quickstart")
    task = given.pop("task", None)
    raw |= {k: v for k, v in given.items() if k not in ("data", "optim")}
    for key in ("data", "optim"):
        raw[key] = {**raw.get(key, {}), **given.get(key, {})} if key == "data" else given.get(key, raw.get(key))
    if task:
        raw["data"]["sources"][0]["task"] = task
    try:
        recipes.filled(recipes.from_dict(raw))
    except BadInput as e:
        raise Wrong(f"{block}: {e}") from None
