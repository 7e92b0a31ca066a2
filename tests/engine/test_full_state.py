"""Tensors that rank 0 reads, sent a few at a time."""

import torch

from mmpeft_ds.engine.zero import full_state

SHAPES = {"a": (3,), "b": (2, 2), "c": (), "empty": (0, 4), "d": (5, 2)}


def values(name: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    return [torch.randn(SHAPES[name], generator=generator) for _ in range(2)]


def sent(bucket: int) -> list[dict[str, torch.Tensor]]:
    return list(full_state.from_rank0(SHAPES, values, dict.fromkeys(SHAPES, 2), torch.device("cpu"), bucket))


def test_each_name_comes_once_in_order_with_what_was_read_whatever_goes_together():
    for bucket in (4, 60, 1 << 20):
        found = {name: tensors for part in sent(bucket) for name, tensors in part.items()}
        assert list(found) == list(SHAPES)
        for name, tensors in found.items():
            assert torch.equal(tensors, torch.stack(values(name)))


def test_no_more_is_sent_together_than_was_allowed_unless_one_name_has_more():
    assert len(sent(1 << 20)) == 1
    for part in sent(4 * 16):
        assert len(part) == 1 or sum(t.numel() for t in part.values()) <= 16
    assert [list(part) for part in sent(4 * 16)] == [["a", "b", "c", "empty"], ["d"]]


def test_nothing_to_send_sends_nothing():
    assert list(full_state.from_rank0({}, values, {}, torch.device("cpu"))) == []
