"""Commands answer before they import what takes seconds; prepare.py and its workers never do."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import startup
from tests.helpers import ROOT
from tests.helpers.data.images import encoded

HEAVY = ("torch", "transformers", "peft", "deepspeed", "torch_geometric", "webdataset")
# Python runs a module of this name in every process that it starts, workers included.
SITECUSTOMIZE = f"""
import os, sys

class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            with open(os.environ["HEAVY_IMPORTS"], "a") as log:
                log.write(name + "\\n")

sys.meta_path.insert(0, Recorder())
"""
LIGHT = [command for command in startup.commands() if command.kind != "check"]


@pytest.fixture
def run(tmp_path):
    """Run a script in a process of its own: (exit code, stderr, heavy modules that it or its children imported)."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    log = tmp_path / "imports"
    log.touch()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "HEAVY_IMPORTS": str(log)}

    def _run(*args: str) -> tuple[int, str, set[str]]:
        done = subprocess.run(
            [sys.executable, *map(str, args)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stderr, set(log.read_text().split())

    return _run


@pytest.mark.parametrize("command", LIGHT, ids=lambda command: command.title)
def test_nothing_heavy_is_imported_for_help_or_to_refuse(run, command):
    code, err, heavy = run(*command.args)
    assert code == command.code and not heavy
    if command.kind == "refusal":
        assert err.startswith("error: ") and err.count("\n") == 1


def test_every_command_is_asked_for_help():
    asked = {command.args[0] for command in LIGHT if command.kind == "help"}
    assert asked == set(startup.scripts()) and len(asked) >= 17
    assert {
        "launchers/train.py",
        "launchers/plan.py",
        "launchers/search.py",
        "data_prep/prepare.py",
        "data_prep/show.py",
    } <= asked


def test_preparing_and_looking_imports_nothing_heavy_in_any_process(run, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    lines = [json.dumps({"image": "a.png", "caption": f"number {i}"}) for i in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    several = ("--samples-per-shard", "2", "--processes", "2")
    for args in (
        ("data_prep/prepare.py", "jsonl", "--out", out, "--train", tmp_path / "train.jsonl", *several),
        ("data_prep/verify.py", out, "--processes", "2"),
        ("data_prep/show.py", out),
    ):
        code, err, heavy = run(*args)
        assert code == 0 and not heavy, err
    assert len(list(out.glob("*.tar"))) == 3
    # captions, and a recipe whose task reads questions
    sources = [f"data.{role}.0.{key}" for role in ("sources", "validation") for key in (f"dir={out}", "split=train")]
    overrides = [word for source in sources for word in ("--set", source)]
    code, err, heavy = run("launchers/train.py", "--recipe", "recipes/quickstart.yaml", *overrides)
    assert code == 2 and not heavy
    assert "the task is vqa" in err and "Use task captioning or retrieval" in err and err.count("\n") == 1


def test_recipes_and_public_names_import_nothing_heavy(run):
    code, err, heavy = run(
        "-c",
        "import mmpeft_ds, glob; from mmpeft_ds import methods, recipe\n"
        "assert 'RoutedLoraConfig' in dir(mmpeft_ds) and methods.names(heads=True)\n"
        "for path in glob.glob('recipes/*.yaml'):\n"
        "    raw, origin = recipe.read(path, [])\n"
        "    recipe.from_dict(raw, origin) if 'few_shot' not in raw else None",
    )
    assert code == 0 and not heavy, err


def test_the_recorder_sees_heavy_imports_of_children_too(run):
    """Negative control."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import webdataset'])"
    assert run("-c", child)[2] >= {"torch", "webdataset"}


def names_of_transformers(quickly: bool) -> tuple[int, list[int]]:
    """In a new process: how often its list of model files came from memory, and how many names it offers."""
    code = (
        "import contextlib; from mmpeft_ds import console\n"
        f"with console.quick_imports() if {quickly} else contextlib.nullcontext():\n"
        "    import transformers, transformers.models\n"
        "memo = transformers.utils.import_utils.create_import_structure_from_path.cache_info()\n"
        "print(memo.hits, len(dir(transformers)), len(dir(transformers.models)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    hits, *names = map(int, done.stdout.split())
    return hits, names


def test_quick_imports_read_the_model_files_of_transformers_once():
    """Without them each is read twice (negative control)."""
    (hits, names), (plain_hits, plain_names) = names_of_transformers(True), names_of_transformers(False)
    assert hits > 100 and plain_hits == 0
    assert names == plain_names and min(names) > 1000
