"""Reference vectors: every .npz below GOLDENS_DIR is run by the checker that claims it by folder and name pattern.

A checker lives in a file tests/goldens/check_*.py, takes a `Golden`, runs the public classes with its weights and
compares. It must look at every array of the file, so that a gradient cannot be forgotten.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.helpers import ROOT

GOLDENS_DIR = Path(os.environ.get("GOLDENS_DIR", ROOT.parent / "shared" / "goldens"))

# Files whose method is not built yet, and why. Whatever a checker claims is checked, even if it is named here.
NOT_YET_DUE: dict[str, str] = {}

# Weights of a file that take no part in what it expects, so that breaking one of them changes nothing.
IDLE = {
    # they only decide edges, and with room to spare
    "ganet/graph_*": ("tau",),
    "ganet/ewc_*": ("tau",),
    "ganet/graph_knn_*": ("*_X",),
    # the teacher reads texts alone: its cross-attention and gates never run
    "aurora/retrieval_*_weights": ("mtxt.*.cross.*", "mtxt.*.gate_*"),
}


def idle(name: str, key: str) -> bool:
    """Whether array `key` of file `name` takes no part."""
    return any(fnmatchcase(name, n) and any(fnmatchcase(key, p) for p in patterns) for n, patterns in IDLE.items())


class Golden:
    """One file: `name` is `folder/stem`; remembers which arrays were looked at."""

    def __init__(self, name: str, arrays: dict[str, np.ndarray], tolerance: float = 1e-9):
        self.name, self.arrays, self.tolerance = name, dict(arrays), tolerance
        self.seen: set[str] = set()

    @classmethod
    def load(cls, path: Path, root: Path) -> Golden:
        with np.load(path, allow_pickle=False) as file:
            return cls(path.relative_to(root).with_suffix("").as_posix(), {k: file[k] for k in file.files})

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def cases(self) -> list[str]:
        """What stands before `__loss`: the cases of a file that has several."""
        cases = [key.removesuffix("__loss") for key in self.arrays if key.endswith("__loss")]
        assert cases, f"{self.name}: no case in it"
        return cases

    def array(self, key: str) -> np.ndarray:
        self.seen.add(key)
        return self.arrays[key]

    def number(self, key: str) -> float:
        return self.array(key).item()

    def tensor(self, key: str, requires_grad: bool = False) -> Tensor:
        tensor = torch.from_numpy(np.array(self.array(key)))
        return tensor.requires_grad_() if requires_grad else tensor

    def same(self, key: str, got: Tensor | None, tolerance: float | None = None, relative: bool = False) -> None:
        """Fail unless `got` has the shape of array `key` and is within the tolerance everywhere.

        Args:
            tolerance: instead of the file's.
            relative: it is a fraction of the array's largest magnitude.
        """
        want = self.tensor(key)
        assert got is not None, f"{self.name}: {key}: nothing was computed (no gradient?)"
        assert got.shape == want.shape, f"{self.name}: {key}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if not want.numel():
            return
        allowed = self.tolerance if tolerance is None else tolerance
        if relative:
            allowed *= want.abs().max().item()
        worst = (got.detach().double() - want.double()).abs().max().item()
        assert worst <= allowed, f"{self.name}: {key}: off by {worst:.3g}, allowed {allowed:.3g}"

    def unseen(self) -> list[str]:
        return sorted(set(self.arrays) - self.seen)


Checker = Callable[[Golden], None]
_CHECKERS: list[tuple[str, Checker]] = []


def checks(*patterns: str) -> Callable[[Checker], Checker]:
    """Register a checker for names like `routing/lora_separate_*`."""

    def register(checker: Checker) -> Checker:
        _CHECKERS.extend((pattern, checker) for pattern in patterns)
        return checker

    return register


def load_checkers() -> None:
    for file in sorted((ROOT / "tests" / "goldens").glob("check_*.py")):
        importlib.import_module(f"tests.goldens.{file.stem}")


def checker_of(name: str) -> Checker | None:
    """The checker with the longest pattern that fits `name`."""
    fitting = [(len(pattern), checker) for pattern, checker in _CHECKERS if fnmatchcase(name, pattern)]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def why_not_due(name: str) -> str | None:
    return next((reason for pattern, reason in NOT_YET_DUE.items() if fnmatchcase(name, pattern)), None)


def run(golden: Golden, checker: Checker) -> None:
    """Check one file; every array must have been looked at."""
    checker(golden)
    assert not golden.unseen(), f"{golden.name}: the checker never looked at {golden.unseen()}"


def find(root: Path) -> list[Path]:
    return sorted(root.rglob("*.npz")) if root.is_dir() else []
