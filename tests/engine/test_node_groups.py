"""Groups of ranks that keep a copy of the base on each machine."""

import pytest

from mmpeft_ds.engine.zero.node_groups import group_size
from mmpeft_ds.errors import BadInput


def machines(*counts: int) -> list[tuple[int, int]]:
    """Ranks laid out over machines with so many each, neighbours together."""
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    return [(first, count) for first, count in zip(firsts, counts, strict=True) for _ in range(count)]


@pytest.mark.parametrize(
    ("counts", "size"),
    [((4, 4), 4), ((8, 8, 8), 8), ((8, 4), 4), ((2, 2), 2), ((1, 1, 1), 1), ((8,), 1), ((1,), 1), ((8, 3), 1)],
)
def test_auto_is_what_all_machines_have(counts, size):
    assert group_size("auto", machines(*counts)) == size


def test_a_number_within_a_machine_is_taken_as_it_is():
    assert group_size(2, machines(4, 4)) == 2
    assert group_size(1, machines(4, 4)) == 1
    assert group_size(8, machines(4)) == 1, "all ranks share a machine: the copy would be the base"


@pytest.mark.parametrize("counts", [(4, 4, 4, 4), (8, 4, 4)])
def test_a_group_over_two_machines_is_refused(counts):
    with pytest.raises(BadInput, match="rank 0 is on a machine with ranks 0 to 3|rank 8 is on a machine with ranks 8"):
        group_size(8, machines(*counts))


def test_ranks_that_are_left_over_are_refused():
    with pytest.raises(BadInput, match="4 does not divide the 6 ranks"):
        group_size(4, machines(6, 0))


def test_ranks_of_a_machine_that_are_no_neighbours_are_refused():
    # Slurm's cyclic distribution: ranks 0 and 2 are 0 and 1 of one machine, 1 and 3 of the other.
    scattered = [(rank - local, 2) for rank, local in enumerate((0, 0, 1, 1))]
    with pytest.raises(BadInput, match="--distribution=block"):
        group_size(2, scattered)
