"""Rows that are stored in half precision, and in which precision they are read."""

import pytest
import torch

from mmpeft_ds.ops.precision import ALONE, at_least_float32, widened


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (ALONE // 384, 384), (1000, 384), (3, ALONE + 1), (ALONE + 1, 1)])
def test_rows_in_pieces_are_those_at_once(dtype, shape):
    rows = torch.randn(shape).to(dtype)
    wide, expected = widened(rows), at_least_float32(rows)
    assert wide.dtype == expected.dtype and torch.equal(wide, expected)


def test_no_piece_is_so_long_that_torch_would_share_it(monkeypatch):
    sizes, copy = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda into, rows: (sizes.append(rows.numel()), copy(into, rows))[1])
    widened(torch.zeros(1024, 384, dtype=torch.float16))
    assert sum(sizes) == 1024 * 384 and max(sizes) <= ALONE and len(sizes) > 1
