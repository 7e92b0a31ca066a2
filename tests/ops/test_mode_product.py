"""Mode products against their definition, element by element; gates, context and frame weights beside them."""

import pytest
import torch

from mmpeft_ds.ops.context_enhancement import MODES, add_context, context_enhancement
from mmpeft_ds.ops.frame_weighting import frame_weights, weight_frame_keys
from mmpeft_ds.ops.gated_query import gated_query
from mmpeft_ds.ops.mode_product import (
    mode_delta,
    mode_slices,
    mode_weight,
    narrowing_delta,
    narrowing_weight,
    widening_delta,
    widening_weight,
)

R, D, OUT, C = 3, 4, 6, 4
PAIRS = [
    (mode_delta, mode_weight, D, OUT),
    (widening_delta, widening_weight, D, D),
    (narrowing_delta, narrowing_weight, C * D, D),
]


def draw(*shape, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(requires_grad)


def factors(out=OUT, modes=C, form="tucker", requires_grad=False):
    core = draw(R, R, R, seed=3) if form == "tucker" else draw(R, seed=3)
    given = [draw(R, D, seed=1), draw(out, R, seed=2), core, draw(R, modes, seed=4)]
    return [t.requires_grad_(requires_grad) for t in given]


def superdiagonal(values):
    core = torch.zeros(R, R, R, dtype=values.dtype)
    core[range(R), range(R), range(R)] = values
    return core


def test_a_slice_contracts_the_last_axis_of_the_core_with_a_mode():
    _, _, core, mode = factors()
    slices = mode_slices(core, mode)
    for k in range(C):
        for i in range(R):
            for j in range(R):
                want = sum(core[i, j, r] * mode[r, k] for r in range(R))
                torch.testing.assert_close(slices[k, i, j], want)


def test_a_delta_passes_down_slice_and_up():
    down, up, core, mode = factors()
    x = draw(2, 5, D)
    slices = mode_slices(core, mode)
    want = torch.stack([x @ down.T @ slices[k] @ up.T for k in range(C)], -2)
    torch.testing.assert_close(mode_delta(x, down, up, core, mode), want, rtol=0, atol=1e-12)


def by_loops(name, x, down, up, core, mode):
    """Both layouts of the feed-forward block with plain loops over columns."""
    slices, z = mode_slices(core, mode), torch.zeros(R, C * R, dtype=x.dtype)
    for j in range(R):
        for k in range(C):
            z[:, C * j + k] = slices[k][:, j]
    if name == "widen":
        t = x @ down.T @ z
        return torch.cat([t[..., a * R : (a + 1) * R] @ up.T for a in range(C)], -1)
    y = torch.cat([x[..., a * D : (a + 1) * D] @ down.T for a in range(C)], -1)
    return y @ z.T @ up.T


def test_the_layouts_of_the_feed_forward_block():
    given = factors(out=D)
    x, u = draw(2, 5, D), draw(2, 5, C * D)
    torch.testing.assert_close(widening_delta(x, *given), by_loops("widen", x, *given), rtol=0, atol=1e-12)
    torch.testing.assert_close(narrowing_delta(u, *given), by_loops("narrow", u, *given), rtol=0, atol=1e-12)
    # The tidy layout, in which chunk a uses slice a, is another function.
    tidy = mode_delta(x, *given).flatten(-2)
    assert (tidy - widening_delta(x, *given)).abs().max() > 0.1


@pytest.mark.parametrize("form", ["tucker", "cp"])
@pytest.mark.parametrize(("delta", "weight", "width", "out"), PAIRS)
def test_a_merged_weight_is_what_is_added_on_the_fly(delta, weight, width, out, form):
    given = factors(out=out, form=form)
    x = draw(2, 5, width)
    merged = weight(*given)
    want = torch.einsum("...d,kod->...ko", x, merged) if merged.dim() == 3 else x @ merged.T
    torch.testing.assert_close(delta(x, *given), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("delta", "weight", "width", "out"), PAIRS)
def test_the_cp_form_is_a_core_with_values_on_its_superdiagonal_alone(delta, weight, width, out):
    down, up, values, mode = factors(out=out, form="cp")
    x, full = draw(2, 5, width), superdiagonal(values)
    torch.testing.assert_close(delta(x, down, up, values, mode), delta(x, down, up, full, mode), rtol=0, atol=1e-12)
    torch.testing.assert_close(weight(down, up, values, mode), weight(down, up, full, mode), rtol=0, atol=1e-12)
    outer = sum(values[r] * mode[r, 0] * torch.outer(up[:, r], down[r]) for r in range(R))
    if delta is mode_delta:
        torch.testing.assert_close(mode_weight(down, up, values, mode)[0], outer, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["tucker", "cp"])
@pytest.mark.parametrize(("delta", "weight", "width", "out"), PAIRS)
def test_gradients_agree_with_finite_differences(delta, weight, width, out, form):
    given = factors(out=out, modes=2, form=form, requires_grad=True)
    x = draw(1, 2, width // C * 2 if delta is narrowing_delta else width, requires_grad=True)
    assert torch.autograd.gradcheck(delta, (x, *given))


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("form", ["tucker", "cp"])
def test_each_path_drops_by_a_mask_of_its_own_at_its_place(form, before):
    """`down` and `up` are the identity, so a dropped bottleneck shows in the output."""
    eye = torch.eye(R, dtype=torch.float64)
    core = superdiagonal(torch.ones(R, dtype=torch.float64)) if form == "tucker" else torch.ones(R).double()
    core = core + 0.5 * (form == "tucker") * draw(R, R, R).abs()
    mode = torch.ones(R, 2, dtype=torch.float64)
    ones = torch.ones(4000, R, dtype=torch.float64)
    torch.manual_seed(0)
    out = mode_delta(ones, eye, eye, core, mode, dropout=0.5, drop_before_core=before)
    whole = mode_delta(ones, eye, eye, core, mode)
    torch.testing.assert_close(out.mean(0), whole.mean(0), rtol=0.1, atol=0.0)
    zero = out[:, 0] == 0  # rows x R
    if form == "tucker":
        # After the core single outputs vanish; before it an output vanishes only with all its inputs.
        share = zero.double().mean().item()
        assert share == pytest.approx(0.5**R if before else 0.5, abs=0.03)
    both = ((out[:, 0] == 0) & (out[:, 1] == 0)).double().mean().item()
    each = [(out[:, k] == 0).double().mean().item() for k in range(2)]
    assert both == pytest.approx(each[0] * each[1], abs=0.03), "one mask for both paths"


@pytest.mark.parametrize("delta", [widening_delta, narrowing_delta])
@pytest.mark.parametrize("before", [False, True])
def test_the_feed_forward_paths_drop_too(delta, before):
    given = factors(out=D)
    x = draw(2, 5, D if delta is widening_delta else C * D)
    torch.manual_seed(0)
    dropped = delta(x, *given, dropout=0.5, drop_before_core=before)
    assert not torch.allclose(dropped, delta(x, *given))


@pytest.mark.parametrize(
    ("core", "mode"), [((R, R), (R, 1)), ((R, R, R + 1), (R, 1)), ((R + 1,), (R, 1)), ((R, R, R), (R,))]
)
def test_sizes_that_do_not_fit_are_refused(core, mode):
    with pytest.raises(ValueError, match="expected"):
        mode_slices(torch.zeros(core), torch.zeros(mode))


def test_gates_add_two_affine_terms():
    out, own, cross = (draw(2, 3, D, seed=s) for s in range(3))
    given = [draw(D, seed=s) for s in range(4, 8)]
    want = out + 0.1 * (own * given[0] + given[1]) + 0.1 * (cross * given[2] + given[3])
    torch.testing.assert_close(gated_query(out, own, cross, *given), want)
    zeros = [torch.zeros(D, dtype=torch.float64)] * 4
    assert torch.equal(gated_query(out, own, cross, *zeros), out)


def test_context_reaches_the_first_token_of_the_pairs_that_the_mode_names():
    positive, negative, text = draw(3, 5, D), draw(6, 5, D, seed=1), draw(3, 7, D, seed=2)
    context = 0.1 * text[:, 0].mean(0)
    for mode in MODES:
        got = context_enhancement(positive, negative, text, mode)
        for states, before, touched in zip(
            got, (positive, negative), (mode != "off", mode == "all_pairs"), strict=True
        ):
            assert torch.equal(states[:, 1:], before[:, 1:])
            torch.testing.assert_close(states[:, 0], before[:, 0] + context * touched)
    with pytest.raises(ValueError, match="unknown"):
        context_enhancement(positive, negative, text, "ofical")


def test_every_text_shares_the_gradient_of_the_context():
    fused, text = draw(3, 2, D, requires_grad=True), draw(3, 2, D, seed=1, requires_grad=True)
    before = fused.detach().clone()
    add_context(fused, text)[:, 0].sum().backward()
    assert torch.equal(fused.detach(), before), "the states are not written to"
    torch.testing.assert_close(text.grad[:, 0], torch.full((3, D), 0.1).double())
    assert not text.grad[:, 1:].any()


def test_frames_are_weighted_but_for_their_first_token_and_without_gradient():
    similarity = draw(2, 3, requires_grad=True)
    weights = frame_weights(similarity)
    assert not weights.requires_grad
    torch.testing.assert_close(weights.sum(1), torch.full((2,), 3.0).double())
    torch.testing.assert_close(weights, 3 * torch.softmax(similarity.detach() / 4, 1))
    keys = draw(2, 12, D, seed=5)
    got = weight_frame_keys(keys, weights).unflatten(1, (3, 4))
    before = keys.unflatten(1, (3, 4))
    assert torch.equal(got[:, :, 0], before[:, :, 0])
    torch.testing.assert_close(got[:, :, 1:], before[:, :, 1:] * weights[:, :, None, None])
    with pytest.raises(ValueError, match="frames"):
        weight_frame_keys(keys[:, :11], weights)
