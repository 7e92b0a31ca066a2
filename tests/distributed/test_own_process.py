"""Pages of mapped weights leave a process once they have been read, and what it has changed stays."""

import pytest
import torch

from mmpeft_ds.distributed import own_process

MIB = 2**20


@pytest.fixture
def mapped(tmp_path):
    """A tensor of 32 MiB that is mapped from a file, and its values."""
    values = torch.arange(8 * MIB, dtype=torch.int32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(values.numpy().tobytes())
    return torch.from_file(str(path), shared=False, size=8 * MIB, dtype=torch.int32), values


def test_pages_that_were_read_leave_the_process_and_come_back_with_the_same_values(mapped):
    weight, values = mapped
    assert torch.equal(weight, values)
    before = own_process.Memory().resident()
    assert own_process.give_back_mapped(".safetensors") >= 32 * MIB
    assert before - own_process.Memory().resident() > 24 * MIB
    assert torch.equal(weight, values)


def test_a_mapping_that_was_changed_keeps_its_changes(mapped):
    weight, values = mapped
    weight[5] = -1
    assert own_process.give_back_mapped(".safetensors") == 0
    assert weight[5] == -1 and torch.equal(weight[6:], values[6:])


@pytest.mark.parametrize(("anonymous", "swapped", "given"), [(0, 0, True), (4, 0, False), (0, 4, False)])
def test_a_page_that_was_changed_and_swapped_out_is_a_changed_one(anonymous, swapped, given):
    """It is no page in memory, yet to give the mapping back would lose it."""
    smaps = f"""7f10-7f20 rw-p 00000000 00:31 77 /models/a b/model.safetensors
Rss:                   8 kB
Anonymous:        {anonymous:>6} kB
Swap:             {swapped:>6} kB
VmFlags: rd wr
7f30-7f40 r--p 00000000 00:31 78 /usr/lib/libc.so
Anonymous:             0 kB
Swap:                  0 kB"""
    found = list(own_process._unchanged(smaps.splitlines(), ".safetensors"))
    assert found == ([(0x7F10, 0x7F20)] if given else [])


def test_other_files_are_left_alone(mapped):
    weight, values = mapped
    assert torch.equal(weight, values)
    assert own_process.give_back_mapped(".no-such-file") == 0
