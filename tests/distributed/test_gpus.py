"""GPUs that torch does not see are told, unless somebody has hidden them."""

import pytest
import torch

from mmpeft_ds.distributed import gpus
from mmpeft_ds.preflight import facts

VERSION = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
GCC version:  gcc version 12.2.0
"""
LAID_OUT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with an NVIDIA driver and a torch for CUDA that sees no GPU, and some variables."""

    def make(driver: bool = True, built: str | None = "13.0", seen: bool = False, **variables: str) -> None:
        for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (LAID_OUT | variables).items():
            monkeypatch.setenv(name, value)
        (tmp_path / "version").write_text(VERSION)
        monkeypatch.setattr(gpus, "DRIVER", tmp_path / ("version" if driver else "missing"))
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)

    return make


@pytest.mark.parametrize(
    ("built", "why"), [("13.0", "built for CUDA 13.0: see that the driver"), (None, "built for the CPU: make setup")]
)
def test_a_machine_whose_gpus_torch_does_not_see_is_told_and_preflight_calls_it_a_problem(machine, built, why):
    machine(built=built)
    line = gpus.unseen()
    assert "NVIDIA driver 550.54.15, but torch sees no GPU" in line and why in line and line.count("\n") == 0
    own = facts.of_rank()
    assert own["device"] == "CPU" and own["device_problem"] == line


@pytest.mark.parametrize(
    "given",
    [{"driver": False}, {"seen": True}, {"CUDA_VISIBLE_DEVICES": ""}, {"DS_ACCELERATOR": "cpu"}],
    ids=["no driver", "seen", "hidden", "the CPU is asked for"],
)
def test_nothing_is_said_where_there_are_none_or_somebody_has_hidden_them(machine, given):
    machine(**given)
    assert gpus.unseen() == ""
