"""Process 1 of a container, in a process namespace as Docker gives a container one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import ROOT

INIT = [sys.executable, str(ROOT / "docker" / "init.py")]
SPACE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
# The command ends at once at SIGTERM, as `deepspeed` does; its rank needs a moment to save.
JOB = """
(trap 'sleep 0.4; echo saved > saved; exit' TERM; trap 'echo interrupted > saved; exit' INT
 echo > ready; while :; do sleep 0.05; done) &
while [ ! -e ready ]; do sleep 0.05; done
exec sleep 60
"""


def separate() -> bool:
    """Whether processes can be given numbers of their own here."""
    try:
        return subprocess.run([*SPACE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_a_space = pytest.mark.skipif(not separate(), reason="no process namespaces here (unshare --user --pid)")


class Container:
    """A command as process 1 of a namespace; use it as a context manager."""

    def __init__(self, folder: Path, *command: str):
        self.folder = folder
        self.process = subprocess.Popen([*SPACE, *command], cwd=folder, stdin=subprocess.DEVNULL)

    def __enter__(self) -> Container:
        self.wait_until(lambda: (self.folder / "ready").exists())
        return self

    def wait_until(self, true) -> None:
        """Wait up to 20 s."""
        end = time.monotonic() + 20
        while not true():
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Signal process 1, as `docker stop` and `docker kill` do."""
        (first,) = psutil.Process(self.process.pid).children()
        first.send_signal(number)

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # and with it, by --kill-child, all in the namespace
        self.process.wait()


@needs_a_space
@pytest.mark.parametrize(("number", "written"), [(signal.SIGTERM, "saved\n"), (signal.SIGINT, "interrupted\n")])
def test_a_signal_reaches_every_process_as_what_it_is_and_all_are_waited_for(tmp_path, number, written):
    with Container(tmp_path, *INIT, "bash", "-c", JOB) as container:
        container.signal(number)
        assert container.process.wait(20) == 128 + number
    assert (tmp_path / "saved").read_text() == written


@needs_a_space
def test_a_command_that_ends_by_itself_leaves_its_ranks_time_to_save(tmp_path):
    with Container(tmp_path, *INIT, "bash", "-c", JOB.replace("exec sleep 60", "exit 3")) as container:
        assert container.process.wait(20) == 3
    assert (tmp_path / "saved").read_text() == "saved\n"


@needs_a_space
def test_without_it_a_stop_saves_nothing(tmp_path):
    """The kernel keeps SIGTERM from a process 1 that has no handler."""
    with Container(tmp_path, "bash", "-c", JOB) as container:
        container.signal(signal.SIGTERM)
        time.sleep(1.5)
        assert container.process.poll() is None
    assert not (tmp_path / "saved").exists()


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, timeout=20)


def test_elsewhere_than_as_process_1_it_is_the_command_itself():
    """Where the host's processes are seen, `all others` would be the host's."""
    done = run(*INIT, "bash", "-c", "echo $PPID")
    assert int(done.stdout) == psutil.Process().pid


@needs_a_space
@pytest.mark.parametrize("space", [[], SPACE])
def test_what_cannot_be_run_is_one_line(space):
    done = run(*space, *INIT, "no-such-command")
    assert done.returncode == 127 and "no-such-command: No such file" in done.stderr and "Traceback" not in done.stderr
    assert run(*space, *INIT).returncode == 2
