"""Ranks of launchers/preflight.py, of which each may have faults that are planted here.

PLANTED='{"host": "nodeb", "clock": 90}' python -m tests.helpers.rank_scripts.preflight --recipe R.yaml

Keys of PLANTED: `host`, the name of its machine; `clock`, seconds by which its clock is wrong; `folder`, its working
directory; `versions` and `failed`, what its imports give beside what is really there; `dies`: it is killed once the
ranks have met.
"""

import json
import os
import runpy
import signal
import socket
from typing import Any

from mmpeft_ds.preflight import clock, facts, imports
from tests.helpers import ROOT


def plant(faults: dict) -> None:
    if "host" in faults:
        socket.gethostname = lambda: faults["host"]
    if "clock" in faults:
        right = clock.now
        clock.now = lambda: right() + faults["clock"]
    if "folder" in faults:
        os.chdir(faults["folder"])
    if "versions" in faults or "failed" in faults:
        true = imports.Probe.result

        def result(probe: imports.Probe, *given: Any) -> tuple[dict[str, str], dict[str, str]]:
            versions, failed = true(probe, *given)
            lost = faults.get("failed", {})
            versions = {name: v for name, v in (versions | faults.get("versions", {})).items() if name not in lost}
            return versions, failed | lost

        imports.Probe.result = result
    if faults.get("dies"):
        facts.of_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    plant(json.loads(os.environ.get("PLANTED", "{}")))
    runpy.run_path(str(ROOT / "launchers" / "preflight.py"), run_name="__main__")
