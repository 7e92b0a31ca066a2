"""Where the supervisors of several nodes meet: one file that holds a state, and the end of a run for all of them."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from pathlib import Path

import pytest

from mmpeft_ds.distributed import meeting
from mmpeft_ds.distributed.meeting import Meeting, SharedFile


def test_a_state_is_replaced_only_by_whoever_knows_the_one_that_is_there(tmp_path):
    mine, other = SharedFile(tmp_path / "state"), SharedFile(tmp_path / "state")
    assert mine.get_state() is None
    assert mine.set_state(b"a", "a token of nothing") is None, "there is nothing to replace"
    state, token, ours = mine.set_state(b"first")
    assert (state, ours) == (b"first", True) and other.get_state() == (b"first", token)
    assert other.set_state(b"second") == (b"first", token, False), "nobody begins twice"
    assert other.set_state(b"second", token)[2]
    assert mine.set_state(b"third", token) == (b"second", b"second", False), "the token is out of date"
    assert mine.get_state()[0] == b"second" and (tmp_path / "state").stat().st_mode & 0o077 == 0


def count_up(path: Path, times: int) -> None:
    shared = SharedFile(path)
    for _ in range(times):
        done = False
        while not done:
            there = shared.get_state()
            number, token = (int(there[0]), there[1]) if there else (0, None)
            answer = shared.set_state(b"%d" % (number + 1), token)
            done = answer is not None and answer[2]


def test_no_change_of_several_processes_is_lost(tmp_path):
    path = tmp_path / "state"
    writers = [multiprocessing.Process(target=count_up, args=(path, 50)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert int(SharedFile(path).get_state()[0]) == 200


def test_a_kill_in_the_middle_of_a_change_leaves_a_state_that_can_be_read(tmp_path, monkeypatch):
    """A shorter state over a longer one: its tail is cut off last, and unpickling does not read it."""
    shared = SharedFile(tmp_path / "state")
    _, token, _ = shared.set_state(pickle.dumps(list(range(100))))

    def killed(descriptor, length):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(meeting.os, "ftruncate", killed)
        shared.set_state(pickle.dumps([1]), token)
    there, token = shared.get_state()
    assert pickle.loads(there) == [1]
    assert shared.set_state(pickle.dumps([2]), token)[2] and shared.get_state()[0] == pickle.dumps([2])


def test_the_first_end_of_a_run_counts_for_all_nodes_and_the_next_start_meets_anew(tmp_path):
    first, second = (Meeting(tmp_path / "nodes", 1, 2, 10.0, "127.0.0.1") for _ in range(2))
    assert first.rendezvous.get_run_id() == second.rendezvous.get_run_id() == "0"
    assert second.ended() == (1, "another node ended the run"), "which does not say why yet"
    first.end(2, "bad input")
    second.end(0, "finished")
    assert first.ended() == second.ended() == (2, "bad input")
    later = Meeting(tmp_path / "nodes", 1, 2, 10.0, "127.0.0.1")
    assert later.rendezvous.get_run_id() == "1" and later.ended()[0] == 1
    later.end(0, "finished")
    Meeting(tmp_path / "nodes", 1, 2, 10.0, "127.0.0.1")
    assert not [path for path in (tmp_path / "nodes").iterdir() if path.stem == "0"], "nobody reads it any more"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"code": "x", "reason": 1}', '{"code": 2}'])
def test_an_end_that_cannot_be_read_is_one_that_gives_up(tmp_path, text):
    place = Meeting(tmp_path, 1, 1, 10.0, "127.0.0.1")
    (tmp_path / "0.ended").write_text(text)
    assert place.ended() == (1, "another node ended the run")


def test_two_nodes_find_each_other_and_a_third_learns_that_the_run_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(meeting, "LAST_CALL", 1)
    nodes = [Meeting(tmp_path, 2, 2, 60.0, "127.0.0.1") for _ in range(3)]
    found: dict[int, tuple[int, int]] = {}

    def join(number: int) -> None:
        info = nodes[number].rendezvous.next_rendezvous()
        found[number] = info.rank, info.world_size

    threads = [threading.Thread(target=join, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found.values()) == [(0, 2), (1, 2)]
    assert nodes[0].rendezvous.num_nodes_waiting() == 0
    nodes[0].end(0, "the run is finished")
    assert nodes[2].rendezvous.is_closed() and nodes[1].ended() == (0, "the run is finished")
