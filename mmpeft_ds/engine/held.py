"""Fingerprints of all that trains, which a checkpoint is compared with before it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmpeft_ds.engine.zero import fingerprint as fingerprints
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.engine.zero.snapshot import Snapshot


@dataclass(frozen=True)
class Held:
    """Fingerprints of all that trains, computed without DeepSpeed's map from parameters to masters, to check what is
    gathered by.

    Attributes:
        weights: name -> fingerprint of the float32 parameter that the next forward uses.
        moments: of the optimizer, name -> sum of the bits of all numbers.
        hashed: names of the parameters that lie whole on the CPU of each rank, whose fingerprint is a hash.
    """

    weights: dict[str, str]
    moments: dict[str, int]
    hashed: frozenset[str]

    @classmethod
    def of(cls, engine: Any, trainables: dict[str, nn.Parameter]) -> Held:
        """Those of an engine. Collective. Raises RuntimeError if ranks hold different copies of a parameter."""
        whole = {n: p for n, p in trainables.items() if not hasattr(p, "ds_tensor")}
        hashed = frozenset(name for name, parameter in whole.items() if parameter.device.type == "cpu")
        weights, differing = fingerprints.over_ranks(trainables.items(), hashed)
        _check_same(differing)
        return cls(weights, zero_state.state_sums(engine) if trainables else {}, hashed)

    @classmethod
    def of_copies(cls, snapshot: Snapshot, engine: Any, group: Any) -> Held:
        """Those of a copy that every rank has taken. Collective, over `group`. Raises RuntimeError as `of`."""
        weights, differing = fingerprints.of_parts(snapshot.parts, group)
        _check_same(differing)
        hashed = frozenset(part.name for part in snapshot.parts if part.hashed)
        return cls(weights, zero_state.state_sums(engine, snapshot.held, group) if weights else {}, hashed)

    def check(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        """Compare what is to be written with them. Raises RuntimeError."""
        self.check_weights(weights, "weights.safetensors")
        for key, held in self.moments.items():
            bits = sum(zero_state.bits_sum(t) for name, t in moments.items() if name.endswith(f".{key}"))
            if bits % 2**32 != held:
                raise RuntimeError(f"optimizer.safetensors: {key} is not what the optimizer holds")

    def check_weights(self, written: dict[str, torch.Tensor], where: str) -> None:
        """Raise RuntimeError, naming the first tensor that differs."""
        prints = {name: fingerprints.of_whole(written[name], name in self.hashed) for name in self.weights}
        wrong = [name for name, print in self.weights.items() if prints[name] != print]
        if wrong:
            raise RuntimeError(
                f"{where}: {len(wrong)} of {len(self.weights)} tensors are not those that train, first {wrong[0]}"
            )


def _check_same(differing: list[str]) -> None:
    if differing:
        raise RuntimeError(f"trained parameter {differing[0]} is not the same on all ranks")
