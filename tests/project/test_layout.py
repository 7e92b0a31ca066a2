"""The rules that keep the project in one direction, read from the source itself."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "mmpeft_ds"
# Design 2: what each folder may import of this project; everybody may import these contracts.
COMMON = {"errors", "files", "progress", "registry", "data.batch", "data.transform"}
ALLOWED = {
    "ops": {"ops"},
    "sites": {"sites"},
    "distributed": {"distributed", "ops"},
    "methods": {"methods", "ops", "distributed", "sites"},
    "backbones": {"backbones", "sites", "ops", "distributed"},
    "tasks": {"tasks", "metrics", "ops", "distributed"},
    "metrics": {"metrics"},
    "data": {"data"},
}
THIRD_PARTY = {
    "ops": {"torch", "torch_geometric"},
    "sites": {"torch", "torch_geometric"},
    "distributed": {"torch", "torch_geometric", "psutil"},
    "methods": {"torch", "torch_geometric", "peft", "safetensors"},
}
# Only where a model that DeepSpeed partitioned must be gathered; test_importing_... keeps it lazy.
MAY_IMPORT_DEEPSPEED = {"methods", "distributed"}


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever the statement stands, relative ones made absolute."""
    found = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
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


def violations(folder: str, modules: set[str]) -> list[str]:
    bad = []
    for module in modules:
        top = module.split(".")[0]
        inner = ours(module)
        if inner is not None:
            good = inner in COMMON or inner.split(".")[0] in ALLOWED[folder] or inner == ""
        elif top == "deepspeed":
            good = folder in MAY_IMPORT_DEEPSPEED
        else:
            good = folder not in THIRD_PARTY or top in THIRD_PARTY[folder] | set(sys.stdlib_module_names)
        bad += [] if good else [module]
    return sorted(bad)


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_point_one_way(folder):
    wrong = {
        str(path.relative_to(ROOT)): bad
        for path in (PACKAGE / folder).rglob("*.py")
        if (bad := violations(folder, imports(path)))
    }
    assert not wrong


def test_the_import_check_sees_a_violation(tmp_path):
    assert violations("data", {"mmpeft_ds.methods.base.Method"}) == ["mmpeft_ds.methods.base.Method"]
    assert violations("ops", {"transformers.BertModel", "torch.nn", "math"}) == ["transformers.BertModel"]
    assert violations("methods", {"mmpeft_ds.sites.find_sites", "mmpeft_ds.errors.BadInput"}) == []


def heavy(path: Path, seen: set[Path]) -> list[str]:
    """What a file imports, itself or through files of this project, that takes seconds to load."""
    seen.add(path)
    bad = []
    for module in imports(path):
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
