"""Placement by ZeRO of the matrices that Muon updates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mmpeft_ds.distributed import collectives
from mmpeft_ds.engine.optim.muon import Muon, Part
from mmpeft_ds.engine.zero import gradients
from mmpeft_ds.engine.zero import state as zero_state


def lay_out(engine: Any) -> None:
    """Set in the Muon of `engine` which part of each matrix lies on this rank. Nothing to do for other optimisers, or
    at stage 0, where every rank holds complete matrices. Collective."""
    muon = zero_state.inner(engine)
    if not isinstance(muon, Muon) or engine.zero_optimization_stage() == 0:
        return
    laid: list[tuple[Tensor, list[Part]]] = []
    for flat, parameters in _flats(engine):
        if muon.orthogonalises(parameters[0]):
            laid.append((flat, list(_parts(engine, parameters))))
    whole = [float(part.numel == part.size) for _, parts in laid for part in parts]
    on_some_rank = iter(collectives.sum_scalars(whole, engine.device))
    for flat, parts in laid:
        muon.parts[id(flat)] = [replace(part, split=not next(on_some_rank)) for part in parts]
    muon.device = engine.device


def _flats(engine: Any) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """(tensor that the optimiser steps, the parameters of which parts lie in it, in their order there)."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        yield from zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    else:
        yield from zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)


def _parts(engine: Any, parameters: list[nn.Parameter]) -> Iterator[Part]:
    end = 0
    for parameter in parameters:
        start, numel = gradients.place(engine, parameter)
        if hasattr(parameter, "ds_tensor"):
            offset, end = end, end + parameter.ds_tensor.ds_numel
        else:
            offset = int(parameter._hp_mapping.hp_fragment_address.start) if numel else 0
        yield Part(zero_state.full_shape(parameter), offset, start, numel)
