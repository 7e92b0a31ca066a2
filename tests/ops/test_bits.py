"""Packed boolean matrices."""

import pytest
import torch

from mmpeft_ds.ops import bits

SHAPES = [(3, 5), (17, 64), (600, 129), (1, 1), (0, 7)]


def mask_of(rows, columns):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) > 0.4


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_a_mask_comes_back_and_takes_an_eighth(rows, columns):
    mask = mask_of(rows, columns)
    packed = bits.pack(mask)
    assert packed.shape == (rows, -(-columns // 8)) and packed.dtype == torch.uint8
    assert torch.equal(bits.unpack(packed)[:, :columns], mask)
    assert not bits.unpack(packed)[:, columns:].any()


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_rows_and_columns_are_counted(rows, columns):
    mask = mask_of(rows, columns)
    packed = bits.pack(mask)
    assert torch.equal(bits.row_counts(packed), mask.sum(1))
    assert torch.equal(bits.column_counts(packed)[:columns], mask.sum(0))


@pytest.mark.parametrize("full", [7, 64, 256, 2000])
def test_counts_of_full_matrices_do_not_overflow(full):
    packed = bits.pack(torch.ones(full, full, dtype=torch.bool))
    assert (bits.row_counts(packed) == full).all() and (bits.column_counts(packed)[:full] == full).all()


@pytest.mark.parametrize("column", [0, 3, 8, 21])
def test_bits_are_set_anywhere_beside_those_that_are_set(column):
    whole = torch.zeros(4, 40, dtype=torch.bool)
    whole[:, ::7] = True
    packed, mask = bits.pack(whole), mask_of(4, 11)
    bits.set_bits(packed, column, mask)
    whole[:, column : column + 11] |= mask
    assert torch.equal(bits.unpack(packed), whole)
