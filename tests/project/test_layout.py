"""The rules that keep the project in one direction, read from the source itself."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "mmpeft_ds"
# What everybody may import: the bottom, and the form in which samples travel.
COMMON = {
    "adapter_files",
    "errors",
    "files",
    "fitting",
    "host_copies",
    "leftovers",
    "network",
    "output",
    "owner",
    "progress",
    "quiet",
    "redaction",
    "registration",
    "registry",
    "stop",
    "tower_keys",
    "unused_imports",
    "data.batch",
    "data.generation_output",
    "data.formats",
    "data.identity",
    "data.parsing",
    "data.token_counts",
    "data.transform",
    "data.video",
}
# What each room may import besides itself, from below to above. `methods` and the like stand for the whole room,
# `methods.__init__` for its name alone, by which components are looked up.
ALLOWED = {
    "ops": set(),
    "metrics": set(),
    "data": {"console"},
    "sites": set(),
    "recipe": {"data.options", "backbones.__init__", "methods.__init__", "tasks.__init__"},
    "distributed": {"ops"},
    "methods": {"ops", "distributed", "sites", "recipe"},
    "backbones": {"ops", "distributed", "sites"},
    "tasks": {"ops", "distributed", "metrics"},
    "engine.optim": {"recipe"},
    "engine.zero": {"distributed", "sites", "recipe", "methods", "backbones", "engine.optim"},
    "engine.assembly": {"ops", "data", "distributed", "sites", "recipe", "methods", "backbones", "tasks",
                        "engine.optim", "engine.zero"},
    "engine": {"data", "distributed", "sites", "recipe", "methods", "backbones", "tasks",
               "console", "contact_sheet"},  # its last table, its page of predictions
    "planning": {"data", "distributed", "ops", "sites", "recipe", "methods", "backbones", "tasks", "engine",
                 "console"},
    "adapter": {"data", "distributed", "sites", "recipe", "methods", "backbones", "tasks", "engine"},
    "merging": {"data", "sites", "recipe", "methods", "backbones", "engine", "adapter"},
    "lora_export": {"recipe", "methods", "engine", "adapter", "merging"},
    "preflight": {"data", "distributed", "recipe", "console"},
    "precompute": {"data", "distributed", "sites", "recipe", "methods", "backbones", "tasks", "engine", "adapter"},
    "runs": {"data", "distributed", "sites", "recipe", "methods", "backbones", "tasks", "engine", "adapter",
             "contact_sheet", "metrics"},  # scores of files, without a task and its torch
}  # fmt: skip
# Files of the package that no room holds: `__init__` registers methods, `console` and `contact_sheet` serve commands.
ALONE = {"": {"methods"}, "console": set(), "contact_sheet": set()} | dict.fromkeys(COMMON, set())
THIRD_PARTY = {
    "ops": {"torch", "torch_geometric", "triton"},
    "sites": {"torch", "torch_geometric"},
    "distributed": {"torch", "torch_geometric", "psutil"},
    "methods": {"torch", "torch_geometric", "peft", "safetensors"},
}
# Only where a model that DeepSpeed partitioned must be gathered; test_importing_... keeps it lazy.
MAY_IMPORT_DEEPSPEED = {"methods", "distributed"}


def statements(body: list[ast.stmt], at_import: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports below `body`, but for those of type checkers; with `at_import` only what runs on import of the file."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from statements(getattr(node, part, []), at_import)


def imports(path: Path, at_import: bool = False) -> set[str]:
    """Every module a file imports, relative ones made absolute; see `statements`."""
    found = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in statements(ast.parse(path.read_text("utf-8")).body, at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, node.module or ""])
            found |= {f"{base.rstrip('.')}.{alias.name}" for alias in node.names}
    return found


def ours(module: str) -> str | None:
    """`data.batch` for mmpeft_ds.data.batch.Sample and the like: the longest part that is a module here."""
    parts = module.split(".")
    if parts[0] != "mmpeft_ds":
        return None
    while len(parts) > 1:
        path = ROOT.joinpath(*parts)
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            break
        parts.pop()
    return ".".join(parts[1:])


def name_of(path: Path) -> str:
    """`data.batch` for mmpeft_ds/data/batch.py, `data` for mmpeft_ds/data/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room that a module of this project is in: a folder, a folder of `engine`, or a file by itself."""
    parts = module.split(".")
    inner = ".".join(parts[:2])
    return inner if inner in ALLOWED else parts[0]


def allowed(room: str, module: str) -> bool:
    """Whether files of `room` may import `module` of this project."""
    above = room.split(".")[0]
    own = module.split(".")[0] == above if above == room else room_of(module) == room
    if own or module in COMMON or module == "":
        return True
    granted = (ALLOWED | ALONE)[room]
    return bool(granted & {module, module.split(".")[0], room_of(module)}) or f"{module}.__init__" in granted


def violations(room: str, modules: set[str]) -> list[str]:
    bad = []
    third_party = THIRD_PARTY.get(room)
    for module in modules:
        top = module.split(".")[0]
        inner = ours(module)
        if inner is not None:
            good = allowed(room, inner)
        elif top == "deepspeed":
            good = room not in THIRD_PARTY or room in MAY_IMPORT_DEEPSPEED
        else:
            good = third_party is None or top in third_party | set(sys.stdlib_module_names)
        bad += [] if good else [module]
    return sorted(bad)


def test_imports_point_one_way():
    """Not even from inside functions."""
    wrong = {
        str(path.relative_to(ROOT)): bad
        for path in PACKAGE.rglob("*.py")
        if (bad := violations(room_of(name_of(path)), imports(path)))
    }
    assert not wrong


def test_every_file_is_in_a_room():
    rooms = {room_of(name_of(path)) for path in PACKAGE.rglob("*.py")}
    assert rooms <= ALLOWED.keys() | ALONE.keys()


def test_the_import_check_sees_a_violation():
    assert violations("data", {"mmpeft_ds.methods.base.SiteMethod"}) == ["mmpeft_ds.methods.base.SiteMethod"]
    assert violations("ops", {"transformers.BertModel", "torch.nn", "math"}) == ["transformers.BertModel"]
    assert violations("methods", {"mmpeft_ds.sites.find_sites", "mmpeft_ds.errors.BadInput"}) == []
    assert violations("engine.zero", {"mmpeft_ds.engine.trainer", "mmpeft_ds.engine.optim.schedule"}) == [
        "mmpeft_ds.engine.trainer"
    ]
    assert violations("engine", {"mmpeft_ds.adapter.load", "mmpeft_ds.engine.zero.state"}) == [
        "mmpeft_ds.adapter.load"
    ]
    assert violations("recipe", {"mmpeft_ds.methods", "mmpeft_ds.methods.base"}) == ["mmpeft_ds.methods.base"]


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """The sets of more than one module that import each other, directly or through others."""
    reach = {module: set(graph[module]) for module in graph}
    changed = True
    while changed:
        changed = False
        for known in reach.values():
            more = set().union(*(reach.get(other, ()) for other in known)) - known
            known |= more
            changed |= bool(more)
    return sorted({tuple(sorted(o for o in reach[m] if m in reach[o])) for m in reach if m in reach[m]})


def test_no_modules_import_each_other():
    graph = {
        name_of(path): {inner for module in imports(path, at_import=True) if (inner := ours(module)) is not None}
        for path in PACKAGE.rglob("*.py")
    }
    assert len(graph) > 100
    assert not circles({module: others - {module} for module, others in graph.items()})


def test_the_check_of_circles_sees_one():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [("a", "b", "c")]
    assert not circles({"a": {"b"}, "b": set(), "c": {"a", "b"}})


def heavy(path: Path, seen: set[Path]) -> list[str]:
    """What a file imports, itself or through files of this project, that takes seconds to load."""
    seen.add(path)
    bad = []
    for module in imports(path, at_import=True):
        inner = ours(module)
        if module.split(".")[0] in ("torch", "transformers", "peft"):
            bad.append(f"{path.relative_to(ROOT)}: {module}")
        elif inner:
            file = PACKAGE.joinpath(*inner.split("."))
            file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
            bad += [] if file in seen else heavy(file, seen)
    return bad


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/*/options.py")), ids=lambda p: f"{p.parts[-3]}/{p.parts[-2]}")
def test_options_of_a_component_import_nothing_that_takes_seconds(path):
    assert not heavy(path, set())
    assert not heavy(path.parents[1] / "__init__.py", set())


def test_the_check_of_options_sees_a_heavy_import():
    assert heavy(PACKAGE / "backbones" / "clip" / "backbone.py", set())


def scripts() -> list[Path]:
    return [p for folder in ("launchers", "data_prep", "benchmarks") for p in (ROOT / folder).glob("*.py")]


def test_no_script_hides_a_standard_or_installed_module():
    installed = {m.lower() for m in importlib.metadata.packages_distributions()} | set(sys.stdlib_module_names)
    assert not [str(p) for p in scripts() if p.stem != "__init__" and p.stem.lower() in installed]


def test_launchers_are_thin_and_take_their_folder_off_the_path():
    for path in (ROOT / "launchers").glob("*.py"):
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 100, path
        assert path.stem.startswith("_") or "sys.path[0] = " in text, path  # under test


def test_a_benchmark_writes_the_page_that_is_shipped():
    texts = [path.read_text() for path in (ROOT / "benchmarks").glob("*.py")]
    written = {name for text in texts for name in re.findall(r'_page\.write\("(\w+)"', text)}
    shipped = (ROOT / "docs" / "benchmarks").iterdir()
    assert written == {path.stem for path in shipped if path.suffix == ".json"}
    assert all((ROOT / "docs" / "benchmarks" / f"{name}.md").is_file() for name in written)


def test_importing_the_package_does_not_import_deepspeed():
    code = "import sys, mmpeft_ds; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_every_public_function_and_class_is_documented():
    missing = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        if path.name != "__init__.py" and not ast.get_docstring(tree):
            missing.append(str(path.relative_to(ROOT)))
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if named and not path.stem.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}:{node.name}")
    assert not missing
