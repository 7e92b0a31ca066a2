"""Cosines, strict thresholds, and who decides which pair."""

import pytest
import torch

from mmpeft_ds.ops import bits as packed
from mmpeft_ds.ops.similarity_graph import (
    Rows,
    above,
    cosines,
    decide_pairs,
    exact_float32,
    margin,
    products,
    sums_by_halves,
    symmetric_degrees,
    symmetric_edges,
    unit_parts,
    unit_rows,
)


def features(rows, width=6, seed=0, dtype=torch.float64):
    return torch.randn(rows, width, dtype=dtype, generator=torch.Generator().manual_seed(seed)) + 0.4


def near_tau(rows, tau, width=64):
    """Unit float32 rows whose cosine with the first axis is within 1e-7 of `tau`."""
    x = torch.zeros(rows + 1, width, dtype=torch.float64)
    x[0, 0] = 1
    offsets = torch.linspace(-1e-7, 1e-7, rows, dtype=torch.float64)
    side = torch.nn.functional.normalize(features(rows, width - 1), dim=1)
    x[1:, 0] = tau + offsets
    x[1:, 1:] = side * (1 - x[1:, :1] ** 2).sqrt()
    return x


def whole_matrix(x, tau, splits, chunk=None):
    """Bits of all ranks, one below the other."""
    rows = Rows.of(x)
    out, start = [], 0
    for size in splits:
        bits = torch.zeros(size, max(1, -(-len(x) // 8)), dtype=torch.uint8)
        decide_pairs(rows[start : start + size], rows, len(x), tau, bits, chunk)
        out.append(bits)
        start += size
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cosine_equal_to_tau_makes_no_edge(dtype):
    rows = Rows.of(torch.tensor([[3.0, 4.0], [5.0, 0.0], [-6.0, -8.0]], dtype=dtype))
    below = torch.nextafter(torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)).item()
    assert not above(rows[:1], rows[1:2], 0.6).item()
    assert above(rows[:1], rows[1:2], below).item()
    assert not above(rows[:1], rows[:1], 1.0).item()
    assert not above(rows[:1], rows[2:], -1.0).item()


def test_equal_rows_have_cosine_one_to_the_bit():
    x = features(50, 33, dtype=torch.float32) * 3.7
    assert (cosines(x, x.clone()) == 1).all()


def test_the_cosine_of_a_pair_has_the_same_bits_wherever_it_stands():
    a, b = features(300, 37, 1), features(300, 37, 2)
    order = torch.randperm(300)
    assert torch.equal(cosines(a, b)[order], cosines(a[order], b[order]))
    assert torch.equal(cosines(a, b), cosines(b, a))
    assert torch.equal(cosines(a, b)[:1], cosines(a[:1], b[:1]))


@pytest.mark.parametrize("width", [0, 1, 2, 3, 37, 1536, 8193])
def test_sums_by_halves_have_the_same_bits_for_a_row_alone_and_are_the_sums(width):
    x = features(20, width, seed=5).double()
    sums = sums_by_halves(x)
    torch.testing.assert_close(sums, x.sum(1), rtol=0, atol=1e-10)
    assert all(torch.equal(sums_by_halves(x[i : i + 1]), sums[i : i + 1]) for i in range(20))


def test_a_cosine_of_wide_rows_is_that_of_the_pair_alone_with_several_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for width in (33_000, 70_001):
            a, b = features(6, width, seed=3), features(6, width, seed=4)
            together = cosines(a, b)
            assert all(torch.equal(cosines(a[i : i + 1], b[i : i + 1]), together[i : i + 1]) for i in range(6))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_planted_at_tau_are_decided_alike_in_tiles_of_any_shape(dtype):
    tau = 0.7
    rows = Rows.of(near_tau(200, tau).to(dtype))
    whole = above(rows, rows, tau)
    assert torch.equal(whole, whole.T)
    for size in (1, 7, 64):
        tiles = [above(rows[i : i + size], rows, tau) for i in range(0, len(rows), size)]
        assert torch.equal(torch.cat(tiles), whole)
    some = whole[0, 1:].sum()
    assert 0 < some < 200, "the plant must stand on both sides"
    assert ((products(rows, rows)[0, 1:] - tau).abs() < margin(rows)).all() or dtype == torch.float64


def test_a_product_in_float32_alone_would_decide_some_of_them_wrongly():
    """Negative control of the test above."""
    rows = Rows.of(near_tau(200, 0.7).float())
    assert not torch.equal(products(rows, rows) > 0.7, above(rows, rows, 0.7))


@pytest.mark.parametrize("total", range(1, 12))
@pytest.mark.parametrize("chunk", [None, 2, 8])
def test_every_pair_is_decided_once_by_one_of_any_ranks(total, chunk):
    x = features(total)
    for splits in ([total], [total // 2, total - total // 2], [1] * total, [0, total, 0]):
        mask = packed.unpack(whole_matrix(x, -1.0, splits, chunk))[:, :total].int()
        assert torch.equal(mask + mask.T, 1 - torch.eye(total, dtype=torch.int32)), splits


@pytest.mark.parametrize("chunk", [None, 32, 500])
def test_edges_and_degrees_are_those_of_the_dense_matrix(chunk):
    x, tau = features(61), 0.5
    unit = torch.nn.functional.normalize(x, dim=1)
    A = ((unit @ unit.T) > tau).fill_diagonal_(True)
    bits = whole_matrix(x, tau, [20, 0, 41], chunk)
    target, source = A[13:50].nonzero(as_tuple=True)
    got_source, got_target = symmetric_edges(bits, slice(13, 50), chunk)
    assert torch.equal(got_source, source) and torch.equal(got_target, target + 13)
    assert torch.equal(symmetric_degrees(bits), A.sum(1))


def test_rows_of_zeros_and_rows_that_are_not_finite_have_cosine_zero():
    x = features(4, 3, dtype=torch.float32)
    x[1], x[2, 0] = 0, float("nan")
    assert unit_rows(x)[1:3].abs().sum() == 0 and torch.isfinite(unit_rows(x)).all()
    assert (cosines(x, x) == torch.tensor([1.0, 0.0, 0.0, 1.0])).all()


def test_each_modality_counts_alike():
    image, text = features(5, 4, 1) * 100, features(5, 3, 2)
    both = unit_parts([image, text])
    want = (cosines(image[:1], image[1:2]) + cosines(text[:1], text[1:2])) / 2
    torch.testing.assert_close(cosines(both[:1], both[1:2]), want, atol=1e-15, rtol=0)
    assert (cosines(torch.cat([image, text], 1)[:1], torch.cat([image, text], 1)[1:2]) - want).abs() > 1e-3


def test_half_precision_is_compared_in_float32():
    x = features(9).bfloat16()
    assert unit_rows(x).dtype == torch.float32 and unit_rows(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert products(Rows.of(x), Rows.of(x)).dtype == torch.float32


def test_reduced_precision_of_products_is_off_inside_and_back_afterwards():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(KeyError):
            with exact_float32():
                assert matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
                raise KeyError
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
