"""Saves in the background whose thread fails or hangs on one rank: all ranks learn of it, and of what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import launch
from tests.helpers.runs import endless

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.fault_in_a_save"


def train(folder: Path, rank: int, kind: str, **engine: object) -> launch.Result:
    """A run on two ranks that saves every hundred steps, with a fault on one of them."""
    recipe = endless.prepare(folder, save_in_background=True, save_every=100, **engine)
    result = launch.run_forked(SCRIPT, str(recipe), str(rank), kind, ranks=2, timeout=120)
    assert not result.killed and result.codes == [1, 1], result.tail()
    return result


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_ends_all_ranks_at_the_next_step_with_the_same_line(tmp_path, rank):
    result = train(tmp_path, rank, "fault")
    line = f"RuntimeError: rank {rank} failed: no checkpoint in the background: ValueError: no part"
    assert result.output.splitlines().count(line) == 2, result.tail()
    assert 100 <= endless.steps_of(tmp_path / "run")[-1] < 200, "before the next save"
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


@pytest.mark.slow
def test_a_disk_that_does_not_answer_is_named_at_the_next_save_and_ends_all_ranks(tmp_path):
    result = train(tmp_path, 0, "hangs", stall=2.0, timeout=5.0)
    assert "waiting since" in result.output and "for rank 0 on " in result.output, result.tail()
    assert "which is alive, at mmpeft_ds/engine/checkpoint.py:" in result.output, result.tail()
    assert endless.steps_of(tmp_path / "run")[-1] == 200, "the training goes on until then"
