"""Logistic regression with an L2 penalty, and the search of its strength on held-out accuracy."""

# n rows, D feature width, C classes

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

COARSE = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)
NEVER = -1e4  # intercept of a class that has no row: finite, but far below what any other gets


def logistic_regression(
    x_nD: Tensor, y_n: Tensor, num_classes: int, c: float, max_iter: int = 1000, tolerance: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and intercept (C,) that minimise sum of cross-entropies + |weight|^2 / (2 c), by L-BFGS.

    As scikit-learn's `LogisticRegression(solver="lbfgs", penalty="l2", C=c)`: intercepts are not penalised; with two
    classes one weight vector separates them. Computed in float64 from zero, so it is the same wherever it runs.

    Args:
        x_nD: features as they are, any scale.
        y_n: int64 in [0, C); classes without a row are never predicted.
        max_iter: iterations of L-BFGS.
        tolerance: it stops where no gradient of the sum is greater, or where a step gains less than 2.2e-5 of it; so
            did scikit-learn when CoOp was published. Classes that can be separated leave a large c undetermined: the
            result is then where it stopped.
    """
    x, present = x_nD.detach().double(), torch.unique(y_n)
    y = torch.searchsorted(present, y_n)
    rows, width = x.shape
    basis = None
    if rows < width:  # the weight lies in the span of the rows, so no more than n numbers per class are solved for
        basis, triangle = torch.linalg.qr(x.T)
        x = triangle.T
    classes = len(present)
    # scikit-learn penalises the one vector v = w_1 - w_0 that tells two classes apart. Here w_0 = -w_1 at the optimum,
    # so that |v|^2 is twice |weight|^2.
    penalty = (2.0 if classes == 2 else 1.0) / (2 * c)
    weight = x.new_zeros(classes, x.shape[1], requires_grad=True)
    intercept = x.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, intercept],
        max_iter=max_iter,
        max_eval=15 * max_iter,
        tolerance_grad=tolerance / rows,
        tolerance_change=2.2e-5 * tolerance / rows,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        # per row, so that the first step has a sensible length
        loss = cross_entropy(x @ weight.T + intercept, y) + penalty / rows * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    solved = weight.detach() if basis is None else weight.detach() @ basis.T
    whole = solved.new_zeros(num_classes, width)
    intercepts = solved.new_full((num_classes,), NEVER)
    whole[present], intercepts[present] = solved, intercept.detach()
    return whole, intercepts


def search_strength(score: Callable[[float], float], halvings: int = 8) -> tuple[float, float]:
    """The strength with the best score, and that score.

    The first best of `COARSE`; then, between a tenth and ten times of it, both ends are scored and the half nearer the
    better end is kept, in log10, the left one on ties. The better end of the last halving is the result.

    Source: CoOp, arXiv 2109.01134, released code (`lpclip/linear_probe.py`).
    """
    score = functools.cache(score)
    peak = max(COARSE, key=score)  # max keeps the first of equals
    left, right = math.log10(peak) - 1, math.log10(peak) + 1
    best = peak
    for _ in range(halvings):
        middle = 0.5 * (left + right)
        if score(10**left) < score(10**right):
            best, left = 10**right, middle
        else:
            best, right = 10**left, middle
    return best, score(best)
