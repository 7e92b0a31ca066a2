"""The fingerprint of frozen tensors: additive over shards, different for every change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmpeft_ds.engine.zero import fingerprint
from mmpeft_ds.errors import BadInput

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def some(dtype: torch.dtype, n: int = 101) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    if dtype.is_floating_point:
        return torch.randn(n, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, (n,), generator=generator).to(dtype)


def by_definition(flat: torch.Tensor) -> int:
    """Python integers, one element at a time."""
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return sum((2 * i + 1) * b for i, b in enumerate(flat.view(signed).tolist())) % 2**64


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_sum_it_says_it_is(dtype):
    flat = some(dtype)
    assert fingerprint.weighted_bits(flat) % 2**64 == by_definition(flat)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 200])
def test_shards_add_up_to_the_whole(ranks):
    flat = some(torch.float32)
    size = -(-len(flat) // ranks)
    parts = [fingerprint.weighted_bits(flat[r * size : (r + 1) * size], r * size) for r in range(ranks)]
    assert sum(parts) % 2**64 == fingerprint.weighted_bits(flat) % 2**64


def test_chunks_add_up_to_the_whole(monkeypatch):
    whole = fingerprint.weighted_bits(some(torch.float32))
    monkeypatch.setattr(fingerprint, "_CHUNK", 7)
    assert fingerprint.weighted_bits(some(torch.float32)) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_single_flipped_bit_shows(dtype):
    flat = some(dtype, 9)
    bits = flat.view(torch.int32 if dtype == torch.float32 else torch.int16)
    before = fingerprint.weighted_bits(flat)
    for i in range(len(bits)):
        for bit in range(flat.element_size() * 8 - 1):
            bits[i] ^= 1 << bit
            assert fingerprint.weighted_bits(flat) != before
            bits[i] ^= 1 << bit
    assert fingerprint.weighted_bits(flat) == before


def test_exchanged_values_show():
    flat = torch.tensor([1.0, 2.0, 3.0])
    assert fingerprint.weighted_bits(flat) != fingerprint.weighted_bits(flat.flip(0))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.trained = nn.Linear(3, 2)
        self.register_buffer("mean", torch.arange(3.0))
        self.register_buffer("derived", torch.arange(3.0), persistent=False)


def test_frozen_parameters_and_saved_buffers_are_covered_and_nothing_else():
    found = fingerprint.frozen_fingerprint(fingerprint.frozen_tensors(Model()))
    assert sorted(found) == ["frozen.bias", "frozen.weight", "mean"]
    assert found["frozen.weight"].startswith("float32 2x3 ")


def test_names_are_those_of_the_bare_model():
    name = "module.base_model.model.encoder.layer.0.query.base_layer.weight"
    assert fingerprint.base_name(name) == "encoder.layer.0.query.weight"


def test_a_difference_is_refused_by_name():
    saved = {"a": "float32 2 00", "b": "float32 2 01"}
    fingerprint.compare(saved, dict(saved), "checkpoint x")
    with pytest.raises(BadInput, match="checkpoint x: frozen weight b is float32 2 ff, expected float32 2 01"):
        fingerprint.compare(saved, {**saved, "b": "float32 2 ff"}, "checkpoint x")
    with pytest.raises(BadInput, match="frozen weight b is absent"):
        fingerprint.compare(saved, {"a": saved["a"]}, "checkpoint x")
    with pytest.raises(BadInput, match="frozen weight c"):
        fingerprint.compare(saved, {**saved, "c": "float32 2 00"}, "checkpoint x")
    fingerprint.compare(saved, {**saved, "c": "float32 2 00"}, "adapter", missing_ok=True)
