"""Two launches that take the same port at the same time do not mix their ranks."""

import datetime
import os

import pytest
import torch.distributed as dist

from mmpeft_ds.distributed import own_store
from tests.helpers.launch import Launch, free_port

ALONE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "4", "CROSS_SIZE": "1"}


class Launcher:
    pid = 4242


@pytest.fixture
def asked(monkeypatch):
    """Where ranks with these variables meet, with or without a launcher above them."""

    def ask(launchers=(Launcher,), **variables):
        clean = {k: v for k, v in os.environ.items() if k not in ALONE}
        monkeypatch.setattr(os, "environ", {**clean, **variables})
        monkeypatch.setattr(own_store, "launchers_above", lambda: (list(launchers), ""))
        return own_store.meeting_of_launch()

    return ask


def test_ranks_of_deepspeed_on_one_machine_meet_under_the_number_of_their_launcher(asked):
    assert asked(**ALONE) == "launch://4242"


def test_ranks_on_several_machines_or_of_another_launcher_meet_as_ever(asked):
    assert asked(**{**ALONE, "CROSS_SIZE": "2"}) is None
    assert asked(**{**ALONE, "WORLD_SIZE": "8"}) is None
    assert asked((), **ALONE) is None
    assert asked(RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none") is None


def test_a_launch_sees_nothing_that_another_one_wrote_at_the_same_port(monkeypatch):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    limit = datetime.timedelta(seconds=20)
    store, *of_first = next(own_store._apart("launch://1", timeout=limit))
    assert of_first == [0, 1]
    store.set("address of rank 1", "here")
    server = dist.TCPStore("127.0.0.1", int(place["MASTER_PORT"]), is_master=False, timeout=limit)
    same, other = (dist.PrefixStore(name, server) for name in ("1", "2"))
    assert same.get("address of rank 1") == b"here" and not other.check(["address of rank 1"])


@pytest.mark.slow
@pytest.mark.distributed
def test_of_two_launches_at_one_port_one_runs_and_the_other_says_what_to_do():
    """Without stores of their own the one that runs waits for ranks that have joined the other, and never ends."""
    script, port = "tests.helpers.rank_scripts.meet", free_port()
    with Launch(script, port=port) as one, Launch(script, port=port) as other:
        results = [launch.wait(120) for launch in (one, other)]
    codes = sorted(result.code for result in results)
    assert codes in ([0, 0], [0, 2]), [result.tail() for result in results]  # both, if the first has already ended
    for result in results:
        assert ("another --master_port" in result.output) == (result.code == 2)
        assert ("all 2 ranks have met" in result.output) == (result.code == 0)
