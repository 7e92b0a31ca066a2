"""Starting the other launchers from a driver such as demo.py: on this machine, without network."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

from mmpeft_ds.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent
PORTS = range(20000, 30000)  # below those that Linux gives to connections


@cache
def accelerators() -> int:
    """GPUs here, 0 without one."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def usual_ranks() -> int:
    """Two ranks on CPU, so that sharding is real; as many as there are GPUs, at most two, otherwise."""
    return min(accelerators(), 2) or 2


def environment(ranks: int | None = None) -> dict[str, str]:
    """Environment variables of every phase, whose processes share the cores; variables that are already set win."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = {
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"),
        # The launcher leaves it unset, and each rank would then take all cores.
        "OMP_NUM_THREADS": str(max(1, cores // (ranks or usual_ranks()))),
        **({} if accelerators() else {"DS_ACCELERATOR": "cpu"}),
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**ours, **os.environ, "PATH": path}


def python(*command: str, ranks: int | None = None) -> int:
    """Exit code of a script that inherits this terminal."""
    return subprocess.call([sys.executable, *command], cwd=ROOT, env=environment(ranks))


def launch(*command: str, ranks: int | None = None) -> int:
    """Exit code of a script under the `deepspeed` launcher, with so many ranks; None: `usual_ranks`."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    number = ranks or usual_ranks()
    words = ("--quiet", "--num_accelerators", str(number), "--master_port", str(free_port()))
    return python(launcher, *words, *command, ranks=number)


def free_port() -> int:
    """A TCP port that is free now, so that two runs on a machine do not meet on the default one.

    Not one that the system would choose: it gives those to any connection, and on a busy machine it may be a minute
    until the launcher takes its port.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise BadInput(f"no port from {PORTS.start} to {PORTS.stop - 1} is free. End other runs on this machine.")


def output(*command: str) -> str:
    """Printed output of a script; its errors go to this terminal."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout[done.stdout.index("{") :]  # libraries print notes before it


def counted(report: dict) -> str:
    """The number of items that an evaluation scored, such as `9,673 of 9,673 questions`."""
    return f"{report['scored']:,} of {report['there']:,} {report['unit']}"


def rows_of(run: Path) -> list[dict]:
    """metrics.jsonl of a run, empty without one."""
    path = ROOT / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
