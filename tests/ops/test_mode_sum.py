"""A linear map's output plus its mode update in one function equals the sum of both, forward and backward."""

import itertools

import pytest
import torch

from mmpeft_ds.ops import mode_product
from mmpeft_ds.ops.beside_linear import Linear
from mmpeft_ds.ops.middle_sum import plus_middle
from mmpeft_ds.ops.mode_middles import mode_middles

D, OUT, R = 6, 5, 3
PLAIN = {
    "attention": lambda *a, **k: mode_product.mode_delta(*a, **k).flatten(-2),
    "widen": mode_product.widening_delta,
    "narrow": mode_product.narrowing_delta,
}


def inputs(role, modes):
    generator = torch.Generator().manual_seed(modes)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    wide_in, wide_out = (modes * D, OUT) if role == "narrow" else (D, modes * OUT)
    return [drawn(2, 4, wide_out), drawn(2, 4, wide_in), drawn(R, D), drawn(OUT, R), drawn(R, R, R), drawn(R, modes)]


def plus_modes(onto, x, down, up, core, mode, *, role, dropout=0.0, drop_before_core=False):
    """What an Aurora leaf computes."""
    middle = mode_middles(core, [mode], [role])[0]
    return plus_middle(onto, x, down, middle, up, dropout=dropout, drop_before=drop_before_core)


def with_map(x, weight, bias, *rest, **options):
    """As `plus_modes` of the output of the map, which it computes itself."""
    return plus_modes(Linear(weight, bias), x, *rest, **options)


def outcome(form, given, **options):
    torch.manual_seed(7)  # of dropout
    result = form(*given, **options)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return [result, *torch.autograd.grad((result * weights).sum(), given)]


ROLES = [("attention", 1), ("attention", 3), ("widen", 4), ("narrow", 4)]
# Dropout before the core of several modes of attention is another thing: each mode has a mask of its own there.
CASES = [
    (role, modes, before, dropout)
    for (role, modes), before, dropout in itertools.product(ROLES, (True, False), (0.0, 0.4))
    if (role, modes, before) != ("attention", 3, True) or not dropout
]


@pytest.mark.parametrize(("role", "modes", "before", "dropout"), CASES)
def test_equals_the_sum(role, modes, before, dropout):
    given = inputs(role, modes)

    def plain(out, *rest):
        return out + PLAIN[role](*rest, dropout=dropout, drop_before_core=before)

    found = outcome(plus_modes, given, role=role, dropout=dropout, drop_before_core=before)
    for a, e in zip(found, outcome(plain, given), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_rows_that_lie_otherwise_in_memory_and_inputs_without_gradient():
    given = inputs("attention", 3)
    moved = given[1].detach().transpose(0, 1).contiguous().transpose(0, 1)
    same = plus_modes(given[0], moved, *given[2:], role="attention")
    assert torch.equal(same, plus_modes(*given, role="attention"))
    frozen = [given[0].detach(), moved, *given[2:]]
    gradients = torch.autograd.grad(plus_modes(*frozen, role="attention").sum(), given[2:])
    expected = torch.autograd.grad(plus_modes(*given, role="attention").sum(), given[2:])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("of_x", [True, False])
@pytest.mark.parametrize(("role", "modes"), ROLES)
def test_the_map_in_the_same_function_gives_the_same(role, modes, of_x):
    out, x, *rest = inputs(role, modes)
    generator = torch.Generator().manual_seed(5)
    weight, bias = (
        torch.randn(*s, generator=generator, dtype=x.dtype) for s in ((out.shape[-1], x.shape[-1]), (out.shape[-1],))
    )
    x.requires_grad_(of_x)
    results = []
    for form in (
        lambda: with_map(x, weight, bias, *rest, role=role),
        lambda: plus_modes(torch.nn.functional.linear(x, weight, bias), x, *rest, role=role),
    ):
        torch.manual_seed(7)
        result = form()
        wanted = [t for t in (x, *rest) if t.requires_grad]
        results.append([result, *torch.autograd.grad((result.sin() * 3).sum(), wanted)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    _, x, *rest = inputs("narrow", 2)
    weight = torch.randn(OUT, x.shape[-1], dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    assert torch.autograd.gradcheck(lambda *given: plus_modes(Linear(weight, None), *given, role="narrow"), (x, *rest))


def test_the_middles_of_many_maps_are_those_of_each_and_a_map_without_gradient_gets_none():
    core = torch.randn(R, R, R, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    modes = [inputs(role, count)[-1] for role, count in ROLES]
    roles = [role for role, _ in ROLES]
    together = mode_middles(core, modes, roles)
    alone = [mode_middles(core, [mode], [role])[0] for mode, role in zip(modes, roles, strict=True)]
    for a, e in zip(together, alone, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    found, expected = (
        torch.autograd.grad(sum((m[i] * (1 + i)).sin().sum() for i in (0, 2, 3)), [core, *modes], allow_unused=True)
        for m in (together, alone)
    )
    assert found[2] is None
    for a, e in zip(found, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_two_backward_passes_of_one_forward_reach_the_core_through_different_maps():
    core = torch.ones(R, R, R, dtype=torch.float64).requires_grad_()
    modes = [inputs("attention", 1)[-1], inputs("attention", 1)[-1]]
    one, other = mode_middles(core, modes, ["attention"] * 2)
    one.sum().backward()
    first = core.grad.clone()
    other.sum().backward()
    torch.testing.assert_close(core.grad, 2 * first)
