"""Commands answer `--help` and refuse what is wrong at once: nothing heavy is imported, and no work has begun."""

import json
import subprocess
import sys

import pytest

from benchmarks import startup
from tests.helpers import ROOT, commands, light_process
from tests.helpers.data.images import encoded
from tests.helpers.runs import endless

LIGHT = [command for command in startup.commands() if command.kind != "check"]
HELP = [command for command in LIGHT if command.kind == "help"]
REFUSALS = [command for command in LIGHT if command.kind == "refusal"]
SCRIPTS = startup.scripts()
BENCHMARKS = sorted(
    path for path in (ROOT / "benchmarks").glob("[!_]*.py") if '__name__ == "__main__"' in path.read_text()
)
UNKNOWN = "--no-such-option"


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Command line -> how it ended."""
    # Recipes are named from the repository, where these commands are not run.
    given = [tuple(str(ROOT / a) if a.startswith(("recipes/", "docs/")) else a for a in c.args) for c in LIGHT]
    lines = [*given, *((script, UNKNOWN) for script in SCRIPTS)]
    done = light_process.run(lines, tmp_path_factory.mktemp("commands"))
    return dict(zip([*(c.args for c in LIGHT), *lines[len(LIGHT) :]], done, strict=True))


@pytest.mark.parametrize("command", HELP, ids=lambda command: command.title)
def test_help_prints_the_usage_imports_nothing_heavy_and_starts_nothing(answers, command):
    done = answers[command.args]
    assert done.code == 0 and done.out.startswith("usage: ") and not done.err
    assert not done.heavy and not done.started and not done.left


@pytest.mark.parametrize("command", REFUSALS, ids=lambda command: command.title)
def test_what_is_wrong_is_refused_in_one_line_before_anything_heavy_is_imported(answers, command):
    done = answers[command.args]
    assert done.code == command.code and not done.heavy and not done.started and not done.left
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_argument_is_refused_in_one_line_before_any_work(answers, script):
    done = answers[script, UNKNOWN]
    assert done.code == 2 and not done.started and not done.left
    assert done.err.startswith("error: ") and "--help" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("folder", ["launchers", "data_prep"])
def test_every_file_beside_the_commands_is_one_or_is_private(folder):
    """A module there would answer --help with silence or a traceback; modules are in data_prep/common/."""
    assert {f"{folder}/{path.name}" for path in (ROOT / folder).glob("[!_]*.py")} <= set(SCRIPTS)


def test_every_command_is_asked_for_help():
    """The list is made by reading the folders; this holds it against the names that people know."""
    asked = {command.args[0] for command in HELP}
    assert asked == set(SCRIPTS) and len(asked) >= 17
    known = ("train", "plan", "search", "demo", "compare", "few_shot_emoji", "predict")
    assert {*(f"launchers/{name}.py" for name in known), "data_prep/prepare.py", "data_prep/show.py"} <= asked


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_a_benchmark_prints_its_usage_and_starts_nothing(monkeypatch, capsys, tmp_path, path):
    def refuse(*args, **kwargs):
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.chdir(tmp_path)
    assert commands.run_script(path, ["--help"], monkeypatch) in (0, None)
    assert capsys.readouterr().out.startswith("usage: ") and not list(tmp_path.iterdir())


@pytest.fixture
def run(tmp_path):
    """Run Python in a process of its own: (exit code, stderr, heavy modules that it or its children imported)."""
    environment, log = light_process.recording(tmp_path)

    def _run(*args: str, **variables: str) -> tuple[int, str, set[str]]:
        command, env = [sys.executable, *map(str, args)], environment | variables
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr, set(log.read_text().split())

    return _run


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


@pytest.mark.parametrize("ranks", [{}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}], ids=["alone", "of two"])
def test_a_run_directory_that_cannot_be_written_is_refused_at_once(run, tmp_path, ranks):
    recipe = endless.prepare(tmp_path)
    (tmp_path / "file").touch()
    for given, why in (("/proc/run", "/proc cannot be written"), (tmp_path / "file" / "run", "file is a file")):
        code, err, heavy = run("launchers/train.py", "--recipe", recipe, "--set", f"run_dir={given}", **ranks)
        assert code == 2 and not heavy
        if not ranks:  # else rank 0 says it
            assert err.startswith(f"error: run_dir {given}: ") and why in err and err.count("\n") == 1


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


@pytest.mark.parametrize("cuda, taken", [("None", "False"), ("'13.0'", "True")])
def test_a_torch_for_the_cpu_takes_triton_as_absent(cuda, taken):
    """One that was built for CUDA asks as ever (negative control)."""
    code = (
        "import sys, types; from mmpeft_ds import console\n"
        f"sys.modules['torch.version'] = types.SimpleNamespace(cuda={cuda})\n"
        "sys.modules['torch.utils._triton'] = module = types.SimpleNamespace(has_triton_package=lambda: True)\n"
        "console._leave_triton_out(); print(module.has_triton_package())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == taken, done.stderr
