"""Routing functions: closed forms, gradients, causality, and what they refuse."""

import pytest
import torch

from mmpeft_ds.ops.route import MIXES_TOKENS, ROUTES, pool_condition, route

B, L, R = 2, 5, 4
ROUTED = [k for k in ROUTES if k != "none"]


def draw(*shape, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def matmul_form(kind, h, v):
    """The equations written out with full matrices."""
    over_text = v.expand(-1, h.shape[1], -1) if v.shape[1] == 1 else v
    return {
        "none": lambda: h,
        "mul": lambda: h * over_text,
        "add": lambda: h + over_text,
        "matmul1": lambda: torch.einsum("blr,bmr,bms->bls", h, v, v),
        "matmul2": lambda: torch.bmm(h, v.expand(-1, h.shape[2], -1)),
        "matmul1_relu": lambda: torch.einsum("blr,bmr,bms->bls", h.relu(), v.relu(), v),
        "xtxt": lambda: torch.einsum("blr,bkr,bks->bls", h, h, over_text),
        "ones": lambda: torch.einsum("blr,bmr,bms->bls", h, v, torch.ones_like(v)),
    }[kind]()


@pytest.mark.parametrize("kind", ROUTES)
def test_pooled_closed_form_equals_matmul_form(kind):
    h, v = draw(B, L, R), draw(B, 1, R, seed=1)
    torch.testing.assert_close(route(kind, h, v), matmul_form(kind, h, v), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["matmul1", "matmul1_relu", "ones"])
@pytest.mark.parametrize("m", [2, 7])
def test_many_tokens_use_the_true_transpose(kind, m):
    h, v = draw(B, L, R), draw(B, m, R, seed=1)
    torch.testing.assert_close(route(kind, h, v), matmul_form(kind, h, v), rtol=0, atol=1e-13)
    reread = route(kind, h, v, reshape_compat=True)
    assert (reread - route(kind, h, v)).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["mul", "add", "xtxt"])
def test_one_condition_token_per_text_token(kind):
    h, v = draw(B, L, R), draw(B, L, R, seed=1)
    torch.testing.assert_close(route(kind, h, v), matmul_form(kind, h, v), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("compat", [False, True])
def test_gradients_agree_with_finite_differences(kind, compat):
    h, v = draw(B, 3, R, requires_grad=True), draw(B, 1, R, seed=1, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: route(kind, a, b, reshape_compat=compat), (h, v))


@pytest.mark.parametrize("kind", ROUTES)
def test_only_xtxt_lets_a_later_token_change_an_earlier_one(kind):
    h, v = draw(B, L, R), draw(B, 1, R, seed=1)
    later = h.clone()
    later[:, 3:] += 1.0
    leaks = not torch.equal(route(kind, h, v)[:, :3], route(kind, later, v)[:, :3])
    assert leaks == (kind in MIXES_TOKENS)


@pytest.mark.parametrize("kind", ROUTED)
def test_half_precision_is_computed_in_float32(kind):
    h, v = draw(B, L, R).bfloat16(), draw(B, 1, R, seed=1).bfloat16()
    out = route(kind, h, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, route(kind, h.float(), v.float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "v", "says"),
    [
        ("mul", (B, 3, R), "1 or 5"),
        ("add", (B, 3, R), "1 or 5"),
        ("xtxt", (B, 3, R), "1 or 5"),
        ("matmul2", (B, 3, R), "1 or 4"),
        ("mul", (B + 1, 1, R), "batch or width"),
        ("matmul1", (B, 1, R + 1), "batch or width"),
        ("matmul1", (B, R), "takes"),
        ("mull", (B, 1, R), "unknown route"),
    ],
)
def test_refuses_shapes_that_the_route_cannot_take(kind, v, says):
    with pytest.raises(ValueError, match=says):
        route(kind, draw(B, L, R), draw(*v))


def test_a_route_needs_a_condition_and_none_ignores_it():
    h = draw(B, L, R)
    assert route("none", h, None) is h
    with pytest.raises(ValueError, match="needs a condition"):
        route("mul", h, None)


def test_pooling_drops_masked_tokens_even_if_they_are_not_finite():
    y, mask = draw(2, 3, 4), torch.tensor([[1, 0, 1], [0, 0, 0]])
    y[0, 1] = torch.nan
    y[1, 0] = torch.inf
    pooled = pool_condition(y, mask)
    torch.testing.assert_close(pooled[0, 0], (y[0, 0] + y[0, 2]) / 2)
    assert torch.equal(pooled[1], torch.ones(1, 4, dtype=y.dtype)), "a row without tokens is 1"


def test_pooling_modes_and_their_errors():
    y = draw(2, 3, 4)
    assert pool_condition(y, how="all") is y
    assert torch.equal(pool_condition(y, how="first"), y[:, :1])
    torch.testing.assert_close(pool_condition(y), y.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="unknown pooling"):
        pool_condition(y, how="max")
    with pytest.raises(ValueError, match="mask of shape"):
        pool_condition(y, torch.ones(2, 4))
