"""A packed run over a quantised base that is killed goes on with other numbers of ranks, and its adapter is merged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers import ROOT, launch, quantised
from tests.helpers.runs import endless, tiny_talk

pytestmark = [quantised.needs_packages, pytest.mark.distributed, pytest.mark.slow, pytest.mark.alone]
LAUNCHERS = ROOT / "launchers"
STEPS, PACK = 40, 160
ROUTED = {"name": "routed_lora", "r": 2, "route": "mul"}
CASES = [
    ("nf4", ROUTED),
    ("nf4", {"name": "aurora", "gates": False}),
    ("int8", {**ROUTED, "route": "none"}),
    ("int8", {"name": "tens_lora", "r": 2}),
]


def write(folder: Path, name: str, stage: int, form: str, method: dict, pack: int = PACK) -> Path:
    path = Path(tiny_talk.recipe(folder, name, stage, optim__max_steps=STEPS, optim__lr=2e-3, engine__save_every=4))
    raw = yaml.safe_load(path.read_text())
    raw["method"] = method
    raw["backbone"] |= {"quantise": form, "condition": "pooled" if method.get("route") == "mul" else "none"}
    raw["data"]["pack"] = pack
    path.write_text(yaml.safe_dump(raw))
    return path


def train(recipe: Path, ranks: int, stage: int, until: int = 0) -> None:
    """Train on some ranks to the end, or to a step at which the last of them is killed."""
    run = recipe.with_suffix("")
    words = ("--recipe", str(recipe), "--set", f"engine.deepspeed=ds_configs/zero{stage}.json")
    with launch.Launch(LAUNCHERS / "train.py", *words, ranks=ranks) as launched:
        if until:
            endless.reach(run, until, lambda: bool(launched.members()))
            launched.ranks()[ranks - 1].kill()
        result = launched.wait(300)
    assert not result.killed and bool(result.code) == bool(until), result.tail()
    assert not until or max(endless.steps_of(run)) < STEPS, "it was killed too late to be a test"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def merge(run: Path, weights: str) -> subprocess.CompletedProcess[str]:
    command = [LAUNCHERS / "merge.py", "--adapter", run / "adapter", "--out", run / weights, "--weights", weights]
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=launch.environment(), timeout=300
    )


@pytest.mark.parametrize(("form", "method"), CASES, ids=[f"{form}-{m['name']}" for form, m in CASES])
def test_killed_on_two_and_on_three_ranks_it_ends_on_one_as_if_it_had_run_there(tmp_path, form, method):
    tiny_talk.write(tmp_path)
    once, parts = (write(tmp_path, name, 0, form, method, pack) for name, pack in (("once", 0), ("parts", PACK)))
    train(once, 1, 0)
    train(parts, 2, 2, until=6)
    train(parts, 3, 1, until=16)
    train(parts, 1, 0)
    run, untouched = tmp_path / "parts", tmp_path / "once"
    assert endless.steps_of(run) == list(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(losses(untouched), abs=1e-4)
    trained, wanted = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, untouched))
    assert trained.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(trained[name], tensor, atol=1e-3, rtol=0, msg=name)
    assert_merged(run, form, mergeable=method.get("route") != "mul")


def assert_merged(run: Path, form: str, mergeable: bool) -> None:
    for weights, other in (("dequantised", "original"), ("original", "dequantised")):
        done = merge(run, weights)
        if not mergeable:
            assert done.returncode == 2 and "cannot be merged: it routes by 'mul'" in done.stderr, done.stderr
            assert not (run / weights).exists()
            continue
        assert done.returncode == 0, done.stderr
        merged = json.loads((run / weights / "merged.json").read_text())
        assert merged["weights"] == weights and merged["differences"][weights] < 1e-5
        assert merged["differences"][other] > 10 * merged["differences"][weights], form
        assert f"over the {weights} weights: {merged['differences'][weights]:.1e}" in done.stdout
