"""A rank that is stopped or stuck is named by those that wait for it, which go on when it does, or leave in time."""

from __future__ import annotations

import re
import threading

import psutil
import pytest

from tests.helpers import ROOT, launch, rank_server
from tests.helpers.runs import endless

pytestmark = [pytest.mark.distributed, pytest.mark.alone]
TRAIN = ROOT / "launchers" / "train.py"
STALL, TIMEOUT = 6, 20  # seconds
LIMIT = 240.0


def start(folder, *sets: str) -> launch.Launch:
    recipe = endless.prepare(folder, stall=STALL, timeout=TIMEOUT)
    words = [word for s in sets for word in ("--set", s)]
    return launch.Launch(TRAIN, "--recipe", str(recipe), *words, ranks=2)


def test_a_stopped_rank_is_named_and_goes_on_when_it_is_woken_and_ends_all_when_it_is_not(tmp_path):
    run = tmp_path / "run"
    with start(tmp_path) as launched:
        endless.reach(run, 3, lambda: bool(launched.members()), LIMIT)
        rank_1 = launched.ranks()[1]
        rank_1.suspend()
        assert launched.wait_for("waiting since", LIMIT), launched.output
        named = (
            rf"rank 0 on \S+: waiting since \S+ \(\d+ s\) at mmpeft_ds/\S+ \w+ for rank 1 on \S+ \(pid {rank_1.pid}\)"
        )
        assert re.search(named + ", not heard of since", launched.output), launched.output
        assert launched.wait_for("stack of rank 0, innermost last:\n", 30), launched.output
        assert launched.wait_for("torch/distributed/", 30), launched.output
        rank_1.resume()
        assert launched.wait_for(": continues", LIMIT), launched.output
        endless.reach(run, max(endless.steps_of(run)) + 2, lambda: bool(launched.members()), LIMIT)
        rank_1.suspend()
        result = launched.wait(LIMIT)
    assert not result.killed and result.code not in (0, 2), result.tail()
    assert re.search(
        rf"rank 0 on \S+: leaving; it has waited \d+ s for rank 1 on \S+ \(pid {rank_1.pid}\)", result.output
    )
    assert "Traceback" not in result.output, result.tail()
    steps = endless.steps_of(run)
    more = f"optim.max_steps={steps[-1] + 5}"
    again = launch.run_forked(TRAIN, "--recipe", str(tmp_path / "recipe.yaml"), "--set", more)
    assert again.code == 0 and "continues after step" in again.output, again.tail()
    steps = endless.steps_of(run)
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_rank_0_is_named_by_the_others_when_it_is_the_one_that_is_stopped(tmp_path):
    with start(tmp_path) as launched:
        endless.reach(tmp_path / "run", 3, lambda: bool(launched.members()), LIMIT)
        launched.ranks()[0].suspend()
        result = launched.wait(LIMIT)
    assert not result.killed and result.code not in (0, 2), (
        result.tail()
    )  # that of the rank which launch.py sees first
    named = r"rank 1 on \S+: waiting since \S+ .* for rank 0 on \S+ \(pid \d+\), not heard of since"
    assert re.search(named, result.output), result.tail()
    assert re.search(r"rank 1 on \S+: leaving; it has waited \d+ s for rank 0", result.output), result.tail()


@pytest.mark.slow
def test_a_rank_that_waits_for_its_data_is_named_with_the_line_where_it_is(tmp_path):
    """As on a file system that hangs: its loader worker does not come back."""
    with start(tmp_path, "data.workers=1") as launched:
        endless.reach(tmp_path / "run", 3, lambda: bool(launched.members()), LIMIT)
        rank_1, workers = launched.ranks()[1], []
        while not workers:
            servers = [child for child in rank_1.children() if "forkserver" in " ".join(child.cmdline())]
            workers = [worker for server in servers for worker in server.children()]
        step = max(endless.steps_of(tmp_path / "run"))
        endless.reach(tmp_path / "run", step + 200, lambda: bool(launched.members()), LIMIT)  # they have taken over
        for worker in workers:
            psutil.Process(worker.pid).suspend()
        result = launched.wait(LIMIT)
    assert not result.killed and result.code == 1, result.tail()
    assert re.search(r"for rank 1 on \S+ \(pid \d+\), which is alive, at mmpeft_ds/data/workers.py", result.output)
    assert "_try_get_data" in result.output, "rank 0 prints the stack of the rank that is stuck"
    assert re.search(r"rank 1 on \S+: leaving; it is waited for", result.output), result.tail()


@pytest.mark.slow
def test_ctrl_c_ends_a_run_whose_rank_is_stopped_without_the_whole_grace(tmp_path):
    with start(tmp_path, "engine.timeout=3000", "engine.stop_grace=2000") as launched:
        endless.reach(tmp_path / "run", 3, lambda: bool(launched.members()), LIMIT)
        launched.ranks()[1].suspend()
        assert launched.wait_for("waiting since", LIMIT)
        launched.ranks()[0].terminate()
        result = launched.wait(LIMIT)
    assert not result.killed, result.tail()
    assert "rank 0: stopped (SIGTERM) while it waits for rank 1 on " in result.output, result.tail()


@pytest.mark.slow
def test_a_request_to_stop_ends_a_stopped_rank_of_the_same_machine_as_well(tmp_path):
    """Nobody else would: `launch.py` waits half a minute for it to obey SIGTERM, and here is no launcher at all."""
    recipe = endless.prepare(tmp_path, stall=STALL, timeout=3000, stop_grace=2000)

    def stop() -> None:
        endless.reach(tmp_path / "run", 3, lambda: True, LIMIT)
        rank_server.ranks()[1].suspend()
        rank_server.ranks()[0].terminate()

    beside = threading.Thread(target=stop)
    beside.start()
    result = launch.run_forked(TRAIN, "--recipe", str(recipe), timeout=LIMIT)
    beside.join()
    assert not result.killed and list(result.codes) == [128 + 15, -9], result.tail()


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_by_all_others_which_end(tmp_path, lost):
    recipe, killed = endless.prepare(tmp_path), []

    def kill() -> None:
        endless.reach(tmp_path / "run", 3, lambda: True, LIMIT)
        killed.append(rank_server.ranks()[lost])
        killed[0].kill()

    beside = threading.Thread(target=kill)
    beside.start()
    result = launch.run_forked(TRAIN, "--recipe", str(recipe), ranks=3, timeout=LIMIT)
    beside.join()
    assert list(result.codes) == [-9 if rank == lost else 1 for rank in range(3)], result.tail()
    named = rf"lost its connection to rank {lost} on \S+ \(pid {killed[0].pid}\), whose process has ended\. "
    for rank in {0, 1, 2} - {lost}:
        assert re.search(rf"rank {rank}: {named}", result.output), result.tail()
    assert "Traceback" not in result.output, result.tail()


def test_ranks_that_wait_outside_of_gloo_for_a_killed_one_name_it_and_end_long_before_the_timeout():
    result = launch.run_forked("tests.helpers.rank_scripts.lost", ranks=3, timeout=LIMIT)
    assert list(result.codes) == [1, -9, 1], result.tail()
    # Rank 0, which holds the store in which they wait, may be the first to leave.
    leaving, cut = r" on \S+: leaving; it has waited \d+ s for", ": lost its connection to"
    for rank, words in ((0, leaving), (2, f"({leaving}|{cut})")):
        named = rf"rank {rank}{words} rank 1 on \S+ \(pid \d+\), whose process has ended"
        assert re.search(named, result.output), result.tail()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [(0, 1), (2, 3)])
def test_when_a_host_falls_silent_every_rank_of_the_others_says_so_after_the_stall(tmp_path, stopped):
    recipe = endless.prepare(tmp_path, stall=STALL, timeout=TIMEOUT)

    def stop() -> None:
        endless.reach(tmp_path / "run", 3, lambda: True, LIMIT)
        ranks = rank_server.ranks()
        for rank in stopped:
            ranks[rank].suspend()
        for rank in {0, 1, 2, 3} - set(stopped):
            ranks[rank].wait(LIMIT)
        for rank in stopped:
            if ranks[rank].is_running():
                ranks[rank].kill()

    beside = threading.Thread(target=stop)
    beside.start()
    result = launch.run_forked(TRAIN, "--recipe", str(recipe), ranks=4, timeout=LIMIT)
    beside.join()
    assert not result.killed and "Traceback" not in result.output, result.tail()
    for rank in {0, 1, 2, 3} - set(stopped):
        waits = rf"rank {rank} on \S+: waiting since \S+ \((\d+) s\) at \S+ \S+ for rank {stopped[0]} on "
        said = re.search(waits + ".*not heard of since", result.output)
        assert said and int(said[1]) <= STALL + TIMEOUT / 3, result.tail()
        assert re.search(rf"rank {rank} on \S+: leaving; it has waited \d+ s for rank {stopped[0]} on", result.output)
