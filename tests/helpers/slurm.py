"""Slurm itself on hosts of `tests.helpers.hosts`: a controller on the first, a daemon on each, and its commands.

Everything lies in the folder of the hosts and ends with them; the machine's own Slurm, if it has one, is not touched.
Processes are tracked by their process group, since containers have no cgroups to give away.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.helpers import hosts, launch

TOOLS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge"}
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={first}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/daemon-%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/daemon-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=60
SlurmdTimeout=20
NodeName={names} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE OverTimeLimit=0 State=UP
"""


@cache
def missing() -> str:
    """Why Slurm cannot be started here; empty where it can."""
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"Slurm's program {tool} is not here (Debian: apt-get install {package})"
    return hosts.missing()


class Cluster:
    """Slurm on some hosts; use it as a context manager.

    Args:
        machines: hosts that are up; they outlive the cluster's context and end its daemons with their own.
        cpus: of each node, for Slurm; a task takes one.
    """

    def __init__(self, machines: hosts.Hosts, cpus: int = 2):
        self.machines, self.folder = machines, machines.folder
        self.variables = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        names = [host.name for host in machines.all]
        values = {"first": names[0], "names": ",".join(names), "folder": self.folder, "cpus": cpus}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format_map(values))
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(bytes(range(256)) * 4)
        key.chmod(0o600)
        self.folder.chmod(0o755)  # munged refuses a socket that others cannot reach

    def __enter__(self) -> Cluster:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={self.folder}/munge.{ending}" for option, ending in files.items()]
        self.machines.start(self.machines[0], "munged", "--foreground", "--force", *words)
        self._wait_for(lambda: (self.folder / "munge.socket").exists(), "munge")
        self.machines.start(self.machines[0], "slurmctld", "-D", env=self.variables)
        for host in self.machines.all:
            self.machines.start(host, "slurmd", "-D", env=self.variables)
        self._wait_for(lambda: self.command("sinfo", "-h", "-o", "%D %t") == f"{len(self.machines.all)} idle", "nodes")
        return self

    def __exit__(self, *_: object) -> None:
        self.command("scancel", "--signal=KILL", "--user=root")

    def command(self, *words: str) -> str:
        """What one of Slurm's commands prints on the first host."""
        result = subprocess.run(
            self.machines[0].command(*words),
            env=hosts.clean_environment(**self.variables),
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result.stdout.strip()

    def srun(self, *words: str, timeout: float = 300) -> launch.Result:
        """Run `srun` on the first host and wait for it."""
        return self.machines.run([(self.machines[0], ["srun", *words], self.variables)], timeout)

    def submit(self, script: Path, *options: str) -> int:
        """Hand a script to `sbatch`; the job's number."""
        log = [f"--output={script.with_suffix('.log')}", "--open-mode=append"]
        printed = self.command("sbatch", "--parsable", *log, *options, str(script))
        assert printed.isdecimal(), printed
        return int(printed)

    @staticmethod
    def printed(script: Path) -> str:
        """What the jobs of a script have printed so far."""
        return script.with_suffix(".log").read_text(errors="replace")

    def state(self, job: int) -> str:
        """State of a job as Slurm names it, such as RUNNING."""
        found = re.search(r"JobState=(\w+)", self.command("scontrol", "show", "job", str(job)))
        return found[1] if found else ""

    def wait(self, job: int, *states: str, timeout: float = 180) -> str:
        """Wait until a job is in one of the states; its state."""
        self._wait_for(lambda: self.state(job) in states, f"job {job} to be {' or '.join(states)}", timeout)
        return self.state(job)

    def lost(self, host: hosts.Host) -> None:
        """Wait until Slurm has noticed that a node is gone."""
        self._wait_for(
            lambda: self.command("sinfo", "-h", "-n", host.name, "-o", "%t").startswith("down"), "its loss", 180
        )

    def emptied(self, program: str) -> None:
        """Wait until no process with this word in its command line is left on any node."""

        def gone() -> bool:
            asked = [
                subprocess.run(host.command("pgrep", "-f", program), capture_output=True) for host in self.machines.all
            ]
            return all(result.returncode == 1 for result in asked)

        self._wait_for(gone, f"{program} to end")

    def _wait_for(self, condition: Callable[[], bool], what: str, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                logs = [path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("*.log"))]
                raise TimeoutError(f"waited {timeout} s for {what}\n" + "\n".join(logs))
            time.sleep(0.2)
