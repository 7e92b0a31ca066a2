"""Starting the other launchers from a driver such as demo.py: on this machine, without network."""

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def accelerators() -> int:
    """GPUs here, 0 without one."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def ranks() -> int:
    """Two ranks on CPU, so that sharding is real; as many as there are GPUs, at most two, otherwise."""
    return min(accelerators(), 2) or 2


def environment() -> dict[str, str]:
    """What every phase gets; whatever is set already wins."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = {
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"),
        # The launcher leaves it unset, and each rank would then take all cores.
        "OMP_NUM_THREADS": str(max(1, cores // ranks())),
        **({} if accelerators() else {"DS_ACCELERATOR": "cpu"}),
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**ours, **os.environ, "PATH": path}


def python(*command: str) -> int:
    """Exit code of a script that inherits this terminal."""
    return subprocess.call([sys.executable, *command], cwd=ROOT, env=environment())


def launch(*command: str) -> int:
    """Exit code of a script under the `deepspeed` launcher."""
    with socket.socket() as free:  # two runs on a machine must not meet on the default port
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return python(launcher, "--quiet", "--num_accelerators", str(ranks()), "--master_port", port, *command)


def output(*command: str) -> str:
    """What a script printed; its errors go to this terminal."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout[done.stdout.index("{") :]  # libraries print notes before it


def counted(report: dict) -> str:
    """How much of a split an evaluation scored: `9,673 of 9,673 questions`."""
    return f"{report['scored']:,} of {report['there']:,} {report['unit']}"


def rows_of(run: Path) -> list[dict]:
    """metrics.jsonl of a run, empty without one."""
    path = ROOT / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
