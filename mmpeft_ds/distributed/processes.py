"""Processes of a run: joining the group that a launcher laid out, and what each process sets for itself."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import socket
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmpeft_ds import leftovers
from mmpeft_ds.distributed import build_lock, host_caches, own_process, watchdog
from mmpeft_ds.distributed.own_store import meeting_of_launch
from mmpeft_ds.errors import BadInput
from mmpeft_ds.quiet import quiet, without_lines

_OPERATOR = "deepspeed_shm_comm"  # what DeepSpeed compiles for the CPU at its first use
_NUMBER = "MMPEFT_LOCAL_RANK"  # of a process that calls its only GPU 0, for a second start in it
STALL, TIMEOUT = 60.0, 1800.0  # loading a large base from a slow disk takes minutes


@dataclass(frozen=True)
class Ranks:
    """The position of this process among all.

    Attributes:
        rank, world_size: over all machines.
        local_rank, local_size: on this machine.
        device: `cuda:K` or `cpu`.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    device: torch.device


def start(
    threads: int = 0, seed: int = 0, matmul: str = "float32", stall: float = STALL, timeout: float = TIMEOUT
) -> Ranks:
    """Join the process group that `deepspeed`, `torchrun`, `srun` or nobody (one process) has laid out.

    Args:
        threads: of torch per rank; 0: physical cores of this machine / ranks on it.
        seed: of torch's generator, the same on every rank.
        matmul: `tf32` or `float32`, how CUDA multiplies float32 matrices.
        stall: seconds after which a rank that waits for others says for whom.
        timeout: seconds after which it ends.

    Raises:
        BadInput: more ranks on this machine than GPUs, or the port of rank 0 is taken.
    """
    environment()
    local_rank, device = own_device()
    local_size, cuda = int(os.environ["LOCAL_WORLD_SIZE"]), device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    multiply_float32(matmul)
    torch.set_num_threads(threads or max(1, _cores() // local_size))
    if not cuda:
        own_process.keep_freed_memory()
    quiet()
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    build_lock.install()
    if local_rank == 0:
        leftovers.remove_of_the_dead()
    if not torch.distributed.is_initialized():
        limit = datetime.timedelta(
            seconds=timeout + 2 * min(stall, 60.0)
        )  # the watchdog, which knows who, comes first
        options = {"auto_mpi_discovery": False, "verbose": False, "timeout": limit, "init_method": meeting_of_launch()}
        with no_shared_buffers(), without_lines("built successfully"), saying_who_is_awaited(stall):
            try:
                deepspeed.init_distributed("nccl" if cuda else "gloo", **options)
            except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
                raise BadInput(why_not_met(error)) from error
        if cuda:
            refuse_shared_gpu(device, torch.distributed.distributed_c10d._get_default_store())
    if not cuda:
        # Without it DeepSpeed asks `numactl`, a new process, for the number of devices in every step of ZeRO-3.
        os.environ.setdefault("LOCAL_SIZE", str(local_size))
    torch.manual_seed(seed)
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, local_size, device)
    watchdog.start(ranks.rank, ranks.world_size, stall, timeout)
    return ranks


def own_device() -> tuple[int, torch.device]:
    """Number of this process on its machine, and its device, once `environment` has been called.

    Raises:
        BadInput: more ranks on this machine than GPUs.
    """
    cuda, local_rank = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if number := _virtual_number() or (cuda and _number_with_own_gpu()):
        local_rank = number
        os.environ.update({"LOCAL_RANK": "0", _NUMBER: str(number)})  # DeepSpeed reads the number of the GPU from it
    elif cuda and local_rank >= torch.cuda.device_count():
        raise BadInput(
            f"local rank {local_rank}: this machine shows {torch.cuda.device_count()} GPU(s). Start as many ranks, or "
            "hide the GPUs and train on the CPU: CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu."
        )
    return local_rank, torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")


def refuse_shared_gpu(device: torch.device, store: torch.distributed.Store) -> None:
    """Refuse a GPU that another rank of the run has: `CUDA_VISIBLE_DEVICES=1` before two ranks shows both the same,
    as to a rank that a script has given its own. NCCL would say so in a traceback, after the base was loaded.

    Args:
        store: of the ranks that have met, in which each enters its GPU once.

    Raises:
        BadInput: on all ranks of a GPU but the first.
    """
    card = torch.cuda.get_device_properties(device)
    uuid = getattr(card, "uuid", None)
    if uuid is None or "MIG" in card.name:  # parts of a GPU share its number
        return
    if store.add(f"mmpeft_ds/gpu/{uuid}", 1) > 1:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise BadInput(
            f"rank {os.environ['RANK']}: its GPU {uuid} is another rank's too"
            f"{f' (CUDA_VISIBLE_DEVICES={shown})' if shown else ''}. Start as many ranks on this machine as it shows "
            "GPUs, or give each rank one of its own."
        )


def _number_with_own_gpu() -> int:
    """Number on this machine of a process that sees one GPU of its own, else 0: a Slurm task of `--gpus-per-task=1`,
    or one that a script between launcher and Python gave `CUDA_VISIBLE_DEVICES=$LOCAL_RANK`."""
    if torch.cuda.device_count() != 1:
        return 0
    env = os.environ
    task = _number(env, "SLURM_LOCALID")
    started_by_srun = env["LOCAL_RANK"] in ("0", str(task))  # not by torchrun inside it
    given = env["LOCAL_RANK"] if env["LOCAL_RANK"] != "0" else env.get(_NUMBER, "0")
    by_script = env.get("CUDA_VISIBLE_DEVICES") == given  # a machine with one GPU calls it 0, in every process
    return (started_by_srun and task) or (int(given) if by_script else 0)


def _virtual_number() -> int:
    """Number on this machine of a process of `torchrun --virtual-local-rank`, which calls each 0 and shows it one GPU;
    else 0. Torch says it nowhere: it is counted from the number of the machine, where all have equally many ranks."""
    env = os.environ
    shown = env.get("CUDA_VISIBLE_DEVICES", "")
    if "GROUP_RANK" not in env or env["LOCAL_RANK"] != "0" or shown in ("", "-1") or "," in shown:
        return 0
    here = int(env["LOCAL_WORLD_SIZE"])
    equal = here * int(env["GROUP_WORLD_SIZE"]) == int(env["WORLD_SIZE"])
    number = int(env["RANK"]) - int(env["GROUP_RANK"]) * here
    return number if equal and 0 < number < here else 0


def multiply_float32(matmul: str) -> None:
    """Let CUDA multiply float32 matrices in `tf32` or in `float32`; convolutions alike. The CPU knows only float32."""
    for setting in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        setting.fp32_precision = "tf32" if matmul == "tf32" else "ieee"


@contextlib.contextmanager
def saying_who_is_awaited(seconds: float = 60) -> Iterator[None]:
    """Print one line if the ranks have not met after `seconds`; torch itself waits half an hour without a word."""
    env = os.environ
    line = (
        f"rank {env['RANK']}: waiting for all {env['WORLD_SIZE']} ranks to meet at {_meeting_place()}. If this does "
        "not end, see that all of them were started, and that their machines reach this address."
    )
    if env["WORLD_SIZE"] == "1":  # nobody else to wait for, but the compiler, or another process that compiles
        line = "starting takes long: DeepSpeed compiles its operator, or waits for a process that does."

    def say() -> None:
        said = _unknown_host() or line  # which may take a while
        if not timer.finished.is_set():
            print(said, file=sys.stderr, flush=True)

    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _unknown_host() -> str:
    """A line where this machine does not know the name of rank 0's; torch asks for it again until its limit ends.

    No error, since a name may come late: that of a pod is known once the pod runs.
    """
    host = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is empty or too long
        return f"rank {os.environ['RANK']}: this machine does not know the host MASTER_ADDR={host} ({error}). Waiting."
    return ""


def _meeting_place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def why_not_met(error: Exception) -> str:
    """One line about ranks that did not meet, in place of torch's, which holds a stack of C++ calls."""
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return (
            f"port {os.environ['MASTER_PORT']} is taken: another run is on this machine, or the last one is "
            "still saving. Wait for it, or give the launcher another --master_port."
        )
    return (
        f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at {_meeting_place()} "
        f"({str(error).splitlines()[0]}). See that all ranks were started, and that their machines reach this address."
    )


def environment() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where the launcher did not.

    Raises:
        BadInput: variables that name several processes, but not how they meet, or that are no possible numbers.
    """
    _lay_out(os.environ)
    _check_numbers(os.environ)


def _check_numbers(env: Any) -> None:
    """Refuse numbers that no launcher sets; torch ends in a traceback, or waits for ranks that never come."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not env[name].isdecimal():
            raise BadInput(f"{name}={env[name]} is set, which is no number. Set it to one, or start by a launcher.")
    lowest = 0 if env["WORLD_SIZE"] == "1" else 1  # 0: a free one, which only a rank that is alone may take
    if not lowest <= int(env["MASTER_PORT"]) <= 65535:
        raise BadInput(f"MASTER_PORT={env['MASTER_PORT']} is set, which is no port. Set one from 1 to 65535.")
    if int(env["WORLD_SIZE"]) < 1:
        raise BadInput(f"WORLD_SIZE={env['WORLD_SIZE']} is set: a run has one rank or more.")
    if int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        raise BadInput(
            f"RANK={env['RANK']} is set, but WORLD_SIZE={env['WORLD_SIZE']}: ranks are counted from 0, so the last "
            f"one is {int(env['WORLD_SIZE']) - 1}."
        )


def _lay_out(env: Any) -> None:
    """Fill in what the launcher did not set. Raises BadInput."""
    env.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers fork; the tokenizer's threads would not survive
    host_caches.set_folders(env)
    if "RANK" in env:  # deepspeed, torchrun, or somebody by hand
        missing = [n for n in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in env]
        if missing:
            raise BadInput(f"RANK={env['RANK']} is set, but not {', '.join(missing)}. Set all of them, or none.")
        env.setdefault("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))
        return
    if "SLURM_STEP_NUM_TASKS" in env:  # srun; a bare process inside salloc has SLURM_NTASKS but no step
        if missing := [n for n in ("SLURM_PROCID", "SLURM_LOCALID") if n not in env]:
            raise BadInput(
                f"SLURM_STEP_NUM_TASKS={env['SLURM_STEP_NUM_TASKS']} is set, but not {', '.join(missing)}. A "
                "container needs all variables of srun, or none."
            )
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
        env.setdefault("LOCAL_WORLD_SIZE", str(_tasks_here(env)))
        env.setdefault("MASTER_ADDR", _first_host(env))
        # Below 32768, where Linux begins to hand out ports to outgoing connections.
        env.setdefault("MASTER_PORT", str(20000 + _number(env, "SLURM_JOB_ID") % 10000))
        return
    if any(names[0] in env for names in _MPI):
        _from_mpi(env)
        return
    if _number(env, "SLURM_PROCID") or _number(env, "WORLD_SIZE") > 1:
        named = "SLURM_PROCID" if _number(env, "SLURM_PROCID") else "WORLD_SIZE"
        raise BadInput(
            f"{named}={env[named]} says that there are several processes, but not how they meet; each would train "
            "alone. Start them by srun, torchrun, mpirun or deepspeed, or set RANK, WORLD_SIZE, LOCAL_RANK, "
            "MASTER_ADDR and MASTER_PORT."
        )
    # Port 0: torch takes a free one as it listens, so no other process can be first, and nobody else has to know it.
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    env.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def _number(env: Any, name: str) -> int:
    """A variable of a launcher, 0 where it is empty or not there. Raises BadInput."""
    value = env.get(name) or "0"
    if not value.isdecimal():
        raise BadInput(f"{name}={value} is set, which is no number. Set it to one, or start by a launcher.")
    return int(value)


# What mpirun of Open MPI, and of MPICH and Intel MPI, calls RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def _from_mpi(env: Any) -> None:
    """The variables of torch from those of mpirun. Raises BadInput."""
    names = next(names for names in _MPI if names[0] in env)
    missing = [name for name in names if name not in env]
    rank, size, local_rank, local_size = (env.get(name, "") for name in names)
    alone = size == "1" or local_size == size  # all of them on this machine
    if missing and size != "1":
        raise BadInput(f"{names[0]}={rank} is set, but not {', '.join(missing)}. Start by torchrun or deepspeed.")
    if not alone and not {"MASTER_ADDR", "MASTER_PORT"} <= set(env):
        raise BadInput(
            f"mpirun on several machines ({names[1]}={size}, {names[3]}={local_size}): name where rank 0 listens: "
            "mpirun -x MASTER_ADDR=node1 -x MASTER_PORT=29500 ..."
        )
    env.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=local_rank or "0", LOCAL_WORLD_SIZE=local_size or "1")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    # The same for all processes of a job, another for another one.
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or env.get("PMI_ID") or str(os.getppid())
    env.setdefault("MASTER_PORT", str(20000 + zlib.crc32(job.encode()) % 10000))


def operator_is_built() -> bool:
    """Whether DeepSpeed's operator for the CPU is there; if not, the first start on this machine compiles it."""
    from torch.utils import cpp_extension

    return (Path(cpp_extension._get_build_directory(_OPERATOR, verbose=False)) / f"{_OPERATOR}.so").is_file()


@contextlib.contextmanager
def no_shared_buffers() -> Iterator[None]:
    """Context in which DeepSpeed on CPU does not allocate 69 MB per rank in /dev/shm, which it would never free.

    Only its inference all-reduce would use them. They stay after the run under a name that holds the port, so every
    launch costs that much memory until the machine restarts, and in a container with 64 MB of /dev/shm they leave no
    room for the batches of loader workers. DeepSpeed makes them where LOCAL_SIZE says that all ranks share a machine.
    """
    before = os.environ.pop("LOCAL_SIZE", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["LOCAL_SIZE"] = before


def _first_host(env: Any) -> str:
    """The first node of a Slurm list such as `gpu[003-010,012],cpu1`; few containers have scontrol to ask."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "127.0.0.1")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", nodes).split(",")[0]


def _tasks_here(env: Any) -> int:
    """Tasks of this node, out of Slurm's list such as `4(x2),3`, which is in the order of the node numbers.

    The largest entry would be wrong on a node with fewer: its ranks would be counted to a group that is not there.
    """
    listed = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    tasks = [int(count) for count, times in listed for _ in range(int(times or 1))]
    node = env.get("SLURM_NODEID", "")
    return tasks[int(node)] if node.isdecimal() and int(node) < len(tasks) else max(tasks)


def _cores() -> int:
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)
