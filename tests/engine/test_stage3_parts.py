"""Where this rank's part of a gathered frozen parameter lies: in the whole one, if it is all of a part of it."""

import types

import pytest
import torch

from mmpeft_ds.engine.zero import stage3

WHOLE = torch.arange(12.0).view(3, 4)


def gathered(size: int, rank: int, monkeypatch, **changes) -> types.SimpleNamespace:
    """A parameter as DeepSpeed leaves it after a gather, with its own copy of the rank's part."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: rank)
    part = torch.zeros(size)
    own = WHOLE.reshape(-1)[rank * size : (rank + 1) * size]
    part[: len(own)] = own
    part.ds_numel = size
    fields = {"data": WHOLE.clone(), "ds_tensor": part, "ds_process_group": None, "ds_secondary_tensor": None}
    return types.SimpleNamespace(**fields | changes)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_lies_in_the_whole_and_keeps_its_values(monkeypatch, rank):
    parameter = gathered(6, rank, monkeypatch)
    before = parameter.ds_tensor.clone()
    stage3.part_within_whole(parameter)
    assert torch.equal(parameter.ds_tensor, before) and parameter.ds_tensor.ds_numel == 6
    assert parameter.ds_tensor.data_ptr() == parameter.data.view(-1)[6 * rank :].data_ptr()
    kept = parameter.ds_tensor
    parameter.data = torch.empty(0)  # DeepSpeed lets the whole one go
    assert torch.equal(kept, before)


def test_a_part_with_padding_at_its_end_is_left_as_it_is(monkeypatch):
    for size, rank in ((5, 2), (7, 1)):
        parameter = gathered(size, rank, monkeypatch)
        where = parameter.ds_tensor.data_ptr()
        stage3.part_within_whole(parameter)
        assert parameter.ds_tensor.data_ptr() == where


@pytest.mark.parametrize(
    "changes", [{"ds_secondary_tensor": torch.zeros(6)}, {"data": WHOLE.double()}, {"data": WHOLE.T.contiguous().T}]
)
def test_a_second_copy_another_type_or_order_is_left_as_it_is(monkeypatch, changes):
    parameter = gathered(6, 1, monkeypatch, **changes)
    where = parameter.ds_tensor.data_ptr()
    stage3.part_within_whole(parameter)
    assert parameter.ds_tensor.data_ptr() == where
