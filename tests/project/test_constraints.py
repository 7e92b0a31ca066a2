"""Pinned versions are those that pyproject.toml allows; a CPU machine gets no CUDA packages."""

import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT


def pins(device: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / f"{device}.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            assert canonicalize_name(requirement.name) not in found, line
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def declared(*extras: str) -> list[Requirement]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        tomllib = pytest.importorskip("tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_dependency_is_pinned_within_its_bounds(device):
    pinned = pins(device)
    for requirement in declared("demo", "captioner", "quantise", "dev", "docs"):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but {version}"


def test_both_machines_have_the_same_versions_apart_from_cuda():
    cpu, cuda = pins("cpu"), pins("cuda")
    guard = {name for name, version in cpu.items() if version == "0"}
    assert {n: v for n, v in cpu.items() if n not in guard} == {n: v for n, v in cuda.items() if n not in guard}
    assert guard == {n for n in cuda if re.match(r"nvidia-|cuda-|flash-attn$", n)}


def test_the_guard_names_what_the_default_torch_wheel_of_linux_asks_for():
    assert {"cuda-toolkit", "cuda-bindings", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= set(pins("cpu"))


def test_installed_versions_are_the_pinned_ones():
    import importlib.metadata

    pinned = pins("cpu")
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        assert importlib.metadata.version(name).split("+")[0] == pinned[name]
