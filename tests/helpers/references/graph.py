"""Dense graphs and convolutions over all samples, written apart from the package: what ranks must add up to."""

import numpy as np
import torch

# splits of a batch over 1 to 4 ranks, uneven ones and one with an empty rank
SPLITS = [[12], [6, 6], [4, 4, 4], [3, 3, 3, 3], [5, 4, 3], [6, 0, 6]]


def features(rows=12, width=6, seed=0):
    """Rows that crowd enough to have edges at a cosine of 0.5."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, dtype=torch.float64, generator=generator) + 0.3


def share(x, split, rank):
    """Rows of one rank."""
    return x.split(split)[rank]


def cosine(x):
    """(M, M), of float64 rows."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    return unit @ unit.T


def threshold_matrix(x, tau, valid):
    """(M, M) multiplicities, row = target."""
    A = (cosine(x) > tau).double().fill_diagonal_(1)
    return A * valid[:, None] * valid


def knn_matrix(x, k, tau, valid, key, direction="to_neighbour", symmetric=False):
    """(M, M) multiplicities, row = target, by a plain loop."""
    A = torch.zeros(len(x), len(x), dtype=torch.float64)
    cos = cosine(x).round(decimals=12)  # so that equal rows are equal
    for i in valid.nonzero().flatten().tolist():
        others = [j for j in valid.nonzero().flatten().tolist() if j != i]
        best = sorted(others, key=lambda j: (-cos[i, j].item(), key[j].item()))[:k]
        for j in best:
            if tau is None or cos[i, j] > tau:
                A[(j, i) if direction == "to_neighbour" else (i, j)] = 1
    if symmetric:
        A = torch.maximum(A, A.T)
    return A + torch.diag(valid.double())


def hat(A, kind="symmetric"):
    """Weighted matrix; degrees are at least 1."""
    inward, outward = A.sum(1).clamp(min=1), A.sum(0).clamp(min=1)
    if kind == "mean":
        return A / inward[:, None]
    return A / inward.sqrt()[:, None] / outward.sqrt()


def dense(graph):
    """(B, M) of a rank's graph."""
    A = torch.zeros(graph.num_targets, graph.num_sources, dtype=torch.float64)
    return A.index_put_((graph.target, graph.source), graph.weight, accumulate=True)


def weights():
    """Two convolutions with a linear layer before each, as GA-Net: 6 -> 5, conv 5 -> 5, 5 -> 6, conv 6 -> 4."""
    rng = np.random.default_rng(0)
    shapes = {"down": (5, 6), "conv1": (5, 5), "up": (6, 5), "conv2": (6, 4)}
    found = {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = torch.from_numpy(rng.standard_normal(shape))
        found[f"{name}.bias"] = torch.from_numpy(rng.standard_normal(shape[1] if "conv" in name else shape[0]))
    return found


def one_rank(x, labels, valid, A_hat):
    """Logits, loss over valid rows, and all gradients of the dense network on all rows."""
    W = {name: tensor.clone().requires_grad_() for name, tensor in weights().items()}
    x = x.clone().requires_grad_()
    h = x @ W["down.weight"].T + W["down.bias"]
    h = (A_hat @ h @ W["conv1.weight"] + W["conv1.bias"]).relu()
    h = h @ W["up.weight"].T + W["up.bias"]
    logits = A_hat @ h @ W["conv2.weight"] + W["conv2.bias"]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")[valid].sum() / valid.sum()
    loss.backward()
    return {"logits": logits, "loss": loss, "x": x.grad} | {name: tensor.grad for name, tensor in W.items()}
