"""Elastic weight consolidation of GA-Net: Fisher information and penalty, on heads of torch and on graph layers.

The classes are those of the engine, with float64 parameters held whole by one process or cut in pieces as ZeRO cuts
them for three ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from golden_framework import Golden, checks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpeft_ds.engine.ewc import Pull
from mmpeft_ds.engine.fisher import SquaredGradients
from mmpeft_ds.engine.gradients import Shard, whole

RANKS = 3


def batches(golden: Golden) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and labels of each consecutive batch."""
    sizes = golden.tensor("batch_sizes").tolist()
    yield from zip(golden.tensor("X").split(sizes), golden.tensor("labels").split(sizes), strict=True)


def fisher(model: nn.Module, golden: Golden, logits: Callable[[Tensor], Tensor]) -> SquaredGradients:
    """Of the batches of the file, at the weights that `model` has."""
    squares = SquaredGradients()
    for x, labels in batches(golden):
        model.zero_grad()
        cross_entropy(logits(x), labels).backward()
        squares.add(whole(model.parameters()))
    return squares


def pulled(parameters: dict[nn.Parameter, tuple[Tensor, Tensor]]) -> float:
    """Penalty of all pieces, each added to its part of the gradients, as three ranks would do it."""
    total = 0.0
    for rank in range(RANKS):
        pull, shards = Pull(1.0), []
        for p, (importance, anchor) in parameters.items():
            size = -(-p.numel() // RANKS)
            start, end = rank * size, min((rank + 1) * size, p.numel())
            pull.hold(p, importance, anchor, start, max(0, end - start))
            shards.append(Shard(p, start, p.detach().view(-1)[start:end], p.grad.view(-1)[start:end]))
        total += pull.add(shards)
    return total


def set_to(parameters: dict[str, nn.Parameter], golden: Golden, suffix: str) -> None:
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(golden.tensor(f"{name}{suffix}"))


def penalty(golden: Golden, parameters: dict[str, nn.Parameter], squares: SquaredGradients) -> Tensor:
    """Move to the weights of the file and pull; F comes from `squares`, the anchor is what the parameters were."""
    held = {p: (squares.whole(p), p.detach().clone()) for p in parameters.values()}
    for name, p in parameters.items():
        golden.same(f"F_{name}", squares.whole(p))
    set_to(parameters, golden, "_now")
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    return torch.tensor(pulled(held), dtype=torch.float64)


@checks("ganet/ewc_linear*")
def linear(golden: Golden) -> None:
    head = nn.Linear(golden.tensor("W_anchor").shape[1], golden.tensor("W_anchor").shape[0]).double()
    parameters = {"W": head.weight, "b": head.bias}
    set_to(parameters, golden, "_anchor")
    got = penalty(golden, parameters, fisher(head, golden, head))
    golden.same("penalty", got)
    for name, p in parameters.items():
        golden.same(f"d{name}", p.grad)
