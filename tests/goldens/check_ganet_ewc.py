"""Elastic weight consolidation of GA-Net: Fisher information and penalty, on heads of torch and on graph layers.

The classes are those of the engine, with float64 parameters held whole by one process or cut in pieces as ZeRO cuts
them for three ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpeft_ds.engine.ewc import Pull
from mmpeft_ds.engine.zero.gradients import Shard, whole
from mmpeft_ds.runs.fisher import SquaredGradients, factors_of
from tests.goldens.check_ga_net import graph_options
from tests.helpers.goldens import Golden, checks
from tests.helpers.models.tiny_ga_net import NAMES, Model

RANKS = 3


def batches(golden: Golden) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and labels of each consecutive batch."""
    sizes = golden.tensor("batch_sizes" if "batch_sizes" in golden else "batches").tolist()
    yield from zip(golden.tensor("X").split(sizes), golden.tensor("labels").split(sizes), strict=True)


def fisher(
    golden: Golden, parameters: dict[str, nn.Parameter], logits: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Of the batches of the file, at the weights that the parameters have."""
    squares = SquaredGradients()
    for x, labels in batches(golden):
        for p in parameters.values():
            p.grad = None
        cross_entropy(logits(x), labels).backward()
        squares.add(whole(parameters.values()))
    return {name: squares.whole(p) for name, p in parameters.items()}


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
        if (penalty := pull.add(shards)) is not None:
            total += penalty.item()
    return total


def set_to(parameters: dict[str, nn.Parameter], golden: Golden, suffix: str) -> None:
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(golden.tensor(f"{name}{suffix}"))


def penalty(golden: Golden, parameters: dict[str, nn.Parameter], importance: dict[str, Tensor]) -> Tensor:
    """Move to the weights of the file and pull back to what the parameters were."""
    held = {p: (importance[name], p.detach().clone()) for name, p in parameters.items()}
    for name in parameters:
        golden.same(f"F_{name}", importance[name])
    set_to(parameters, golden, "_now")
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    return torch.tensor(pulled(held), dtype=torch.float64)


@checks("ganet/ewc_linear*")
def linear(golden: Golden) -> None:
    head = nn.Linear(golden.tensor("W_anchor").shape[1], golden.tensor("W_anchor").shape[0]).double()
    parameters = {"W": head.weight, "b": head.bias}
    set_to(parameters, golden, "_anchor")
    got = penalty(golden, parameters, fisher(golden, parameters, head))
    golden.same("penalty", got)
    for name, p in parameters.items():
        golden.same(f"d{name}", p.grad)


def network(golden: Golden, variant: str) -> tuple[Model, dict[str, nn.Parameter]]:
    """GA-Net of the file's widths at the anchor, and the parameters that the file knows."""
    known = [key for key in NAMES if f"{key}_anchor" in golden]
    classifier = golden.array("W2_anchor")
    options = {"variant": variant, **graph_options(golden, variant)}
    if "Wt_anchor" in golden:
        options["fusion_width"] = len(golden.array("Wt_anchor"))
    model = Model(golden.array("X").shape[1], 5, classifier.shape[1], **options)
    parameters = {key: model.parameter(key) for key in known}
    assert all(p.requires_grad for p in parameters.values())
    set_to(parameters, golden, "_anchor")
    return model, parameters


@checks("ganet/ewc_graph_v1*")
def graph_v1(golden: Golden) -> None:
    model, parameters = network(golden, "v1")
    with model.head.estimating_fisher():
        importance = fisher(golden, parameters, lambda x: model(x).logits)
    aliased = Pull(1.0)
    for name, p in parameters.items():  # the release keeps the tensor itself, which moves with the weights
        aliased.parts[id(p)] = importance[name].view(-1), p.detach().view(-1)
    golden.same("penalty_intended", penalty(golden, parameters, importance))
    for name, p in parameters.items():
        expected = 2 * golden.tensor(f"F_{name}") * (golden.tensor(f"{name}_now") - golden.tensor(f"{name}_anchor"))
        assert (p.grad - expected).abs().max() < golden.tolerance, f"{golden.name}: gradient of {name}"
        p.grad = torch.zeros_like(p)
    golden.same("penalty_official_aliased", aliased.add(whole(parameters.values())))
    golden.same("dW2_official", parameters["W2"].grad)


@checks("ganet/ewc_v2*")
def graph_v2(golden: Golden) -> None:
    model, parameters = network(golden, "v2")
    with model.head.estimating_fisher():
        importance = fisher(golden, parameters, lambda x: model(x).logits)
    # by groups of names, the first pattern that fits: fusion and graph head 0.8, anything else 0.5
    names = {key: f"features.head.{NAMES[key]}" for key in parameters}
    factors = factors_of(list(names.values()), [("*fusion*", 0.8), ("*classifier*", 0.8), ("*", 0.5)])
    weighted = {key: factors[names[key]] * f for key, f in importance.items()}
    golden.same("penalty", penalty(golden, parameters, weighted))
    for name, p in parameters.items():
        golden.same(f"d{name}", p.grad)
