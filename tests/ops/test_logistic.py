"""Logistic regression against its optimality conditions and scikit-learn; the search of its strength."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmpeft_ds.ops.logistic import COARSE, logistic_regression, search_strength


def data(classes=4, rows=40, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % classes
    centres = torch.randn(classes, width, dtype=torch.float64, generator=generator)
    return 0.5 * centres[y] + torch.randn(rows, width, dtype=torch.float64, generator=generator), y


def gradients(x, y, weight, bias, c, on_bias=0.0):
    """Of the objective at a solution; `on_bias` penalises the intercepts as well."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = cross_entropy(x @ weight.T + bias, y, reduction="sum") + weight.square().sum() / (2 * c)
    return torch.autograd.grad(loss + on_bias * bias.square().sum() / (2 * c), (weight, bias))


@pytest.mark.parametrize(("rows", "width"), [(40, 6), (12, 30)])
@pytest.mark.parametrize("c", [10.0, 1.0, 1e-3])
def test_it_solves_the_penalised_problem_also_with_fewer_rows_than_features(rows, width, c):
    x, y = data(rows=rows, width=width)
    weight, bias = logistic_regression(x, y, 4, c, tolerance=1e-7)
    assert weight.shape == (4, width) and bias.shape == (4,)
    assert max(g.abs().max() for g in gradients(x, y, weight, bias, c)) < 1e-4


def test_intercepts_are_not_penalised():
    x, y = data()
    x, y = x[y != 3], y[y != 3]
    x, y = torch.cat([x, x[y == 1]]), torch.cat([y, y[y == 1]])  # uneven classes, so that intercepts matter
    weight, bias = logistic_regression(x, y, 3, 0.1, tolerance=1e-7)
    assert gradients(x, y, weight, bias, 0.1)[1].abs().max() < 1e-5
    assert gradients(x, y, weight, bias, 0.1, on_bias=1.0)[1].abs().max() > 1e-2


def test_two_classes_are_separated_by_one_penalised_vector():
    x, y = data(classes=2)
    weight, bias = logistic_regression(x, y, 2, 0.5, tolerance=1e-7)
    torch.testing.assert_close(weight[0], -weight[1], atol=1e-6, rtol=1e-6)
    vector = (weight[1] - weight[0]).requires_grad_()
    logits = x @ vector + bias[1] - bias[0]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.double(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss + vector.square().sum() / (2 * 0.5), vector)
    assert gradient.abs().max() < 1e-5


def test_a_class_without_rows_is_never_predicted_and_changes_nothing():
    x, y = data(classes=3)
    weight, bias = logistic_regression(x, y, 3, 1.0)
    skipped = torch.tensor([0, 2, 4])[y]
    wide, biases = logistic_regression(x, skipped, 5, 1.0)
    assert torch.equal(wide[[0, 2, 4]], weight) and torch.equal(biases[[0, 2, 4]], bias)
    assert not set((x @ wide.T + biases).argmax(1).tolist()) & {1, 3}


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("c", [10.0, 1.0, 1e-2])
def test_it_is_what_scikit_learn_finds(classes, c):
    linear = pytest.importorskip(
        "sklearn.linear_model", reason="scikit-learn is not installed (pip install scikit-learn)"
    )
    x, y = data(classes, rows=60, width=10)
    weight, bias = logistic_regression(x, y, classes, c, tolerance=1e-7)
    theirs = linear.LogisticRegression(C=c, solver="lbfgs", max_iter=10000, tol=1e-10).fit(x.numpy(), y.numpy())
    ours = torch.softmax(x @ weight.T + bias, 1)
    torch.testing.assert_close(ours, torch.from_numpy(theirs.predict_proba(x.numpy())), atol=1e-4, rtol=0)


def searched(score, halvings=8):
    asked = []

    def remember(c):
        asked.append(c)
        return score(c)

    return search_strength(remember, halvings), asked


def test_the_first_best_of_the_coarse_grid_is_the_peak_and_ties_keep_the_left_half():
    (best, score), asked = searched(lambda c: 0.5)
    assert asked[:7] == list(COARSE)
    assert score == 0.5 and best == pytest.approx(1e5)  # a tenth of 1e6, the first; its half is kept every time
    assert asked[7:9] == pytest.approx([1e5, 1e7])
    assert asked[9:] == pytest.approx([10 ** (5 + 2 / 2**k) for k in range(2, 8)])  # what was fitted is not again


def test_the_half_nearer_the_better_end_is_kept():
    target = 0.37  # log10 of the best strength; between 0.1 and 10 times of the coarse peak 1
    (best, _), asked = searched(lambda c: -abs(torch.log10(torch.tensor(c, dtype=torch.float64)).item() - target))
    left, right, want = -1.0, 1.0, None
    for _ in range(8):
        if abs(left - target) > abs(right - target):
            want, left = right, (left + right) / 2
        else:
            want, right = left, (left + right) / 2
    assert best == pytest.approx(10**want) and len(asked) == len(set(asked))
