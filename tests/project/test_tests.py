"""The rules of the tests themselves: what they share lives in tests/helpers, and none touches the search path."""

import ast
import re
from pathlib import Path

from tests.helpers import ROOT

TESTS = ROOT / "tests"
# What is no test and yet not in helpers/, and why.
ELSEWHERE = {
    "compatibility/make.py": "runs with the code of an old commit, from whose tests it imports",
    "backbones/tiny_mllm.py": "scripts outside the repository import it from there",
    "backbones/tiny_towers.py": "scripts outside the repository import it from there",
}
SEARCH_PATH = re.compile(r"\bsys\s*(\.|, [\"'])path\b|\bsite\.addsitedir\b")


def search_path_lines(text: str) -> list[str]:
    """Lines that name the module search path, save those marked as the behaviour under test."""
    return [line.strip() for line in text.splitlines() if SEARCH_PATH.search(line) and "# under test" not in line]


def imports_of_tests(text: str) -> set[str]:
    """Modules below tests/ that a file imports and that are no helpers."""
    names = {alias.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for alias in n.names}
    names |= {n.module or "" for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    return {n for n in names if n.startswith("tests.") and not n.startswith("tests.helpers")}


def is_collected(path: Path) -> bool:
    """Whether pytest, or the runner of reference vectors, takes this file for tests."""
    return path.name.startswith("test_") or (path.parent.name == "goldens" and path.name.startswith("check_"))


def test_no_test_touches_the_module_search_path():
    """pyproject.toml puts the repository on it; subprocesses get it from tests.helpers.launch.environment."""
    paths = [p for p in TESTS.rglob("*.py") if p != Path(__file__)]
    assert not {str(p): lines for p in paths if (lines := search_path_lines(p.read_text("utf-8")))}


def test_what_tests_share_lives_in_helpers():
    files = [p for p in TESTS.rglob("*.py") if TESTS / "helpers" not in p.parents]
    files = [p for p in files if p.relative_to(TESTS).as_posix() not in ELSEWHERE]
    assert not [str(p) for p in files if not is_collected(p) and p.name not in ("conftest.py", "__init__.py")]
    # checkers of reference vectors may use one another
    importing = [p for p in files if p.parent.name != "goldens" and imports_of_tests(p.read_text("utf-8"))]
    assert not [str(p) for p in importing]


def test_no_test_is_hidden_among_the_helpers():
    assert not [str(p) for p in (TESTS / "helpers").rglob("*.py") if p.name.startswith(("test_", "check_"))]


def test_the_rules_see_a_violation():
    assert search_path_lines("import sys\nsys.path.insert(0, 'x')") and search_path_lines('setattr(sys, "path", [])')
    assert search_path_lines("sys.path[0] = 'x'  # under test") == []
    assert imports_of_tests("from tests.data.test_stream import run") == {"tests.data.test_stream"}
    assert imports_of_tests("from tests.helpers.data import tiny_shards\nimport testing") == set()
    assert not is_collected(TESTS / "data" / "toy.py")
