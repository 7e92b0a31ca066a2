"""A run over a 4-bit base that stopped goes on with another number of ranks, at another stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import ROOT, launch, quantised
from tests.helpers.runs import tiny_talk

pytestmark = [quantised.needs_packages, pytest.mark.distributed, pytest.mark.slow]


def train(recipe: str, ranks: int, *changes: str) -> None:
    sets = [word for change in changes for word in ("--set", change)]
    result = launch.run(ROOT / "launchers" / "train.py", "--recipe", recipe, *sets, ranks=ranks, timeout=600)
    assert result.code == 0, result.tail()


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("start", ["true", "loftq"])
def test_two_ranks_at_stage_2_and_then_one_at_stage_0_train_as_one(tmp_path, start):
    tiny_talk.write(tmp_path)
    once, parts = (
        tiny_talk.recipe(tmp_path, name, stage, backbone__quantise="nf4", optim__max_steps=6)
        for name, stage in (("once", 1), ("parts", 2))
    )
    method = f"method={{name: lora, r: 2, init_lora_weights: {start}}}"
    train(once, 1, method)
    train(parts, 2, method, "optim.max_steps=3")
    assert len(losses(tmp_path / "parts")) == 3
    train(parts, 1, method, "engine.deepspeed=ds_configs/zero0.json")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "once"), abs=1e-5)
    prints = [json.loads((tmp_path / n / "adapter" / "base_fingerprint.json").read_text()) for n in ("once", "parts")]
    assert prints[0] == prints[1] and any(name.endswith("weight.packed") for name in prints[0])
