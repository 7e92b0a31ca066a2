"""Joining the ranks leaves nothing on the machine, and what cannot work there is said in a line."""

import contextlib
import io
import os
import socket
import subprocess
import sys
import time
import types

import pytest
import torch

from mmpeft_ds.distributed import processes
from mmpeft_ds.errors import BadInput


def test_deepspeed_is_not_told_that_all_ranks_share_a_machine_while_they_meet(monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with processes.no_shared_buffers():
        assert "LOCAL_SIZE" not in os.environ
    assert os.environ["LOCAL_SIZE"] == "2"
    monkeypatch.delenv("LOCAL_SIZE")
    with processes.no_shared_buffers():
        pass
    assert "LOCAL_SIZE" not in os.environ


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=r"local rank 1.* 1 GPU"):
        processes.start()


def start_on_cuda(monkeypatch, gpus: int, is_met: bool = True, **variables: str) -> processes.Ranks:
    """`processes.start` of a machine with so many GPUs, as far as it gets without one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return start_on_cpu(monkeypatch, is_met, **variables)


def start_on_cpu(monkeypatch, is_met: bool = True, **variables: str) -> processes.Ranks:
    """`processes.start` with these variables, and without a meeting of ranks."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: is_met)
    monkeypatch.setattr(processes, "multiply_float32", lambda matmul: None)
    monkeypatch.setattr(processes.watchdog, "start", lambda *_: None)  # it meets the others in a process group
    clean = {k: v for k, v in os.environ.items() if k not in NAMES and not k.startswith("SLURM")}
    monkeypatch.setattr(os, "environ", {**clean, **variables})
    return processes.start(threads=1)


SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_JOB_ID": "123456789",
}


def test_a_slurm_task_that_sees_one_gpu_of_its_own_takes_it(monkeypatch):
    """`srun --gpus-per-task=1` numbers the one GPU 0 in every task."""
    for _ in range(2):  # a study starts more than once in a process
        ranks = start_on_cuda(monkeypatch, 1, **SRUN)
        assert (ranks.rank, ranks.local_rank, ranks.local_size) == (11, 3, 8)
        assert ranks.device == torch.device("cuda", 0) and os.environ["LOCAL_RANK"] == "0"
    ranks = start_on_cuda(monkeypatch, 8, **SRUN)
    assert ranks.device == torch.device("cuda", 3) and os.environ["LOCAL_RANK"] == "3"


# Tasks of two nodes of unequal size: node, number on it, tasks there.
UNEQUAL = [(0, 0, 3), (0, 1, 3), (0, 2, 3), (1, 0, 1)]


@pytest.mark.parametrize(("gpus", "devices"), [(1, [0, 0, 0, 0]), (4, [0, 1, 2, 0])])
def test_tasks_on_nodes_of_unequal_size_take_the_gpu_that_is_theirs_and_count_in_groups(monkeypatch, gpus, devices):
    for rank, (node, local, here) in enumerate(UNEQUAL):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        sizes = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "3,1"}
        ranks = start_on_cuda(monkeypatch, gpus, **{**SRUN, **sizes, **place})
        assert ranks == processes.Ranks(rank, 4, local, here, torch.device("cuda", devices[rank]))
        assert os.environ["LOCAL_RANK"] == str(devices[rank]), "DeepSpeed reads the device from it"
        assert os.environ["MASTER_ADDR"] == "gpu007"


def test_two_ranks_of_torchrun_inside_a_slurm_task_with_one_gpu_are_refused(monkeypatch):
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING}
    with pytest.raises(BadInput, match="1 GPU"):
        start_on_cuda(monkeypatch, 1, **torchrun, SLURM_LOCALID="0")


def place(rank: int, here: int = 4, **variables: str) -> dict[str, str]:
    local = {"LOCAL_RANK": str(rank % here), "LOCAL_WORLD_SIZE": str(here)}
    return {"RANK": str(rank), "WORLD_SIZE": str(2 * here), **local, **MEETING, **variables}


def test_a_process_that_a_script_gave_one_gpu_takes_it(monkeypatch):
    """As with `torchrun --no-python bind.sh python ...`, where bind.sh sets CUDA_VISIBLE_DEVICES=$LOCAL_RANK."""
    for rank in range(8):
        ranks = start_on_cuda(monkeypatch, 1, **place(rank, CUDA_VISIBLE_DEVICES=str(rank % 4)))
        for _ in range(2):  # a study starts more than once in a process
            assert ranks == processes.Ranks(rank, 8, rank % 4, 4, torch.device("cuda", 0))
            assert os.environ["LOCAL_RANK"] == "0"
            ranks = processes.start(threads=1)
    with pytest.raises(BadInput, match="local rank 1: this machine shows 1 GPU"):
        start_on_cuda(monkeypatch, 1, **place(1, CUDA_VISIBLE_DEVICES="0"))


def test_ranks_that_are_shown_the_same_gpu_are_refused_once_they_meet(monkeypatch):
    """`CUDA_VISIBLE_DEVICES=1 torchrun --nproc-per-node 2`: rank 1 sees what a script would have given it."""
    import deepspeed

    store, card = torch.distributed.HashStore(), types.SimpleNamespace(name="NVIDIA H100", uuid="1f-2e")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda *_, **__: None)
    monkeypatch.setattr(processes, "meeting_of_launch", lambda: "env://")
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)

    def start(rank: int) -> processes.Ranks:
        with monkeypatch.context() as own:
            return start_on_cuda(own, 1, is_met=False, **place(rank, here=2, CUDA_VISIBLE_DEVICES="1"))

    assert start(0).device == torch.device("cuda", 0)
    with pytest.raises(BadInput, match=r"rank 1: its GPU 1f-2e is another rank's too \(CUDA_VISIBLE_DEVICES=1\)"):
        start(1)
    card.uuid = "3d-4c"  # a card of its own
    assert start(1).local_rank == 1
    card.name = "NVIDIA H100 MIG 1g.10gb"  # whose parts have one number
    assert start(0).local_rank == 0


@pytest.mark.parametrize("gpus", [0, 1])
def test_processes_of_torchrun_that_are_all_called_0_know_their_number(monkeypatch, gpus):
    """`torchrun --virtual-local-rank`, also on a machine without a GPU."""
    for rank in range(8):
        shown = {"CUDA_VISIBLE_DEVICES": str(rank % 4), "GROUP_RANK": str(rank // 4), "GROUP_WORLD_SIZE": "2"}
        variables = place(rank, **shown) | {"LOCAL_RANK": "0"}
        ranks = start_on_cuda(monkeypatch, gpus, **variables) if gpus else start_on_cpu(monkeypatch, **variables)
        assert (ranks.local_rank, ranks.local_size) == (rank % 4, 4)
        assert ranks.device == (torch.device("cuda", 0) if gpus else torch.device("cpu"))


@pytest.mark.parametrize(
    "variables",
    [
        {"CUDA_VISIBLE_DEVICES": "-1", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"},
        {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"},
        {"CUDA_VISIBLE_DEVICES": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "3"},  # unequal nodes
    ],
)
def test_the_first_process_of_a_machine_is_called_0(monkeypatch, variables):
    assert start_on_cpu(monkeypatch, **place(4, **variables)).local_rank == 0


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[003-010,012],cpu1", "gpu003"),
        ("gpu[12,14-15]-ib,x[1-2]", "gpu12-ib"),
        ("rack[0-1]node[3-4]", "rack0node3"),
    ],
)
def test_the_first_node_of_slurm_is_found_without_scontrol(told, nodes, first):
    meeting = told(**{**SRUN, "SLURM_STEP_NODELIST": nodes})
    assert meeting["MASTER_ADDR"] == first
    assert 20000 <= int(meeting["MASTER_PORT"]) < 32768, "else a connection of another program may hold it"


@pytest.mark.parametrize(
    ("tasks", "node", "here"),
    [("8(x2)", "1", 8), ("2,1", "0", 2), ("2,1", "1", 1), ("4(x2),3,1(x2)", "2", 3), ("4(x2),3,1(x2)", "4", 1),
     ("4(x2),3", "", 4)],
)  # fmt: skip
def test_each_node_of_slurm_has_its_own_number_of_tasks(told, tasks, node, here):
    """The ranks of a small last node are no part of a larger group."""
    variables = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks} | ({"SLURM_NODEID": node} if node else {})
    assert told(**variables)["LOCAL_WORLD_SIZE"] == str(here)


@pytest.mark.parametrize(("matmul", "precision"), [("tf32", "tf32"), ("float32", "ieee")])
def test_how_cuda_multiplies_float32_is_what_the_recipe_says(matmul, precision):
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    try:
        processes.multiply_float32(matmul)
        assert [setting.fp32_precision for setting in settings] == [precision, precision]
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def told(monkeypatch):
    """What a process with these variables takes for its place."""

    def start(**variables: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if k not in NAMES and not k.startswith(("SLURM", "OMPI", "PMI"))}
        monkeypatch.setattr(os, "environ", {**clean, **variables})
        processes.environment()
        return {name: os.environ[name] for name in NAMES}

    return start


def test_one_process_is_alone(told):
    assert told()["WORLD_SIZE"] == "1"
    assert told(SLURM_NTASKS="4", SLURM_PROCID="0")["WORLD_SIZE"] == "1", "the script of sbatch itself, without srun"


def test_a_process_that_is_alone_meets_itself_beside_another_that_has_the_same_variables(told):
    """A process started from one of ours inherits them; a number drawn beforehand would be taken by then."""
    script = "import torch.distributed as d; d.init_process_group('gloo'); print(d.get_world_size()); input()"
    told()
    inherited = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", script], env=inherited, **pipes) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in both] == ["1\n", "1\n"]
    finally:
        for process in both:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    "names",
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ],
)
def test_mpirun_is_understood_on_one_machine_and_wants_an_address_on_several(told, names):
    first, second = (told(**dict(zip(names, (rank, "2", rank, "2"), strict=True))) for rank in "01")
    assert (first["RANK"], second["RANK"]) == ("0", "1") and second["LOCAL_RANK"] == "1"
    assert all(
        first[name] == second[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    )
    assert first["WORLD_SIZE"] == "2"
    across = dict(zip(names, ("2", "4", "0", "2"), strict=True))
    with pytest.raises(BadInput, match="MASTER_ADDR"):
        told(**across)
    assert told(**across, **MEETING)["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_PROCID=1.*srun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2.*train alone"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID"),
        (MEETING | {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=x.*no number"),
        (MEETING | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "abc"}, "MASTER_PORT=abc"),
        (
            MEETING | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "65536"},
            "MASTER_PORT=65536.*65535",
        ),
        (MEETING | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "0"}, "MASTER_PORT=0.*from 1"),
        (MEETING | {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2.*WORLD_SIZE=2.*the last one is 1"),
        (MEETING | {"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=0.*one rank or more"),
        # a container that was given some of srun's variables
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2.*not SLURM_PROCID, SLURM_LOCALID"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "not SLURM_LOCALID"),
        ({**SRUN, "SLURM_JOB_ID": "abc"}, "SLURM_JOB_ID=abc.*no number"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID=x.*no number"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x.*no number"),
    ],
)
def test_processes_that_would_each_think_they_are_alone_are_refused(told, variables, says):
    with pytest.raises(BadInput, match=says):
        told(**variables)


def said_while_it_waits() -> str:
    # Not by capsys.readouterr() again and again: what a thread writes while that reads is lost.
    deadline = time.monotonic() + 120
    with contextlib.redirect_stderr(io.StringIO()) as said, processes.saying_who_is_awaited(seconds=0.01):
        while not said.getvalue().endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.01)
    return said.getvalue()


def test_a_process_that_is_alone_does_not_speak_of_other_ranks(told):
    told()
    said = said_while_it_waits()
    assert "DeepSpeed compiles" in said and "ranks" not in said


def test_ranks_that_do_not_come_are_said_to_be_awaited(told, capsys):
    told(**MEETING, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    said = said_while_it_waits()
    assert said.startswith("rank 0: waiting for all 2 ranks to meet at 127.0.0.1:") and said.count("\n") == 1
    with processes.saying_who_is_awaited(seconds=0.2):
        pass
    time.sleep(0.4)
    assert not capsys.readouterr().err, "the ranks have met in time"


@pytest.mark.parametrize("size", ["1", "2"])
def test_a_host_that_this_machine_does_not_know_is_named_while_ranks_wait(told, monkeypatch, size):
    def unknown(*args: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    told(RANK="0", WORLD_SIZE=size, LOCAL_RANK="0", MASTER_ADDR="node1", MASTER_PORT="29500")
    said = said_while_it_waits()
    assert "does not know the host MASTER_ADDR=node1 ([Errno -2] Name or service not known)" in said


def test_ranks_that_never_met_end_in_one_line(told):
    """Torch's message holds a stack of C++ calls."""
    told(**MEETING, RANK="1", WORLD_SIZE="2", LOCAL_RANK="0")
    error = torch.distributed.DistNetworkError("The client socket has timed out after 1800000ms\nframe #0: c10d")
    line = processes.why_not_met(error)
    assert line.startswith("rank 1 of 2 did not meet the others at 127.0.0.1:29500 (The client socket has timed out")
    assert "frame" not in line
    taken = torch.distributed.DistNetworkError("The server socket has failed to listen ... (errno: 98 - EADDRINUSE)")
    assert processes.why_not_met(taken).startswith("port 29500 is taken")
