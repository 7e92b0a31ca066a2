"""Ranks of tests end with the test run that has asked for them, also if that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers import ROOT, launch

SERVER = """
from tests.helpers import rank_server
rank_server.IMPORTS = ()
rank_server.serve()
"""
RANK = """
import os, sys, time
os.fork()
with open(sys.argv[1], "a") as pids:
    print(os.getpid(), file=pids, flush=True)
time.sleep(600)
"""
# Asks as a test run does, and waits for an answer that does not come.
ASKER = """
import subprocess, sys
server = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=-1, stdout=-1, text=True, start_new_session=True)
server.stdin.write(sys.argv[2] + "\\n")
server.stdin.flush()
print(server.pid, flush=True)
server.stdout.read()
"""


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL], ids=lambda by: by.name)
def test_a_killed_test_run_leaves_no_ranks(tmp_path, by):
    pids, log = tmp_path / "pids", tmp_path / "log"
    (tmp_path / "rank.py").write_text(RANK)
    log.touch()
    environment = launch.environment()
    job = {"script": str(tmp_path / "rank.py"), "args": [str(pids)], "log": str(log), "timeout": 600.0}
    job |= {"environments": [environment] * 2, "hosts": [None, None]}
    command = [sys.executable, "-c", ASKER, SERVER, json.dumps(job)]
    asker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    started = [psutil.Process(int(asker.stdout.readline()))]
    try:
        end = time.monotonic() + 60
        while not (pids.exists() and len(pids.read_text().splitlines()) == 4):
            assert started[0].is_running() and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        started += [psutil.Process(int(pid)) for pid in pids.read_text().splitlines()]
        os.kill(asker.pid, by)
        asker.wait()
        assert psutil.wait_procs(started, timeout=60.0)[1] == []
    finally:
        for process in (p for p in (asker, *started) if psutil.pid_exists(p.pid)):
            process.kill()
