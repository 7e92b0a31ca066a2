"""Checkpoints written in the background by real ranks: the bytes of the foreground, whatever is trained meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import launch
from tests.helpers.rank_scripts.background_save import CASES

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.background_save"


def run(folder: Path, mode: str, ranks: int) -> list[dict]:
    result = launch.run_forked(SCRIPT, str(folder), mode, ranks=ranks, timeout=300)
    assert result.code == 0 and not result.killed, result.tail()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module", params=[1, 2])
def written(request, tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp(f"ranks{request.param}"), "bytes", request.param)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_files_are_those_of_the_foreground_though_the_next_steps_are_done(written, name):
    for turn in ("first", "again"):
        case = written[name][turn]
        assert case["same"] == case["files"] and len(case["files"]) == 6 and case["damage"] is None


@pytest.mark.parametrize("name", CASES)
def test_without_copies_the_files_would_hold_later_numbers(written, name):
    """Negative control for the test above."""
    case = written[name]["live"]
    assert not {"weights.safetensors", "optimizer.safetensors"} & set(case["same"])


def test_every_rank_is_told_that_rank_0_could_not_write_and_the_next_save_succeeds(tmp_path):
    one, other = run(tmp_path, "full", 2)
    assert one == other and one["failed"] and not one["then"] and one["name"] == "step-00000001"
    assert len(one["told"]) == 1 and "cannot be written (No space left on device)" in one["told"][0]


def test_a_rank_that_dies_before_it_has_sent_its_part_is_named_and_the_checkpoint_before_stays(tmp_path):
    result = launch.run_forked(SCRIPT, str(tmp_path), "dies", ranks=2, timeout=120)
    assert not result.killed and result.codes[0] == 1, result.tail()
    assert "rank 0: lost its connection to rank 1 on " in result.output and "whose process has ended" in result.output
    assert "Traceback" not in result.output, result.tail()
    folder = tmp_path / "checkpoints"
    assert (folder / "latest").read_text() == "step-00000001\n" and not (folder / "step-00000002").exists()
