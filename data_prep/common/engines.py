"""Executors of shard jobs: processes of this machine, or Ray tasks on a cluster with a shared file system."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from mmpeft_ds.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("local", "ray")


def run_jobs(
    work: Callable[[Any], Any], jobs: Sequence[Any], engine: str, processes: int
) -> Iterator[tuple[int, Any]]:
    """Call `work` on every job; (index of the job, result) as they finish. The first error ends it.

    Args:
        work: a module-level function.
        processes: of this machine (`local`, 1 runs in this process) or CPUs asked of Ray (0: all it has).
    """
    if engine == "ray":
        return _ray(work, jobs, processes)
    if processes == 1 or len(jobs) <= 1:
        return ((i, work(job)) for i, job in enumerate(jobs))
    # Processes start here, not at the first `next`: a progress bar's thread must not run yet when this one forks.
    pool = ProcessPoolExecutor(min(processes or os.cpu_count() or 1, len(jobs)), initializer=_die_with_parent)
    return _local(pool, {pool.submit(work, job): i for i, job in enumerate(jobs)})


def _local(pool: ProcessPoolExecutor, futures: dict[Future, int]) -> Iterator[tuple[int, Any]]:
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise BadInput(
            "a worker of prepare.py was killed, mostly for want of memory. Lower --processes if so; the same command "
            "continues."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _die_with_parent() -> None:
    """End this worker when its parent is gone: a killed parent leaves workers waiting for jobs for ever otherwise."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def python_path() -> str:
    """PYTHONPATH of Ray's workers: the project, and what this process was given."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))


def _ray(work: Callable[[Any], Any], jobs: Sequence[Any], cpus: int) -> Iterator[tuple[int, Any]]:
    try:
        import ray
    except ImportError as error:
        raise BadInput(
            "--engine ray: Ray is not installed: pip install 'mmpeft_ds[ray]', or --engine local."
        ) from error
    own = not ray.is_initialized()
    if own:
        # Workers import data_prep from the same path: a cluster needs the project on a shared file system.
        ray.init(
            num_cpus=None if "RAY_ADDRESS" in os.environ else cpus or None,
            # It replaces that of this process, which may name folders that the source needs.
            runtime_env={"env_vars": {"PYTHONPATH": python_path()}},
            log_to_driver=False,
        )
    try:
        remote = ray.remote(work)
        waiting = {remote.remote(job): i for i, job in enumerate(jobs)}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1)
            for reference in ready:
                try:
                    yield waiting.pop(reference), ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, BadInput) else error) from None
    finally:
        if own:
            ray.shutdown()
