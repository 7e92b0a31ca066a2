"""Every type of peft on 2 ranks under ZeRO-3: what is exported is what was trained, and ZeRO-1 goes on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmpeft_ds import adapter, merging
from mmpeft_ds.methods.peft.kinds import KINDS
from tests.helpers import launch
from tests.helpers.peft_table import OFFERED, SMALL
from tests.helpers.runs import tiny_classifier

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.peft_types"
ZERO1, ZERO3 = ({"zero_optimization": {"stage": stage}} for stage in (1, 3))
# adamss needs a package that is not installed; the head of this backbone trains whole, which trainable_tokens cannot
NAMES = [name for name in OFFERED if name not in ("adamss", "trainable_tokens")]


def case(name: str) -> dict:
    first = ZERO1 if KINDS[name].stage3 else ZERO3
    method = {"name": "peft", "type": name, "options": SMALL.get(name, {})}
    return {"name": name, "config": first, "recipe": {"method": method}, "then": {"config": ZERO1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("peft_types")
    tiny_classifier.make_towers(path)
    (path / "cases.json").write_text(json.dumps([case(name) for name in NAMES]))
    result = launch.run_forked(SCRIPT, str(path / "cases.json"), str(path), ranks=2)
    assert result.code == 0, result.tail()
    return path


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_is_what_was_trained_and_another_stage_goes_on_with_it(folder, name):
    run = torch.load(folder / f"{name}.pt", weights_only=False)
    assert "error" not in run, run["error"]
    assert all(row["grad_norm"] > 0 for row in run["rows"])
    loaded = adapter.load(folder / name / "adapter")
    got = merging.outputs(loaded.model, loaded.backbone, merging.probe(loaded.backbone))[0]
    torch.testing.assert_close(got, run["trained"][0], rtol=0, atol=1e-6)
    assert (run["trained"][0] - run["first"][0]).abs().max() > 1e-2  # negative control
    for row, other in zip(run["resumed"], run["after"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-6)
