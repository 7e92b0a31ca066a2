"""Several hosts on this machine: network namespaces joined by veth pairs, each with its own host name.

A host has its own network, host name, process numbers, /etc/hosts and /dev/shm; the file system is shared, as on a
cluster, but for what `Hosts(differing=...)` shows differently on one of them. A veth pair joins each of them to a
bridge, which is their switch. Nothing outside is touched: all goes with the processes that hold the namespaces.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.helpers import ROOT, launch

TOOLS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
NEW = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
PORT = 29500  # free on a host that was just made


@cache
def missing() -> str:
    """Why hosts cannot be made here; empty where they can."""
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"hosts need the tool {tool} (Debian: apt-get install {package})"
    links = "ip link add br0 type bridge && ip link add net0 type veth peer name net1"
    tried = subprocess.run([*NEW, "sh", "-c", links], capture_output=True, text=True)
    return f"hosts need root and CAP_NET_ADMIN ({' '.join(tried.stderr.split())})" if tried.returncode else ""


@dataclass
class Host:
    """One host.

    Attributes:
        name: what `hostname` says there.
        address: of its network card, which is called `net0`.
        pid: a process in all its namespaces, as this machine numbers it.
    """

    name: str
    address: str
    pid: int

    def command(self, *words: str) -> list[str]:
        """A command line that runs `words` there, in the repository."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid"]
        return [*enter, "env", f"--chdir={ROOT}", *map(str, words)]


class Hosts:
    """Hosts that reach each other; use it as a context manager, which ends everything that still runs on them.

    Args:
        count: how many: hosta, hostb, ...
        differing: host name -> {path: what is there on this host instead}; files and directories.
    """

    def __init__(self, count: int = 2, differing: Mapping[str, Mapping[Path, Path]] | None = None):
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        self.holders: list[subprocess.Popen] = []
        self.logs: list[Path] = []
        names = [f"host{chr(ord('a') + i)}" for i in range(count)]
        addresses = {name: f"10.201.0.{i + 1}" for i, name in enumerate(names)}
        table = "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in addresses.items())
        (self.folder / "hosts").write_text(table)
        try:
            self.switch = self._hold("switch", ["ip link add br0 type bridge", "ip link set br0 up"])
            self.all = [
                Host(name, addresses[name], self._hold(name, self._own(name, dict((differing or {}).get(name, {})))))
                for name in names
            ]
            for i, host in enumerate(self.all):
                self._connect(host, i)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all hosts and what runs on them."""
        for holder in self.holders:
            holder.kill()  # process 1 of its host: the kernel ends the others there
            holder.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __getitem__(self, number: int) -> Host:
        return self.all[number]

    def start(self, host: Host, *words: str, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Start a command there; `output` reads what it prints."""
        log = self.folder / f"{len(self.logs)}-{host.name}.log"
        self.logs.append(log)
        with log.open("wb") as file:
            return subprocess.Popen(
                host.command(*words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=clean_environment(**(env or {})),
                start_new_session=True,
            )

    def output(self) -> str:
        """What all commands have printed so far."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def run(self, commands: Sequence[tuple[Host, Sequence[str], Mapping[str, str]]], timeout: float) -> launch.Result:
        """Run commands at the same time, and wait for all of them or until the time is up."""
        first = len(self.logs)
        processes = [self.start(host, *words, env=env) for host, words, env in commands]
        result = self.wait(processes, timeout)
        result.output = "\n".join(log.read_text(errors="replace") for log in self.logs[first:])
        return result

    def wait(self, processes: Sequence[subprocess.Popen], timeout: float) -> launch.Result:
        """Wait for started commands; when the time is up what is left is killed."""
        end, killed = time.monotonic() + timeout, False
        for process in processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed = True
        codes = [process.returncode for process in processes]
        return launch.Result(next((c for c in codes if c), 0), self.output(), killed, codes)

    def end(self, host: Host) -> None:
        """Take a host's power away: everything that runs on it is killed at once."""
        os.kill(host.pid, signal.SIGKILL)

    def cut(self, host: Host) -> None:
        """Pull the cable of a host: nothing comes or goes any more, and no connection is told."""
        self._set(host, "down")

    def heal(self, host: Host) -> None:
        """Plug it in again."""
        self._set(host, "up")

    def _set(self, host: Host, state: str) -> None:
        # The end at the switch, so that the host keeps its address and its routes, as with a cable or a switch port.
        self._at(self.switch, f"ip link set p-{host.name} {state}")

    def _hold(self, name: str, setup: Sequence[str]) -> int:
        """A process that waits in new namespaces after `setup`; its number."""
        ready = self.folder / f"{name}.ready"
        # The shell stays process 1 and collects orphans that end, as an init does; Slurm would wait for a zombie. It
        # outlives the end of all others, `kill -9 -1`, which ends what it waits for as well.
        stay = "while :; do sleep infinity & wait; done"
        script = " && ".join([*setup, f"touch {shlex.quote(str(ready))}", stay])
        holder = subprocess.Popen([*NEW, "sh", "-c", script], stderr=subprocess.PIPE, text=True)
        self.holders.append(holder)
        end = time.monotonic() + 60
        while not ready.exists():
            if holder.poll() is not None or time.monotonic() > end:
                holder.kill()
                raise RuntimeError(f"{name}: {holder.stderr.read()}")
            time.sleep(0.01)
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        return int(children[0])

    def _own(self, name: str, differing: Mapping[Path, Path]) -> list[str]:
        shown = {Path("/etc/hosts"): self.folder / "hosts", **differing}
        binds = [f"mount --bind {shlex.quote(str(real))} {shlex.quote(str(path))}" for path, real in shown.items()]
        return [f"hostname {name}", "mount -t tmpfs tmpfs /dev/shm", *binds, "ip link set lo up"]

    def _connect(self, host: Host, number: int) -> None:
        self._at(self.switch, f"ip link add p-{host.name} type veth peer name net0 netns {host.pid}")
        self._at(self.switch, f"ip link set p-{host.name} master br0 up")
        self._at(host.pid, f"ip addr add {host.address}/24 dev net0")
        self._at(host.pid, "ip link set net0 up")

    @staticmethod
    def _at(pid: int, command: str) -> None:
        subprocess.run(["nsenter", f"--target={pid}", "--net", *command.split()], check=True, capture_output=True)


def clean_environment(**extra: str) -> dict[str, str]:
    """Of a process on a host, as a shell there would have it: nothing of this machine's launchers."""
    inherited = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in launch.environment().items() if k not in inherited} | extra


def launchers(
    hosts: Hosts, slots: Sequence[int], script: Sequence[str], port: int = PORT
) -> dict[str, list[tuple[Host, list[str], dict[str, str]]]]:
    """What a user types on each host to start `slots` ranks there, by launcher: `deepspeed`, `torchrun`, `srun`.

    Args:
        script: a script of ours or `-m module`, and its arguments.
    """
    hostfile = hosts.folder / "hostfile"
    used = list(zip(hosts.all, slots, strict=True))
    hostfile.write_text("".join(f"{host.name} slots={n}\n" for host, n in used))
    python, first = Path(sys.executable), hosts[0]
    module, name = (["--module"], script[1:]) if script[0] == "-m" else ([], script)
    torch_module = ["-m"] if module else []
    deepspeed, torchrun = (str(python.with_name(tool)) for tool in ("deepspeed", "torchrun"))
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.name}:{port}", "--rdzv-id", "test"]
    place = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", first.name, "--master_port", str(port)]
    return {
        "deepspeed": [
            (host, [str(python), deepspeed, *place, "--node_rank", str(i), *module, *name], {})
            for i, (host, _) in enumerate(used)
        ],
        "torchrun": [
            (host, [str(python), torchrun, "--nnodes", str(len(used)), "--nproc-per-node", str(n), *meeting,
                    *torch_module, *name], {})
            for host, n in used
        ],
        "srun": [
            (host, [str(python), *script], variables)
            for (host, _), variables in zip(
                [(host, n) for host, n in used for _ in range(n)], slurm(hosts, slots), strict=True
            )
        ],
    }  # fmt: skip


def slurm(hosts: Hosts, slots: Sequence[int]) -> list[dict[str, str]]:
    """The variables that `srun` gives to each task of a step with `slots` tasks on each host, as of Slurm 23.11."""
    common = {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_NODELIST": ",".join(host.name for host in hosts.all[: len(slots)]),
        "SLURM_STEP_NUM_NODES": str(len(slots)),
        "SLURM_STEP_NUM_TASKS": str(sum(slots)),
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, slots)),
    }
    tasks = [(node, local) for node, n in enumerate(slots) for local in range(n)]
    return [
        common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        for rank, (node, local) in enumerate(tasks)
    ]
