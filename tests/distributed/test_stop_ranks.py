"""Whoever gets the signal, all ranks stop after the same step; real launcher, three launches at once.

That the launcher alone gets it is in test_resume_e2e.py, where a run is trained, stopped and continued.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

import pytest

from tests.helpers import launch
from tests.helpers.launch import Launch

pytestmark = [pytest.mark.distributed, pytest.mark.alone]
SCRIPT = "tests.helpers.rank_scripts.stop"
LIMIT = 90.0  # seconds; ranks whose stop hangs end themselves after 20, and `deepspeed` kills its own after 30


def to_inner_launcher(launched: Launch) -> None:
    """SIGTERM to `launch.py`, the parent of the ranks."""
    launched.ranks()[0].parent().send_signal(signal.SIGTERM)


CASES: dict[str, Callable[[Launch], None]] = {
    "the parent of the ranks": to_inner_launcher,
    "one rank": lambda launched: launched.ranks()[1].send_signal(signal.SIGTERM),
    "the group by Ctrl-C": lambda launched: os.killpg(launched.session, signal.SIGINT),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[launch.Result, list[str]]]:
    """Per case: how the launch ended, and what each rank wrote when it left."""
    with contextlib.ExitStack() as stack:
        launches = {}
        for case in CASES:
            folder = tmp_path_factory.mktemp("stop")
            launches[case] = folder, stack.enter_context(Launch(SCRIPT, str(folder), ranks=2))
        for case, (_, launched) in launches.items():
            for rank in (0, 1):
                assert launched.wait_for(f"rank {rank} ready", 90), f"{case}: {launched.output}"
            CASES[case](launched)
        ended = {case: launched.wait(LIMIT) for case, (_, launched) in launches.items()}
    return {
        case: (ended[case], [p.read_text() for p in sorted(folder.iterdir())])
        for case, (folder, _) in launches.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_a_signal_to_any_of_them_ends_all_ranks_after_the_same_step(outcomes, case):
    result, wrote = outcomes[case]
    assert not result.killed, result.tail()
    assert len(wrote) == 2, result.tail()
    assert wrote[0].split()[0] == wrote[1].split()[0]


def test_the_reason_is_known(outcomes):
    assert "SIGTERM" in outcomes["one rank"][1][1]


def test_ranks_that_left_well_end_the_launcher_well(outcomes):
    assert outcomes["one rank"][0].code == 0
