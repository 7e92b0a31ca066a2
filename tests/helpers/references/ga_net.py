"""GA-Net by dense matrices on all rows, written apart from the package: what ranks together must equal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def adjacency(x: Tensor, kind: str, tau: float, k: int) -> Tensor:
    """(M, M) with self-loops, row = target. `kind`: threshold, directed, hearing (its transpose), both_ways."""
    unit = normalize(x, dim=1)
    cosine = unit @ unit.T
    own = torch.eye(len(x), dtype=torch.bool)
    if kind == "threshold":
        edges = (cosine > tau) & ~own
    else:
        best = cosine.masked_fill(own, -2).topk(min(k, len(x) - 1), dim=1).indices
        chosen = torch.zeros_like(own).scatter(1, best, True) & (cosine > tau)
        edges = {"directed": chosen.T, "hearing": chosen, "both_ways": chosen | chosen.T}[kind]
    return (edges | own).to(x.dtype)


def hat(a: Tensor, mean: bool = False) -> Tensor:
    """Normalised by in-degrees of targets and out-degrees of sources; with `mean` by the former alone."""
    if mean:
        return a / a.sum(1, keepdim=True).clamp(min=1)
    return a / a.sum(1).clamp(min=1).sqrt()[:, None] / a.sum(0).clamp(min=1).sqrt()[None, :]


def logits(w: dict[str, Tensor], x: Tensor, a_hat: Tensor, relu: bool, residual: bool = False) -> Tensor:
    """(M, C); names of `w` are those of the head's parameters."""
    z = x @ w["down.weight"].T + w["down.bias"]
    h = a_hat @ z @ w["conv.weight"] + w["conv.bias"]
    h = h.relu() if relu else h
    u = h @ w["up.weight"].T + w["up.bias"]
    return a_hat @ (u + x if residual else u) @ w["classifier.weight"] + w["classifier.bias"]


def gradients(
    w: dict[str, Tensor], x: Tensor, labels: Tensor, a_hat: Tensor, relu: bool, residual: bool = False
) -> dict[str, Tensor]:
    """`logits`, `loss` and the gradient of the mean cross-entropy for every weight and for `x`."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in w.items()}
    x = x.detach().clone().requires_grad_()
    out = logits(leaves, x, a_hat, relu, residual)
    loss = cross_entropy(out, labels)
    loss.backward()
    found = {n: t.grad for n, t in leaves.items()}
    return {"logits": out.detach(), "loss": loss.detach(), "x": x.grad, **found}
