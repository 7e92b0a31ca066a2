"""LoRA that starts from training data: CorDA (arXiv 2406.05223) and LoRA-GA (arXiv 2407.05000).

CorDA decomposes the product of each frozen weight and the covariance of its inputs, LoRA-GA the gradient of the
weight. The decomposition gives the initial factors `up_0 down_0`. peft subtracts their product from the frozen
weights; here these stay unchanged, and the low-rank term subtracts its own start, as for `pissa` (see `start`).

Covariances and gradients are averages over batches of the training stream, equal on all ranks; rank 0 computes the
factors from them.
"""

# r rank, I width of the input, O width of the output

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora.corda import CordaEigens, collect_eigens_for_layer
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import StartData
from mmpeft_ds.methods.lora import start


def begin(model: PeftModel, data: StartData) -> None:
    """Initialise every LoRA layer of `model`, after `start.place`. Collective.

    Raises:
        BadInput: the data reached no layer, or numbers that are not finite were met.
    """
    name, config = model.active_adapter, model.active_peft_config
    layers = dict(start.layers(model))
    batches = itertools.islice(data.batches, config.start_batches)
    bases = {path: layer.get_base_layer() for path, layer in layers.items()}
    statistics = _covariances(model, bases, batches, data) if config.begun_by == "corda" else None
    statistics = statistics if statistics is not None else _gradients(model, bases, batches, data)
    for path, layer in layers.items():
        if not statistics[path].isfinite().all():
            raise BadInput(
                f"init_lora_weights: {config.begun_by} met numbers that are not finite at {path}. Look at the data, "
                "or use another start."
            )
        compute = _corda if config.begun_by == "corda" else _lora_ga
        down, up = start.factors(layer, name, lambda c=compute, p=path, f=layer: c(f, name, statistics[p], config))
        layer.lora_A[name].begin_at(down)
        layer.lora_B[name].begin_at(up)


def _corda(layer: lora.Linear, name: str, covariance: Tensor, config: Any) -> None:
    """Initialise `layer` by peft from the (I, I) covariance of its inputs."""
    base, r = layer.get_base_layer(), layer.r[name]
    base.covariance_matrix = covariance
    try:
        all_of_it = collect_eigens_for_layer(base, config)
    finally:
        del base.covariance_matrix
    # Instruction-previewed: the largest directions; knowledge-preserved: the smallest.
    kept = slice(None, r) if config.corda_config.corda_method == "ipm" else slice(-r, None)
    device = base.weight.device
    base.eigens = CordaEigens(
        S_WC=all_of_it.S_WC[kept].clone(),
        U_WC=all_of_it.U_WC[:, kept].to(device),
        V_WC=all_of_it.V_WC[:, kept].to(device),
    )
    layer.corda_init(name, "corda")


def _lora_ga(layer: lora.Linear, name: str, gradient: Tensor, config: Any) -> None:
    """Initialise `layer` by peft from the gradient of its frozen weight."""
    layer.get_base_layer()._peft_loraga_grad = gradient
    layer.lora_ga_init(name, config.lora_ga_config)


@torch.no_grad()
def _covariances(
    model: PeftModel, bases: dict[str, nn.Module], batches: Iterator[Any], data: StartData
) -> dict[str, Tensor]:
    """(I, I) float32 for each layer: the mean over calls of X^T X, where X has the inputs as rows, divided by its
    maximum."""
    sums = {path: torch.zeros(()) for path in bases}
    calls = dict.fromkeys(bases, 0)

    def hook(path: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            rows = args[0].detach().flatten(0, -2).float()
            if not len(rows):
                return
            rows = rows / rows.max().abs()  # as peft does it
            sums[path] = sums[path].to(rows.device) + rows.T @ rows
            calls[path] += 1

        return add

    handles = [base.register_forward_hook(hook(path)) for path, base in bases.items()]
    try:
        for batch in batches:
            data.run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    _refuse_unseen(calls)
    return {path: total / calls[path] for path, total in sums.items()}


def _gradients(
    model: PeftModel, bases: dict[str, nn.Module], batches: Iterator[Any], data: StartData
) -> dict[str, Tensor]:
    """Gradient of each frozen weight, float32, in its shape: the mean over batches of the gradient of the mean
    loss."""
    weights = {path: base.weight for path, base in bases.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    sums = {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in weights.items()}
    reached, seen = dict.fromkeys(weights, 0), 0
    for parameter in trained:
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for batch in batches:
            with torch.enable_grad():
                of_batch = torch.autograd.grad(data.loss(model, batch), list(weights.values()), allow_unused=True)
            for path, gradient in zip(weights, of_batch, strict=True):
                if gradient is not None:
                    sums[path] += gradient.float()
                    reached[path] += 1
            seen += 1
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
    _refuse_unseen(reached)
    return {path: total / seen for path, total in sums.items()}


def _refuse_unseen(times: dict[str, int]) -> None:
    unseen = [path for path, count in times.items() if not count]
    if unseen:
        raise BadInput(
            f"target_modules: no batch at the beginning of the data reached {unseen[0]} ({len(unseen)} such layers), "
            "so that it has no start. Raise start_batches, or leave it out."
        )
