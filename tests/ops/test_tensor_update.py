"""Slices of one tensor against the tensor itself, written out."""

import pytest
import torch

from mmpeft_ds.ops.tensor_update import cp_delta, tucker_delta, tucker_slice

SIZES = (6, 4, 3, 2, 5)  # input, output of a head, heads, projections, layers
RANKS = (2, 3, 2, 2, 4)


def factors(ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, r, generator=generator, dtype=torch.float64) for n, r in zip(SIZES, ranks, strict=True)]


def x():
    return torch.randn(7, SIZES[0], generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_a_tucker_slice_adds_what_the_whole_tensor_would_with_its_gradients():
    core = torch.randn(RANKS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    given = [core, *factors(RANKS)]
    outs = []
    for short in (False, True):
        core, down, up, heads, kinds, layers = leaves = [t.clone().requires_grad_() for t in given]
        if short:
            out = tucker_delta(x(), down, up, tucker_slice(core, [kinds[1], layers[4]]), heads)
        else:
            tensor = torch.einsum("abcde,xa,ob,hc,pd,le->xhopl", *leaves)
            out = torch.einsum("nx,xho->nho", x(), tensor[..., 1, 4]).flatten(1)
        out.square().sum().backward()
        outs.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*outs, strict=True))


def test_without_a_mode_of_heads_the_output_is_one_mode():
    core = torch.randn(2, 3, 4, dtype=torch.float64)
    down, up, layers = torch.randn(6, 2).double(), torch.randn(4, 3).double(), torch.randn(5, 4).double()
    tensor = torch.einsum("abe,xa,ob,le->xol", core, down, up, layers)
    assert torch.allclose(tucker_delta(x(), down, up, tucker_slice(core, [layers[2]])), x() @ tensor[..., 2])


@pytest.mark.parametrize("with_heads", [True, False])
def test_a_cp_slice_adds_what_the_sum_of_outer_products_would(with_heads):
    down, up, heads, kinds, layers = factors((3,) * 5)
    if not with_heads:
        heads = heads[:1] * 0 + 1
    tensor = torch.einsum("xr,or,hr,pr,lr->xhopl", down, up, heads, kinds, layers)
    wanted = torch.einsum("nx,xho->nho", x(), tensor[..., 0, 3]).flatten(1)
    assert torch.allclose(cp_delta(x(), down, up, [kinds[0], layers[3]], heads if with_heads else None), wanted)


def test_rows_that_do_not_fit_the_core_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        tucker_slice(torch.zeros(2, 3, 4), [torch.zeros(3)])
    with pytest.raises(ValueError, match="do not fit"):
        tucker_slice(torch.zeros(2, 3), [torch.zeros(3)])
