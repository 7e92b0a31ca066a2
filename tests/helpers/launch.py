"""Starting ranks on this machine, by the real `deepspeed` launcher or without it, and leaving no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers import ROOT, rank_server


@dataclass
class Result:
    """How a launch ended.

    Attributes:
        code: exit code of the launcher; without one, the first of the ranks' that is not 0.
        output: what all ranks printed.
        killed: whether the time was up.
        codes: exit codes of the ranks where there was no launcher.
    """

    code: int
    output: str
    killed: bool = False
    codes: Sequence[int] = ()

    def tail(self, lines: int = 60) -> str:
        """The end of the output, for the message of an assertion."""
        return "\n".join(self.output.splitlines()[-lines:])


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """Environment of a subprocess: imports from the repository, the compiled operator, no network, one thread."""
    env = os.environ | {
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions")),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    return env | extra


class Launch:
    """A running launch; use it as a context manager, which kills everything that is left at its end.

    Args:
        script: a launcher's path, or the dotted name of a module in tests/helpers/rank_scripts.
        port: at which the ranks meet; 0: a free one.
    """

    def __init__(
        self, script: str | Path, *args: str, ranks: int = 2, env: dict[str, str] | None = None, port: int = 0
    ):
        self.log = tempfile.NamedTemporaryFile("w+b", prefix="launch-", suffix=".log", delete=False)  # noqa: SIM115
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [sys.executable, str(launcher), "--num_accelerators", str(ranks)]
        command += ["--master_port", str(port or free_port())]
        command += [] if str(script).endswith(".py") else ["--module"]
        self.process = subprocess.Popen(
            [*command, str(script), *args],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment(**(env or {})),
            cwd=ROOT,
            start_new_session=True,  # one group to kill, and ours is not in it
        )
        self.session = self.process.pid

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.log.close()
        with contextlib.suppress(OSError):
            os.unlink(self.log.name)

    @property
    def output(self) -> str:
        """What has been printed so far."""
        return Path(self.log.name).read_text(errors="replace")

    def members(self) -> list[psutil.Process]:
        """Live processes of the launch: runner, launcher, ranks and their workers, orphans included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                if os.getsid(process.pid) == self.session and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """rank -> its process (not its loader workers)."""
        found: dict[int, psutil.Process] = {}
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                own, above = process.environ().get("RANK"), process.parent()
                if own is not None and (above is None or "RANK" not in above.environ()):
                    found[int(own)] = process
        return found

    def wait_for(self, text: str, timeout: float) -> bool:
        """Wait until the output holds `text`; False if the launcher ended or the time is up first."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if text in self.output:
                return True
            if self.process.poll() is not None and not self.members():
                return text in self.output
            time.sleep(0.05)
        return False

    def wait(self, timeout: float) -> Result:
        """Wait until the launcher and every rank have ended, or kill them when the time is up."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None and not self.members():
                return Result(self.process.returncode, self.output)
            time.sleep(0.05)
        self.kill()
        return Result(self.process.wait(), self.output, killed=True)

    def kill(self) -> None:
        """SIGKILL to the whole group, and to whatever of the session is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.session, signal.SIGKILL)
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)


def run(
    script: str | Path, *args: str, ranks: int = 2, timeout: float = 120.0, env: dict[str, str] | None = None
) -> Result:
    """Launch `script` on `ranks` ranks and wait for its end, at most `timeout` seconds."""
    with Launch(script, *args, ranks=ranks, env=env) as launched:
        return launched.wait(timeout)


def run_forked(
    script: str | Path,
    *args: str,
    ranks: int = 2,
    timeout: float = 600.0,
    env: dict[str, str] | None = None,
    each: Sequence[dict[str, str | None]] | None = None,
    hosts: Sequence[int] | None = None,
) -> Result:
    """`run` without a launcher: ranks that have imported everything run `script`, each to its own end.

    Nobody ends the other ranks when one fails.

    Args:
        ranks: 0 is one process that no launcher has told anything, as `python script` starts it.
        each: further variables of each rank, over all others, of which None takes one away; as many as ranks.
        hosts: `hosts.Host.pid` of the host that each rank runs on.
    """
    ranks = ranks if each is None else len(each)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    group |= {"LOCAL_SIZE": str(ranks)}
    given = [environment(**group, RANK=str(r), LOCAL_RANK=str(r)) for r in range(ranks)] or [environment()]
    own = each or [{}] * len(given)
    given = [e | (env or {}) | more for e, more in zip(given, own, strict=True)]
    given = [{k: v for k, v in variables.items() if v is not None} for variables in given]
    with tempfile.NamedTemporaryFile(prefix="ranks-", suffix=".log") as log:
        job = {"script": str(script), "args": args, "log": log.name, "timeout": timeout}
        codes = rank_server.ask(job | {"environments": given, "hosts": hosts or [None] * len(given)})
        output = Path(log.name).read_text(errors="replace")
    if None in codes:
        return Result(-signal.SIGKILL, output, killed=True)
    return Result(next((code for code in codes if code), 0), output, codes=codes)
