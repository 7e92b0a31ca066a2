"""Every command answers `--help` at once, and never starts its work instead."""

import subprocess

import pytest

from tests.helpers import ROOT, commands

SCRIPTS = sorted(
    path
    for folder in ("launchers", "data_prep", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if not path.name.startswith("_") and '__name__ == "__main__"' in path.read_text()
)


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path):
    """Run a script with some arguments in this process, where it can start no other: (exit code, stdout, stderr)."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"started {args}")

    def run(path, *arguments):
        monkeypatch.setattr(subprocess, "Popen", refuse)
        monkeypatch.chdir(tmp_path)
        code = commands.run_script(path, [*arguments], monkeypatch)
        assert not list(tmp_path.iterdir())
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_commands_are_all_here():
    """The list is made by reading the folders; this holds it against the names that people know."""
    names = {path.name for path in SCRIPTS}
    assert names >= {"train.py", "demo.py", "compare.py", "few_shot_emoji.py", "predict.py", "prepare.py", "show.py"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_help_prints_the_usage_and_starts_nothing(ask, path):
    code, out, _ = ask(path, "--help")
    assert code in (0, None) and out.startswith("usage: ")


@pytest.mark.parametrize(
    "path", [p for p in SCRIPTS if p.parent.name != "benchmarks"], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_an_unknown_argument_is_refused_in_one_line_before_any_work(ask, path):
    code, _, err = ask(path, "--no-such-option")
    assert code == 2 and err.startswith("error: ") and "--help" in err and err.count("\n") == 1
