"""Worker processes: signals, faults and deaths of the process that uses them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest
import torch

from mmpeft_ds import unused_imports
from mmpeft_ds.data import shared_memory
from mmpeft_ds.data import workers as worker_pools
from mmpeft_ds.data.workers import WorkerPool
from mmpeft_ds.errors import BadInput
from tests.helpers import launch


def square(x):
    if x == 13:
        raise BadInput("13: unlucky. Use 14.")
    if x < 0:
        raise ZeroDivisionError("a fault of ours")
    return x * x


def tensors(_):
    """Some that travel inside the batch, some too large for it, some of odd layouts."""
    numbers = torch.arange(60.0).view(3, 4, 5)
    return [
        torch.tensor(7),
        torch.empty(0, 3, dtype=torch.int32),
        torch.tensor([True, False]),
        numbers.bfloat16(),
        numbers.permute(2, 0, 1),
        numbers.expand(2, 3, 4, 5),
        torch.arange(40_000).view(-1, 2),
        torch.arange(600_000, dtype=torch.uint8).view(3, -1).t(),
        torch.eye(3).to_sparse(),
        torch.nn.Parameter(torch.ones(2)),
    ]


def wide(x):
    """More than is sent inside a batch."""
    return torch.full((20_000,), x)


def slow_pid(x):
    time.sleep(0.05)
    return x, os.getpid()


def worker_facts(_):
    import torch._dynamo

    ignored = [signal.getsignal(s) is signal.SIG_IGN for s in (signal.SIGINT, signal.SIGTERM)]
    # born with them blocked: a signal before a worker ignores them must not end it either
    ignored += [s in signal.pthread_sigmask(signal.SIG_BLOCK, []) for s in (signal.SIGINT, signal.SIGTERM)]
    loaded = "deepspeed" in sys.modules or unused_imports.is_real("torch._dynamo")
    return os.getpid(), ignored, torch.get_num_threads(), loaded


def run_script(tmp_path, body: str, cwd=None) -> subprocess.Popen:
    """A process that uses a pool of 2 workers as a training run would; prints the ids of its workers."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, os, signal, sys, time
            from mmpeft_ds.data.workers import WorkerPool
            from tests.data.test_workers import square
            print("main runs", flush=True)
            if __name__ == "__main__":
                pool = WorkerPool(square, 2, 2)
                pool.wait()
                results = pool.run(range(100, 200))
                next(results)
                print(*[p.pid for p in multiprocessing.active_children()], flush=True)
            """
        )
        + textwrap.indent(textwrap.dedent(body), "    ")
    )
    command, env = [sys.executable, str(script)], launch.environment()
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=env, cwd=cwd)


def pids_of(process) -> list[int]:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line[0].isdigit():
            # The script itself is not run again in the workers.
            assert lines.count("main runs\n") == 1
            return [int(pid) for pid in line.split()]
    raise AssertionError(f"ended early: {lines}")


def gone(pids, seconds=20) -> bool:
    end = time.monotonic() + seconds
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_a_later_run_ends_the_earlier_one(workers):
    before = set(multiprocessing.active_children())  # of a stream of another test that nobody has closed yet
    pool = WorkerPool(square, workers, 2)
    pool.wait()
    first = pool.run(range(10))
    assert next(first) == 0
    assert list(pool.run([7, 3, 5])) == [49, 9, 25]
    pool.close()
    assert set(multiprocessing.active_children()) <= before


def test_tensors_of_every_kind_come_over_as_they_were():
    pool = WorkerPool(tensors, 1, 2)
    pool.wait()
    found = list(pool.run(range(3)))
    pool.close()  # what came lives on without the worker
    for row in found:
        for got, want in zip(row, tensors(0), strict=True):
            assert (got.dtype, got.shape, got.layout) == (want.dtype, want.shape, want.layout)
            assert got.requires_grad == want.requires_grad
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        row[4][0, 0, 0] = 5  # and may be written to
    assert found[0][0] == 7


def test_a_caller_may_keep_more_large_tensors_than_a_worker_may_open_files():
    pool = WorkerPool(wide, 1, 2)
    pool.wait()
    files = len(os.listdir("/proc/self/fd"))
    kept = list(pool.run(range(3 * shared_memory.MOST)))
    assert len(os.listdir("/proc/self/fd")) <= files + shared_memory.MOST
    assert all(torch.equal(row, wide(i)) for i, row in enumerate(kept))
    del kept[:]
    assert sum(int(row[-1]) for row in pool.run(range(5))) == 10
    pool.close()


def test_a_worker_that_is_killed_with_large_tensors_on_their_way_is_told_in_one_line():
    pool = WorkerPool(wide, 1, 4)
    pool.wait()
    found = pool.run(range(100))
    assert torch.equal(next(found), wide(0))
    os.kill(pool._processes[0].pid, signal.SIGKILL)
    with pytest.raises(BadInput, match="a loader process of this rank was killed"):
        list(found)
    pool.close()


def test_nobody_waits_for_workers_to_start_and_the_hand_over_loses_nothing():
    pool = WorkerPool(slow_pid, 2, 2)
    found = list(pool.run(range(400)))
    pool.close()
    assert [x for x, _ in found] == list(range(400))
    here = [pid == os.getpid() for _, pid in found]
    assert here[0] and not here[-1]
    assert here == sorted(here, reverse=True)


def test_a_pool_that_is_closed_while_it_starts_leaves_the_workers_of_another_alone():
    first, second = WorkerPool(square, 1, 2), WorkerPool(square, 1, 2)
    first.close()
    for pool in (first, second):
        pool.wait()
    time.sleep(0.2)  # for the signal of a child that ended
    assert len(multiprocessing.active_children()) == 1
    assert list(second.run([2, 3])) == [4, 9]
    second.close()


def test_bad_input_keeps_its_line_and_faults_keep_their_traceback():
    pool = WorkerPool(square, 1, 2)
    pool.wait()
    with pytest.raises(BadInput, match=r"^13: unlucky\. Use 14\.$"):
        list(pool.run([1, 13]))
    assert list(pool.run([2])) == [4]
    with pytest.raises(ZeroDivisionError, match="in square"):
        list(pool.run([-1]))
    pool.close()


def test_workers_ignore_signals_use_one_thread_and_load_neither_deepspeed_nor_the_compiler():
    pool = WorkerPool(worker_facts, 1, 2)
    pool.wait()
    (facts,) = pool.run([0])
    assert facts[0] != os.getpid() and facts[1:] == ([True] * 4, 1, False)
    for sign in (signal.SIGINT, signal.SIGTERM):
        os.kill(facts[0], sign)
    assert list(pool.run([0]))[0][0] == facts[0]
    pool.close()
    assert gone([facts[0]])


def test_a_signal_to_the_group_leaves_the_main_process_its_workers_until_it_exits(tmp_path):
    process = run_script(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        os.killpg(0, signal.SIGTERM)
        os.killpg(0, signal.SIGINT)
        time.sleep(0.5)
        assert len(list(results)) == 99
        keep = pool.run(range(100, 200))
        assert next(keep) == 10_000
        raise SystemExit(2)
        """,
    )
    pids = pids_of(process)
    server = {psutil.Process(p).ppid() for p in pids}
    assert len(pids) == 2
    assert process.wait(60) == 2
    assert gone([*pids, *server])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 looks into the current folder in any case")
def test_a_package_of_the_same_name_in_the_current_folder_is_not_what_workers_import(tmp_path):
    """The fork server of Python 3.11 looks into the current folder before it looks at the path of its parent."""
    here = tmp_path / "old_checkout"
    for package in ("mmpeft_ds", "mmpeft_ds/data"):
        (here / package).mkdir(parents=True)
        (here / package / "__init__.py").write_text("")
    (here / "mmpeft_ds/data/fork_server.py").write_text("import mmpeft_ds.data.loader_of_an_old_version")
    process = run_script(tmp_path, "print(next(results), os.environ.get('PYTHONSAFEPATH'), flush=True)", cwd=here)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.splitlines()[-1] == f"{101 * 101} None"


def test_workers_do_not_outlive_a_killed_main_process(tmp_path):
    process = run_script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    pids = pids_of(process)
    server = {psutil.Process(p).ppid() for p in pids}
    assert process.wait(60) == -signal.SIGKILL
    assert gone([*pids, *server])


def test_workers_that_pin_memory_are_started_on_the_gpu_of_this_rank(monkeypatch):
    """A new thread stands on GPU 0, and torch's pinning thread takes the GPU of the thread that starts the loader."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: seen.append((threading.current_thread().name, gpu)))
    monkeypatch.setattr(worker_pools, "DataLoader", lambda *_, **given: seen.append(("made", 0)) or [])
    pool = WorkerPool(abs, workers=1, prefetch=1, pin_memory=True)
    pool.wait()
    (thread, gpu) = seen[-1]
    assert gpu == 3 and thread != threading.current_thread().name
    seen.clear()
    WorkerPool(abs, workers=1, prefetch=1, pin_memory=False).wait()
    assert seen == [("made", 0)], "nothing to pin, no GPU to open"
