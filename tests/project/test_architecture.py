"""The functions that docs/architecture.md names exist in the files that it names."""

import ast
import re

import pytest

from tests.helpers import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text("utf-8")
NAMED = re.compile(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)")


def stations(page):
    """(file, name) of each function that a page gives as FILE: NAME."""
    return [(file, name) for file, names in NAMED.findall(page) for name in re.findall(r"`([\w.]+)`", names)]


def defined(file):
    """Names of the functions and methods of a file."""
    names = set()
    for node in ast.parse((ROOT / file).read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef)}
    return names


def missing(page):
    """The stations of a page that are in no file."""
    return [f"{file}: {name}" for file, name in stations(page) if name not in defined(file)]


def test_every_station_exists():
    assert missing(PAGE) == []


@pytest.mark.parametrize("line", [line for line in PAGE.splitlines() if re.match(r"\d+\. ", line)])
def test_every_line_begins_with_a_file_and_its_function(line):
    assert NAMED.match(line.partition(". ")[2])


def test_a_station_that_is_gone_is_noticed():
    assert missing(PAGE.replace("`Stream.epoch`", "`Stream.gone`")) == ["mmpeft_ds/data/stream.py: Stream.gone"]
