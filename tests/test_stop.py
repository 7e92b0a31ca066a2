"""A stop request is noticed, whoever makes it, and ends the process within its time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mmpeft_ds import stop
from mmpeft_ds.stop import StopFlag
from tests.helpers import launch

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def hangup():
    """Under nohup SIGHUP is ignored, which a stop flag respects; these tests send it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def loop(ready, log: Path, grace: float, stubborn: bool) -> None:
    """Works until asked to stop; a stubborn one hangs in the middle of its step."""
    file = log.open("w")
    os.dup2(file.fileno(), 2)
    with StopFlag(grace) as flag:
        flag.begin()
        ready.set()
        while not flag.requested() or stubborn:
            time.sleep(0.01)
    log.with_suffix(".reason").write_text(flag.reason)
    os._exit(0)


@pytest.fixture
def worker(tmp_path):
    children = []

    def start(grace: float = 30.0, stubborn: bool = False):
        ready, log = FORK.Event(), tmp_path / "log"
        child = FORK.Process(target=loop, args=(ready, log, grace, stubborn))
        child.start()
        children.append(child)
        assert ready.wait(30)
        return child, log

    yield start
    for child in children:
        child.kill()
        child.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_only_sets_the_flag(worker, number):
    child, log = worker()
    os.kill(child.pid, number)
    child.join(10)
    assert child.exitcode == 0
    assert log.with_suffix(".reason").read_text() == signal.Signals(number).name


def test_the_echo_of_a_ctrl_c_does_not_kill(worker):
    """The launcher answers Ctrl-C with a SIGTERM to each rank, which has had the SIGINT already."""
    child, _ = worker(stubborn=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(child.pid, number)
        time.sleep(0.05)
    child.join(0.5)
    assert child.exitcode is None


def test_a_second_ctrl_c_ends_it_at_once(worker):
    child, _ = worker(stubborn=True)
    os.kill(child.pid, signal.SIGINT)
    time.sleep(stop.AGAIN + 0.2)
    os.kill(child.pid, signal.SIGINT)
    child.join(10)
    assert child.exitcode not in (None, 0)


def test_a_step_that_hangs_ends_with_a_clear_line_when_the_time_is_up(worker):
    child, log = worker(grace=0.3, stubborn=True)
    os.kill(child.pid, signal.SIGTERM)
    child.join(10)
    assert child.exitcode == 1
    assert "stop requested (SIGTERM) but not done within 0.3 s" in log.read_text()


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopFlag():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_reason_is_told_once():
    told = []
    with StopFlag(on_request=told.append) as flag:
        flag.begin()
        flag.request("the disk is full")
        flag.request("again")
        time.sleep(3 * stop.POLL)
    assert told == ["the disk is full"] and flag.reason == "the disk is full"


def test_a_dead_launcher_is_noticed():
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with StopFlag() as flag:
            flag.begin()
            flag._watch.launchers = [psutil.Process(launcher.pid)]
            time.sleep(2 * stop.POLL)
            assert not flag.requested()
            launcher.kill()  # not reaped: a zombie is dead, too
            end = time.monotonic() + 10
            while not flag.requested() and time.monotonic() < end:
                time.sleep(0.01)
        assert flag.reason == f"the launcher (pid {launcher.pid}) is gone"
    finally:
        launcher.kill()
        launcher.wait()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["/usr/bin/python", "/opt/bin/deepspeed", "--num_gpus", "2", "train.py"], True),
        (["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train.py"], True),
        (["/opt/bin/python", "/opt/bin/torchrun", "train.py"], True),
        (["python", "-m", "torch.distributed.run", "train.py"], True),
        (["python", "train.py", "deepspeed"], False),
        (["python", "-m", "pytest", "deepspeed"], False),
        (["bash", "-c", "deepspeed train.py"], False),
        ([], False),
    ],
)
def test_launchers_are_told_from_what_only_names_them(command, expected):
    assert stop._is_launcher(command) is expected


COMMAND = """
import time
from mmpeft_ds import console

def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
        time.sleep({cleaning})

console.run(main)
"""


@pytest.mark.parametrize(
    ("signals", "cleaning", "code"),
    [
        ([signal.SIGTERM], 0, 143),
        ([signal.SIGHUP], 0, 129),
        ([signal.SIGINT], 0, 130),
        ([signal.SIGINT, signal.SIGINT], 600, 130),  # at once
        ([signal.SIGTERM], 600, 143),  # after LEAVE seconds
    ],
)
def test_a_command_on_its_own_cleans_up_and_leaves(signals, cleaning, code):
    variables = {k: v for k, v in launch.environment().items() if k not in ("RANK", "SLURM_PROCID")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", COMMAND.format(cleaning=cleaning)], env=variables, **pipes)
    try:
        assert process.stdout.readline() == "ready\n"
        for number in signals:
            process.send_signal(number)
            time.sleep(stop.AGAIN + 0.2 if len(signals) > 1 else 0)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code and out == "cleaned up\n" and "Traceback" not in err
    finally:
        process.kill()
        process.wait()


def test_nohup_holds():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as flag:
            flag.begin()
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert not flag.requested() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_to_a_forked_child_is_none_to_its_parent():
    with stop.watching() as watch:
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(30)
        time.sleep(2 * stop.POLL)
        assert child.exitcode == -signal.SIGTERM and watch.since is None


def test_an_orphan_is_told_from_a_process_that_a_service_started():
    """The parent of an orphan is process 1, and it is in the group of the command that started it."""
    assert stop._adopts([psutil.Process(1)]) and stop._adopts([])
    assert not stop._adopts([psutil.Process()])


def test_a_command_that_has_ended_does_not_wait_for_the_thread_that_watched():
    """The thread looks at the launchers from time to time, here once in an hour."""
    code = (
        "import threading; from mmpeft_ds import stop; stop.POLL = 3600\n"
        "with stop.watching(): pass\n"
        "print([t.name for t in threading.enumerate() if t.name == 'stop-watch'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"
