"""A link that is cut in training ends every rank, each of which names the other, and the same command continues."""

from __future__ import annotations

import pytest

from tests.helpers import hosts
from tests.helpers.runs import endless
from tests.helpers.runs.endless import reach, steps_of

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing() or "-"),
]
STALL, TIMEOUT = 8, 24  # seconds


def test_a_cut_link_ends_both_hosts_and_the_same_command_continues_when_it_is_mended(tmp_path):
    recipe = endless.prepare(tmp_path, deepspeed="ds_configs/zero3_nodes.json", stall=STALL, timeout=TIMEOUT)
    run = recipe.parent / "run"
    with hosts.Hosts(2) as two:
        command = hosts.launchers(two, [1, 1], ["launchers/train.py", "--recipe", str(recipe)])["srun"]
        started = [two.start(host, *words, env=env) for host, words, env in command]
        reach(run, 12, lambda: all(process.poll() is None for process in started))
        two.cut(two[1])
        ended = two.wait(started, TIMEOUT + 120)
        assert not ended.killed and list(ended.codes) == [1, 1], ended.tail()
        for rank, other in ((0, "rank 1 on hostb"), (1, "rank 0 on hosta")):
            lines = [line for line in ended.output.splitlines() if line.startswith(f"rank {rank} on host")]
            assert f"for {other}" in lines[0] and "waiting since" in lines[0], ended.tail()
            assert "leaving" in lines[-1] and f"for {other}" in lines[-1], ended.tail()
        assert "Traceback" not in ended.output, ended.tail()
        last = max(steps_of(run))
        two.heal(two[1])
        again = [two.start(host, *words, env=env) for host, words, env in command]
        reach(run, last + 5, lambda: all(process.poll() is None for process in again))
        output = two.output()
    assert "RUN: continues after step" in output.replace(str(run), "RUN")
    steps = steps_of(run)
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or done twice"
