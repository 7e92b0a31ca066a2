"""Whom ranks wait for, out of their reports: as plain objects, without processes."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable

import pytest

from mmpeft_ds.distributed import stall, watchdog
from mmpeft_ds.distributed.stall import Report, awaited, stacks
from mmpeft_ds.owner import Owner

PATIENCE = 30.0
NOW = 1000.0


def report(rank: int, entered: int, waits: bool, still: float = 60.0, **more) -> Report:
    owner = Owner(f"host{rank}", "", 100 + rank, 1)
    return Report(rank, owner, {"0": entered}, still, waits, f"file.py:{rank} work", ("a", "b"), **more)


def named(reports: list[Report], world_size: int = 0, silent: tuple[int, ...] = ()) -> list[int]:
    heard = {r.rank: (NOW - 2 * PATIENCE if r.rank in silent else NOW - 1, r) for r in reports}
    return [one.rank for one in awaited(heard, world_size or len(reports), NOW, PATIENCE)]


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([report(0, 7, True), report(1, 6, False), report(2, 7, True)], [1]),
        # Rank 2 waits in an earlier collective for rank 1 as well.
        ([report(0, 7, True), report(1, 5, False), report(2, 6, True)], [1]),
        # On a GPU the host waits outside of torch.distributed; the count tells.
        ([report(0, 7, False), report(1, 6, False)], [1]),
        # All behind wait, such as for each other in different collectives.
        ([report(0, 7, True), report(1, 6, True)], [1]),
        # Point to point, which is not counted.
        ([report(0, 7, True), report(1, 7, False)], [1]),
        ([report(0, 7, True), report(1, 7, True)], []),  # all in the same collective: that may just take long
        ([report(0, 7, False), report(1, 7, False)], []),  # all compute
    ],
)
def test_the_one_that_is_behind_and_does_not_wait_itself(reports, expected):
    assert named(reports) == expected


def test_a_rank_that_is_not_heard_of_comes_before_one_that_is_behind():
    reports = [report(0, 7, True), report(1, 6, False), report(2, 7, True)]
    assert named(reports, silent=(2,)) == [2]
    assert named(reports, world_size=4) == [3]


def test_counts_of_groups_that_a_rank_is_not_in_say_nothing():
    one, other = (
        Report(r, Owner("h", "", r, 1), {group: n}, 60.0, True) for r, group, n in ((0, "a", 9), (1, "b", 2))
    )
    assert named([one, other]) == []


def test_a_line_names_a_few_and_counts_the_rest():
    reports = [report(0, 7, True)] + [report(rank, 6, False) for rank in range(1, 21)]
    found = awaited({r.rank: (NOW, r) for r in reports}, 21, NOW, PATIENCE)
    line = stall.words(found)
    assert line.startswith("rank 1 on host1 (pid 101), which is alive, at file.py:1 work since ")
    assert line.count("rank ") == stall.NAMED and line.endswith(f" and {20 - stall.NAMED} more")


def test_ranks_with_the_same_stack_are_told_together():
    lines = stacks([report(1, 1, True), report(0, 1, True)])
    assert lines == ["stack of ranks 0, 1, innermost last:", "  a", "  b"]


def test_a_thread_that_waits_for_ranks_is_seen_and_one_that_computes_is_not():
    def wait(event: threading.Event) -> None:
        event.wait()

    code = compile("def run(wait, event): wait(event)", "/x/torch/distributed/made_up.py", "exec")
    scope: dict = {}
    exec(code, scope)
    assert not stall.position()["waits"]
    event = threading.Event()
    thread = threading.Thread(target=scope["run"], args=(wait, event))
    thread.start()
    try:
        seen = stall.position()
        assert seen["waits"] and "test_stall.py" in "".join(seen["stack"])
    finally:
        event.set()
        thread.join()


def inside(path: str) -> Callable[[threading.Event], None]:
    """A function of a file of that name that waits for an event."""
    scope: dict = {}
    exec(compile("def run(event): event.wait()", path, "exec"), scope)
    return scope["run"]


@pytest.mark.parametrize("awaited", [False, True])
def test_a_save_beside_the_training_counts_only_while_the_training_waits_for_it(monkeypatch, awaited):
    """Rank 0's disk keeps the saving threads of all other ranks in a collective, whatever else these ranks do."""
    event, ready = threading.Event(), threading.Event()
    saves = threading.Thread(target=inside("/x/torch/distributed/made_up.py"), args=(event,), name="checkpoint_0")
    trains = threading.Thread(
        target=inside("/x/mmpeft_ds/engine/background.py" if awaited else "/x/mmpeft_ds/data/loader.py"), args=(event,)
    )
    monkeypatch.setattr(stall.threading, "main_thread", lambda: trains)
    groups = [types.SimpleNamespace(group_name=name, group_desc=name, _get_sequence_number_for_group=lambda: 3)
              for name in ("default", stall.BESIDE)]  # fmt: skip
    monkeypatch.setattr(watchdog.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(watchdog.dist.distributed_c10d, "_world", types.SimpleNamespace(pg_map=groups))
    dog = watchdog.Watchdog.__new__(watchdog.Watchdog)
    dog.rank, dog.owner, dog._entered, dog._moved, dog.stall = 1, None, {}, 0.0, 0.0
    saves.start()
    trains.start()
    ready.wait(0.2)  # until both are inside
    try:
        seen, told = stall.position(), dog.report()
    finally:
        event.set()
        saves.join()
        trains.join()
    assert seen["waits"] == awaited and ("made_up.py" in "".join(seen["stack"])) == awaited
    assert set(told.entered) == ({"default", stall.BESIDE} if awaited else {"default"})


def test_a_rank_that_rank_0_has_left_behind_names_whom_rank_0_has_told_of(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    dog = watchdog.Watchdog.__new__(watchdog.Watchdog)
    dog.hub, dog._channel = None, types.SimpleNamespace(refused=True, owner=None, ask=lambda report: None)
    dog.report = lambda: None
    dog._lost = []
    assert dog.lost() == "rank 0 on node-0, whose process has ended"
    dog._lost = [stall.Awaited(1, None, True, "rank 1 on node-1 (pid 7), whose process has ended")]
    assert dog.lost() == "rank 1 on node-1 (pid 7), whose process has ended"


def test_rank_0_stays_until_a_rank_that_asks_once_a_beat_knows_who_is_lost(monkeypatch):
    """Else that rank would lose its connection to rank 0, and name rank 0."""
    monkeypatch.setattr(watchdog, "NOTICE", 0.1)
    gone = stall.Awaited(1, None, True, "rank 1 on host1 (pid 101), whose process has ended")
    dog = watchdog.Watchdog.__new__(watchdog.Watchdog)
    dog.rank, dog.world_size, dog.stall, dog.timeout, dog.beat, dog.owner = 0, 3, 60.0, 60.0, 1.0, None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    dog.hub = hub = watchdog.Hub(dog)
    hub.answer(report(2, 6, True))
    hub._lost[1] = gone
    dog.report = lambda: report(0, 6, True)
    asks = threading.Timer(0.7, hub.answer, [report(2, 6, True)])  # its next beat
    asks.start()
    try:
        assert dog.lost() == gone.words
        assert not asks.is_alive() and 2 in hub.told
    finally:
        asks.join()
        hub.server.close()
