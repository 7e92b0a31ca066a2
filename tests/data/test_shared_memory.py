"""Buffers of shared memory in which a worker lends tensors, sender and receiver in one process."""

import os
import resource

import pytest
import torch

from mmpeft_ds.data import shared_memory
from mmpeft_ds.data.shared_memory import Sender, received

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux alone has files without a name")


@pytest.fixture
def sender():
    yield Sender(os.getpid())
    shared_memory.forget(os.getpid())


def numbers(count: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + count).view(-1, 2)


def test_a_tensor_arrives_as_it_was_and_may_be_written_to(sender):
    for sent in (numbers(1000), torch.randn(3, 5, 7).bfloat16(), torch.rand(9) > 0.5):
        got = received(*sender.lend(sent))
        assert torch.equal(got, sent) and got.dtype == sent.dtype
        got.zero_()
        assert not torch.equal(got, sent)


def test_a_buffer_is_used_again_only_when_no_view_of_its_tensor_is_left(sender):
    first = sender.lend(numbers(1000))
    row = received(*first)[3]  # the tensor itself is gone
    second = sender.lend(numbers(1000, 5000))
    kept = received(*second)
    assert second[0] != first[0]
    assert row.tolist() == [6, 7] and torch.equal(kept, numbers(1000, 5000))
    del row
    third = sender.lend(numbers(1000, 9000))
    assert third[0] == first[0]
    assert torch.equal(received(*third), numbers(1000, 9000)) and torch.equal(kept, numbers(1000, 5000))


def test_a_larger_tensor_takes_the_place_of_a_free_smaller_one_on_both_sides(sender):
    small = sender.lend(numbers(1000))
    received(*small)
    large = sender.lend(numbers(50_000))
    assert large[1] == [small[0]]
    assert torch.equal(received(*large), numbers(50_000))
    assert [handle for handle in shared_memory._RECEIVED if handle[0] == os.getpid()] == [large[0]]
    assert sender.lend(numbers(1000))[0] == large[0], "room for more is room enough"


def test_a_sender_whose_buffers_are_all_in_use_makes_no_more_until_one_is_free(sender, monkeypatch):
    monkeypatch.setattr(sender, "_most", 3)
    kept = [received(*sender.lend(numbers(1000, first))) for first in range(3)]
    assert sender.lend(numbers(1000)) is None
    del kept[1]
    assert torch.equal(received(*sender.lend(numbers(90_000))), numbers(90_000)), "in the place of a smaller one"
    assert torch.equal(kept[0], numbers(1000)) and torch.equal(kept[1], numbers(1000, 2))


@pytest.mark.parametrize(("files", "buffers"), [(40, 2), (1024, 64), (2**20, 64), (resource.RLIM_INFINITY, 64)])
def test_buffers_take_a_small_part_of_the_files_that_may_be_open(monkeypatch, files, buffers):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    sender = Sender(os.getpid())
    lent = [sender.lend(numbers(10)) for _ in range(70)]
    assert sum(one is not None for one in lent) == buffers
    for handle, *_ in filter(None, lent):
        os.close(handle[1])


def test_a_child_of_the_receiver_gives_nothing_back(sender):
    lent = sender.lend(numbers(1000))
    got = received(*lent)
    if not (child := os.fork()):
        del got
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert sender.lend(numbers(1000, 5000))[0] != lent[0]
    assert torch.equal(got, numbers(1000))


def test_a_tensor_of_a_process_that_has_ended_is_named_as_the_loader_does():
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(RuntimeError, match=rf"^DataLoader worker \(pid {child}\) ended"):
        received((child, 5, 1), [], torch.int64, torch.Size([1000]))


def test_nothing_is_lent_where_there_is_no_memory_or_no_way_to_it(sender, monkeypatch):
    assert Sender(2**30).lend(numbers(1000)) is None  # no such process

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    files = len(os.listdir("/proc/self/fd"))
    assert sender.lend(numbers(1000)) is None
    assert len(os.listdir("/proc/self/fd")) == files
