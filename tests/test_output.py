"""What a command prints may find nobody who reads it; its work goes on."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from mmpeft_ds.runs import few_shot
from tests.helpers import launch

COMMAND = """
import pathlib, subprocess, sys
from mmpeft_ds import console

def main():
    print("ready", flush=True)
    sys.stdin.readline()
    for stream in (sys.stdout, sys.stderr):
        for _ in range(3):
            print("x" * 100_000, file=stream, flush=True)
    subprocess.run(["echo", "of a process that it starts"], check=True)
    pathlib.Path({path!r}).write_text("done")

console.run(main)
"""


def start(path: Path, output: int) -> subprocess.Popen:
    command = [sys.executable, "-c", COMMAND.format(path=str(path))]
    return subprocess.Popen(
        command, env=launch.environment(), stdin=subprocess.PIPE, stdout=output, stderr=output, text=True
    )


@pytest.mark.parametrize("opened", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
def test_a_command_whose_reader_is_gone_goes_on(tmp_path, opened):
    read, write = opened()
    process = start(tmp_path / "end", write)
    os.close(write)
    assert os.read(read, 5) == b"ready"
    os.close(read)
    process.communicate("go on\n", timeout=120)
    assert process.returncode == 0 and (tmp_path / "end").read_text() == "done"


def test_what_is_printed_arrives_whole(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        process = start(tmp_path / "end", log.fileno())
        process.communicate("go on\n", timeout=120)
    assert process.returncode == 0
    assert (tmp_path / "log").read_text().splitlines() == [
        "ready",
        *["x" * 100_000] * 6,
        "of a process that it starts",
    ]


def test_a_disk_without_room_is_still_an_error(tmp_path):
    with open("/dev/full", "wb") as full:
        process = start(tmp_path / "end", full.fileno())
        process.communicate("go on\n", timeout=120)
    assert process.returncode != 0 and not (tmp_path / "end").exists()


@pytest.mark.parametrize("options", [["-u"], []], ids=["unbuffered", "buffered"])
def test_unbuffered_output_is_out_before_a_process_ends_at_once(options):
    """Launchers start ranks with `python -u`, and a stopped rank leaves without flushing."""
    code = (
        "import os, sys; from mmpeft_ds.output import outlive_readers; outlive_readers()\n"
        "print('out'); print('error', file=sys.stderr); os._exit(0)"
    )
    command, environment = [sys.executable, *options, "-c", code], launch.environment()
    environment.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("out\n" if options else "", "error\n")


def test_the_log_of_a_few_shot_run_that_has_no_room_ends_nothing(tmp_path, capsys):
    (tmp_path / "full.log").symlink_to("/dev/full")  # every write to it finds no room
    for name in ("full", "room"):
        with few_shot._logged(tmp_path / name):
            print("a line of the run\n" * 1000)
            print("and another", file=sys.stderr, flush=True)
    assert (tmp_path / "room.log").read_text().count("line") == 1000 and not capsys.readouterr().out
