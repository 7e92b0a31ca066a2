"""Tensors of checkpoints: the bytes of safetensors, hashed as they are written, and compared with what trains."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpeft_ds.engine import checkpoint, checkpoint_files, checkpoint_tensors
from mmpeft_ds.engine.zero import fingerprint, state
from mmpeft_ds.errors import BadInput
from tests.helpers.runs.checkpoint_header import header

TENSORS = {
    "b.weight": torch.arange(6.0).view(2, 3),
    "a.none": torch.zeros(0, 4),
    "ü.name": torch.tensor(2.5),
    "a.weight": torch.linspace(-1, 1, 5),
}


@pytest.mark.parametrize("names", [[], ["a.none"], ["ü.name"], list(TENSORS)])
def test_the_file_has_the_bytes_of_safetensors(tmp_path, names):
    tensors = {name: TENSORS[name] for name in names}
    digest = checkpoint_tensors.write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == checkpoint_tensors.hashed(tmp_path / "ours")
    assert load_file(tmp_path / "ours").keys() == tensors.keys()


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.float64), torch.zeros(2, 3).T])
def test_other_tensors_are_refused_by_name(tmp_path, tensor):
    with pytest.raises(TypeError, match="the.name: .*expected contiguous float32"):
        checkpoint_tensors.write(tmp_path / "f", {"the.name": tensor})


def _files(value: int) -> dict:
    return {
        "weights.safetensors": lambda p: checkpoint_tensors.write(p, {"w": torch.full((3,), float(value))}),
        "optimizer.safetensors": lambda p: checkpoint_tensors.write(p, {"w.exp_avg": torch.zeros(3)}),
        "state.json": lambda p: p.write_text(json.dumps(header())),
    }


def test_a_flipped_bit_is_noticed_by_the_hash_of_the_writing(tmp_path):
    before, path = (checkpoint_files.write(tmp_path / "checkpoints", s, _files(s), 9, False) for s in (1, 2))
    sums = json.loads((path / "checksums.json").read_text())
    assert sums["weights.safetensors"].startswith("xxh3_128:") and len(sums["state.json"]) == 64
    assert checkpoint_files.damage(path) is None
    _flip_last_bit(path / "weights.safetensors")
    assert "weights.safetensors has xxh3_128 " in checkpoint_files.damage(path)
    assert checkpoint.newest_valid(tmp_path) == before


def _flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("hashed", [True, False])
def test_numbers_that_are_not_those_that_train_are_not_written(hashed):
    weight, moment = torch.ones(3), torch.arange(3.0)
    prints = {"w": fingerprint.of_whole(weight, hashed)}
    names = frozenset(prints) if hashed else frozenset()
    held = checkpoint.Held(prints, {"exp_avg": state.bits_sum(moment) % 2**32}, names)
    held.check({"w": weight}, {"w.exp_avg": moment})
    with pytest.raises(RuntimeError, match="first w"):
        held.check({"w": weight.nextafter(moment)}, {"w.exp_avg": moment})
    with pytest.raises(RuntimeError, match="exp_avg is not what the optimizer holds"):
        held.check({"w": weight}, {"w.exp_avg": moment + 1})


def test_a_checkpoint_without_a_moment_that_is_read_is_refused_before_anything_is_set(tmp_path, monkeypatch):
    """As where a later version gives a parameter to AdamW that Muon stepped before."""
    path = checkpoint_files.write(tmp_path / "checkpoints", 1, _files(1), 9, False)
    monkeypatch.setattr(checkpoint, "_read_header", lambda *given: {})
    monkeypatch.setattr(checkpoint, "_optimizer", lambda *given: "muon")
    monkeypatch.setattr(state, "ensure_optimizer_state", lambda engine: None)
    monkeypatch.setattr(state, "moments", lambda *given: ("exp_avg", "exp_avg_sq"))
    weight = torch.nn.Parameter(torch.ones(3))
    engine = SimpleNamespace(module=torch.nn.Identity(), device=torch.device("cpu"))
    with pytest.raises(BadInput, match=r"lacks w\.exp_avg_sq: .* or add --fresh"):
        checkpoint.load(path, engine, {"w": weight})
    assert weight.eq(1).all()


def test_weights_and_moments_take_at_most_16_bytes_an_element(tmp_path):
    """Those of a small LoRA, with the long names that peft gives: what beside 12 bytes an element is in the files."""
    names = [
        f"base_model.model.model.layers.{i}.self_attn.{part}_proj.lora_{side}.default.weight"
        for i, part, side in itertools.product(range(12), "qkv", "AB")
    ]
    weights = {name: torch.zeros(8, 64) for name in names}
    moments = {f"{name}.{key}": t for name, t in weights.items() for key in ("exp_avg", "exp_avg_sq")}
    for file, tensors in (("weights", weights), ("optimizer", moments)):
        checkpoint_tensors.write(tmp_path / file, tensors)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 12 < size / sum(t.numel() for t in weights.values()) <= 16
