"""What is refused is told in one line, whatever the user's names and values hold."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from mmpeft_ds.errors import LONGEST, AgreedBadInput, BadInput, BadSample, printable
from tests.helpers import ROOT, launch

ODD = {
    "a\nb": r"a\nb",
    "a\r\nb\tc": r"a\r\nb\tc",
    "\x1b[2Jgone": r"\x1b[2Jgone",
    "a\0b\x85c": r"a\x00b\x85c",
    "one\u2028two": r"one\u2028two",
    "abc\u202egnp.exe": r"abc\u202egnp.exe",
    "half \ud83d": r"half \ud83d",
    "name \udcff": r"name \udcff",
    "Grüße, 図, 🎈 and C:\\new": "Grüße, 図, 🎈 and C:\\new",
}


@pytest.mark.parametrize("kind", [BadInput, AgreedBadInput, lambda detail: BadSample("image", detail)])
@pytest.mark.parametrize("value", ODD)
def test_values_that_would_break_the_line_are_escaped_once(kind, value):
    error = kind(f"{value}: no such file.")
    words = str(error).removeprefix("image: ")
    assert words == f"{ODD[value]}: no such file." and words.isprintable()
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and type(again) is type(error) and vars(again) == vars(error)
    assert str(BadInput(str(error))) == str(error), "handing a line on to other ranks changes nothing"


def test_a_value_that_is_a_whole_file_keeps_the_ends_of_its_line():
    line = str(BadInput(f"--text {'x' * 10**6}: too long. Shorten it."))
    assert len(line) < LONGEST + 50 and line.startswith("--text x") and line.endswith("x: too long. Shorten it.")
    assert printable(line[:LONGEST]) == line[:LONGEST]


@pytest.mark.parametrize("name", ["no\nsuch.yaml", "no\x1b[31m.yaml", "no\udcff.yaml"])
def test_a_command_prints_one_line_about_a_file_of_an_odd_name(name):
    command = [sys.executable, ROOT / "launchers" / "train.py", "--recipe", name]
    done = subprocess.run(command, env=launch.environment(), capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.rstrip("\n").isprintable() and printable(name) in done.stderr
