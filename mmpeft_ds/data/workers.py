"""Worker processes that make batches, which neither inherit from the training process nor disturb it.

They are forked by a fork server: a fresh process that imports once what the workers need. A plain fork of a training
process would copy the locks of its threads, its CUDA context and its connections to other ranks, which would then
outlive it: a killed rank would look alive to the others.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import pickle
import pickletools
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import mmpeft_ds
from mmpeft_ds import leftovers, stop
from mmpeft_ds.data import shared_memory
from mmpeft_ds.errors import BadInput

# Largest tensor, in bytes, that is sent inside its batch. Larger ones are put into shared memory, unless the receiver
# keeps so many that there is none for more: torch's own way needs an open file for each, and would hang without.
INLINE = 1 << 16
# The buffers of this process, if it is a worker.
_SENDER: shared_memory.Sender | None = None
# Seconds of waiting for a batch after which the loader looks whether its workers live. The kernel tells their end to
# the fork server alone, and torch's own 5 s, while all ranks wait for this one, are long.
LOOK = 0.5
# Threads that start workers; see `_end_server`.
_STARTING: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
# Pools of one process start one after the other: which children are new is what a pool takes for its own workers.
_ONE_START = threading.Lock()
# The fork server imports it before it forks the first worker.
PRELOAD = "mmpeft_ds.data.fork_server"


class WorkerPool:
    """Maps a function over requests in worker processes, in order.

    The workers start in the background, since the imports of the fork server take seconds. Until they run, this
    process makes the results itself.

    Args:
        make: request -> result; must pickle if there are workers.
        workers: number of processes; 0: `make` is called in this process when a result is taken.
        prefetch: results that each worker prepares ahead.
        pin_memory: put results that have a method `pin_memory` into pinned memory.
    """

    def __init__(self, make: Callable[[Any], Any], workers: int, prefetch: int, pin_memory: bool = False):
        self.make, self.pin_memory, self._requests, self._processes = make, pin_memory, _Requests(), []
        self._loader, self._running, self._starting, self._failure = None, None, None, None
        self._started, self._closed, self._closing = False, False, threading.Lock()
        # A new thread starts on GPU 0, where every rank of the machine would then open a context.
        self._gpu = torch.cuda.current_device() if pin_memory and torch.cuda.is_available() else None
        if workers == 0:
            return
        leftovers.take_name()
        payload = pickle.dumps(make)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOAD, *_modules_in(payload)])
        self._loader = DataLoader(
            _Maker(payload),
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            collate_fn=_unchanged,
            prefetch_factor=prefetch,
            persistent_workers=True,
            worker_init_fn=_init_worker,
            multiprocessing_context=context,
            pin_memory=pin_memory,
        )
        self._end = weakref.finalize(self, _kill, self._processes)
        self._starting = threading.Thread(target=self._start, args=(b"__main__" in payload,), daemon=True)
        _STARTING.add(self._starting)
        self._starting.start()

    def run(self, requests: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of `requests`. A later call ends the earlier one.

        Raises:
            BadInput: as `make` raised it, or when a worker has been killed.
        """
        self._stop()
        self._running = self._here(iter(requests)) if self._loader is None else self._there(iter(requests))
        return self._running

    def wait(self) -> None:
        """Return when all workers run."""
        if self._starting is not None:
            self._starting.join()

    def close(self) -> None:
        """End the workers at once, since they have nothing to lose; those that still start end when they have."""
        self._stop()
        with self._closing:
            self._closed = True
            self._let_go()

    def _let_go(self) -> None:
        _kill(self._processes)
        if self._starting is None or self._started:
            self._loader = None

    def _stop(self) -> None:
        """End the iterator of the last `run`, which would otherwise keep the workers alive while it is referenced."""
        if self._running is not None:
            self._running.close()
        self._running = None

    def _start(self, needs_main: bool) -> None:
        with _ONE_START:
            self._start_alone(needs_main)
        # Registered after the loader's own clean-up, so that it runs before it: at exit that one would wait for ever
        # for the workers, which ignore SIGTERM.
        atexit.register(self._end)
        with self._closing:
            self._started = True
            if self._closed:
                self._let_go()

    def _start_alone(self, needs_main: bool) -> None:
        if self._closed:
            return
        before = set(multiprocessing.active_children())
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)  # of this thread, whose GPU the loader's pinning thread takes
            with _main_hidden(not needs_main), _signals_held(), _imports_of_this_process():
                # There are no requests yet, so this only starts the workers, which persist.
                running = iter(self._loader)
                # By a proxy, since an iterator that held itself would end only with the next garbage collection.
                look = type(running)._try_get_data
                running._try_get_data = functools.partial(look, weakref.proxy(running), LOOK)
        except BaseException as error:  # noqa: BLE001 - raised again where results are taken
            self._failure = error
        self._processes += [p for p in multiprocessing.active_children() if p not in before]

    def _here(self, requests: Iterator[Any]) -> Iterator[Any]:
        for request in requests:
            result = self.make(request)
            yield result.pin_memory() if self.pin_memory and hasattr(result, "pin_memory") else result

    def _there(self, requests: Iterator[Any]) -> Iterator[Any]:
        here = self._here(requests)
        while self._starting.is_alive():
            try:
                yield next(here)
            except StopIteration:
                return
        if isinstance(self._failure, (EOFError, OSError)):
            # A signal to the whole group has ended the fork server during its imports: continue without workers.
            yield from here
            return
        if self._failure is not None:
            raise self._failure
        self._requests.pending = requests
        with _naming_the_lost():
            for result in iter(self._loader):
                if isinstance(result, BadInput):
                    raise result
                yield result


class _Requests(Sampler):
    """The requests to the workers, replaced for every epoch."""

    pending: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.pending


class _Maker(Dataset):
    """`make` as a data set; unpickled once in each worker."""

    def __init__(self, payload: bytes):
        self.payload, self.make = payload, None

    def __getitem__(self, request: Any) -> Any:
        if self.make is None:
            self.make = pickle.loads(self.payload)
        try:
            return self.make(request)
        except BadInput as error:
            # Return it: raised in the worker it would arrive as a page of traceback.
            return error


@contextlib.contextmanager
def _naming_the_lost() -> Iterator[None]:
    """Context in which a killed worker is reported in one line. Raises BadInput."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise BadInput(
            f"{error}: a loader process of this rank was killed, mostly for want of memory. Lower data.workers or "
            "data.prefetch if so; the same command continues."
        ) from error


def _unchanged(result: Any) -> Any:
    return result


def _init_worker(_: int) -> None:
    global _SENDER
    _SENDER = shared_memory.Sender(multiprocessing.parent_process().pid)
    ForkingPickler.register(torch.Tensor, _reduce)
    # Ignore signals to the whole group: the main process decides when to stop, and needs data until then.
    for number in stop.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _reduce(tensor: torch.Tensor) -> tuple:
    plain = tensor.device.type == "cpu" and tensor.layout == torch.strided and type(tensor) is torch.Tensor
    if not plain or tensor.requires_grad:
        return reduce_tensor(tensor)
    if tensor.nbytes > INLINE:
        if not (_SENDER.possible and tensor.is_contiguous()):
            return reduce_tensor(tensor)
        if (lent := _SENDER.lend(tensor)) is not None:
            return shared_memory.received, lent
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return _rebuilt, (content, tensor.dtype, tensor.shape)


def _rebuilt(plain: bytes, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    if not plain:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(plain), dtype=dtype).view(shape)


def _modules_in(payload: bytes) -> list[str]:
    """Modules that unpickling imports, to be imported once in the server instead of once in every worker."""
    named = {arg for _, arg, _ in pickletools.genops(payload) if isinstance(arg, str)}
    return sorted(name for name in named & set(sys.modules) if name != "__main__")


def _leave_with_parent() -> None:
    # The loader's own check watches the parent process, which is the fork server, and that waits for its workers.
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Context in which `stop.SIGNALS` are blocked in this thread, and in the processes that it starts.

    Otherwise a signal to the whole group could end the fork server or a worker before it has begun to ignore them.
    """
    resource_tracker.ensure_running()  # otherwise it starts in the block, and unblocks signals when it has
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _main_hidden(hide: bool) -> Iterator[None]:
    """Context in which new processes do not run the main script again, as they otherwise do for its definitions."""
    main = sys.modules["__main__"].__dict__
    hidden = {name: main.pop(name) for name in ("__file__", "__spec__") if hide and name in main}
    if hide:
        main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


@contextlib.contextmanager
def _imports_of_this_process() -> Iterator[None]:
    """Let the fork server import this very package: it would look for it in the current folder first.

    A run may be started in the checkout of another version, and a folder may hold a file named as a module is. Python
    3.10 does not know PYTHONSAFEPATH, and still looks there first.
    """
    root = str(Path(mmpeft_ds.__file__).parent.parent)
    ours = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@atexit.register
def _end_server() -> None:
    """At exit do not wait for a fork server that still imports, which takes seconds."""
    while starting := [thread for thread in _STARTING if thread.is_alive()]:
        if (server := forkserver._forkserver._forkserver_pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
        starting[0].join(0.1)


def _kill(processes: list) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
        shared_memory.forget(process.pid)
    processes.clear()
