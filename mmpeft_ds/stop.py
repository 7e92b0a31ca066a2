"""Clean stop: after a signal, or when the launcher has died, every process of a run leaves, and leaves nothing behind.

Without this (measured), SIGTERM to `deepspeed` kills that process alone, and its child `launch.py` and
all ranks go on as orphans. SIGTERM to `launch.py` reaches the ranks one after the other and kills them 30 seconds
later. Ctrl-C reaches a rank twice, as SIGINT from the terminal and as SIGTERM from `launch.py`.

A rank that is still setting up has nothing to lose and leaves at once. One that works ends its step first: it is
enough that one rank notices, since `StopFlag.requested` is all-reduced, so that all ranks stop after the same step.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import psutil

# SIGHUP comes when a terminal or its connection closes, SIGUSR1 from Slurm some time before a job's limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
POLL = 0.5  # seconds between looks at the launcher
AGAIN = 1.0  # seconds after which another Ctrl-C is a second one, and not the first one arriving twice
LEAVE = 5.0  # seconds within which the interpreter of a stopped process has ended
LAUNCHERS = ("deepspeed", "deepspeed.launcher", "torchrun", "torch.distributed.run", "torch.distributed.launch")
# What adopts processes whose parent has ended, besides process 1.
ADOPTING = ("systemd", "tini", "dumb-init", "docker-init", "catatonit")


class StopFlag:
    """Notices requests to end the run. Use it as a context manager around the run, in the main thread.

    Until `begin` a request ends the process at once. Then the first signal only sets the flag. A second
    Ctrl-C, at least a second after the first, ends the process at once. SIGTERM may come any number of times:
    launchers repeat it.

    Args:
        grace: seconds after a request until the process is ended if it has not exited (`engine.stop_grace`). The
            `deepspeed` launcher kills its ranks 30 seconds after it gets a signal itself in any case.
        on_request: called once with the reason, from the watching thread.
    """

    def __init__(self, grace: float = 30.0, on_request: Callable[[str], None] | None = None):
        self.grace = grace
        self.begun = False
        self._on_request = on_request
        self._stack = contextlib.ExitStack()

    @property
    def reason(self) -> str:
        """Reason of the request, empty without one: the name of a signal, or which launcher is gone."""
        return self._watch.reason

    def begin(self) -> None:
        """From now on a request lets the step end."""
        self.begun = True

    def requested(self) -> bool:
        """Whether this rank has noticed a request; cheap, no collective."""
        return self._watch.since is not None

    def request(self, reason: str) -> None:
        """Request the end of the run."""
        self._watch.request(reason)

    def noticed(self) -> None:
        """Tell whoever wanted to know of the request, once."""
        told, self._on_request = self._on_request, None
        if told is not None:
            told(self.reason)

    def __enter__(self) -> StopFlag:
        self._watch = self._stack.enter_context(watching())
        self._watch.flag = self
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the time limit of a requested stop."""
        self._watch.flag, self._watch.stopped = None, self.requested()
        self._stack.close()


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Context in which signals, and the end of the launcher, end this process; in the main thread. May be nested."""
    if Watch.running is not None:
        yield Watch.running
        return
    watch = Watch()
    try:
        yield watch
    except SystemExit as leaving:
        watch.exit_code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    finally:
        if watch.exit_code == 0:
            watch.farewell()
        watch.close()


class Watch:
    """Watches the signals and launchers of this process from a thread, since the main one may wait in a collective.

    Attributes:
        flag: the run that ends its step first.
        reason, since, signal_code: of the first request; when it came; the exit code that it makes, as a shell has it.
        stopped: a run has ended after its step, so the process is about to leave by itself.
        exit_code: what the process is leaving with, None before.
        stuck: says whom this rank has been waiting for too long, so that its step will not end; empty if for nobody.
        abandon: ends those for whom it waits that are stopped on this machine; called before it leaves without them.
        lost: says of which ranks the processes have ended; empty if of none.
        farewell: called when the process leaves with 0.
    """

    running: Watch | None = None

    def __init__(self) -> None:
        self.flag: StopFlag | None = None
        self.reason, self.since, self.stopped, self.exit_code = "", None, False, None
        self.stuck: Callable[[], str] = str
        self.abandon: Callable[[], object] = str
        self.lost: Callable[[], str] = str
        self.farewell: Callable[[], object] = str
        self.signal_code, self._again, self._unwinds, self._closed = 0, False, False, threading.Event()
        self.launchers, missing = launchers_above()
        self._is_rank = bool(self.launchers or missing or "RANK" in os.environ or "SLURM_PROCID" in os.environ)
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS if not ignored(number)}
        # Python runs handlers between two bytecodes of the main thread, which may wait in a collective. The byte that
        # the C handler writes here wakes the watching thread at once.
        self._old_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        Watch.running = self
        if missing:
            self.request(missing)
        atexit.register(self._at_exit)  # the first one that is registered runs last
        self._thread = threading.Thread(target=self._watch, name="stop-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Restore the former handlers; after a request on which the process is to leave, keep watching it instead."""
        if self.since is not None and self.exit_code is not None:
            self.since = time.monotonic()
            return
        self._closed.set()
        self.restore()
        with contextlib.suppress(OSError):
            self._write.send(b"\0")  # no signal: wakes the thread, which would sleep for up to POLL
        atexit.unregister(self._at_exit)
        self._thread.join(2 * POLL)
        self._read.close()
        self._write.close()

    def restore(self) -> None:
        """Give signals back to whoever had them before."""
        Watch.running = None
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def request(self, reason: str, number: int = signal.SIGTERM) -> None:
        """Request the end of the process for a reason; `number` makes its exit code."""
        if self.since is None:
            self.reason, self.signal_code = reason, 128 + number
            self.since = time.monotonic()

    def _signalled(self, number: int) -> None:
        if number == signal.SIGINT and self.since is not None and time.monotonic() - self.since >= AGAIN:
            self._again = True
        self.request(signal.Signals(number).name, number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A command on its own cleans up as it unwinds; ranks would wait for each other meanwhile.
        if not (self._is_rank or self.flag or self.stopped or self._unwinds or self.exit_code is not None):
            self._unwinds = True
            self._signalled(number)
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(OSError, ValueError):
                select.select([self._read], [], [], POLL)
                for number in self._read.recv(64):
                    if number in self._previous:
                        self._signalled(number)
            dead = next((p for p in self.launchers if not alive(p)), None)
            if dead is not None:
                self.request(f"the launcher (pid {dead.pid}) is gone")
            if self.since is not None and not self._closed.is_set():
                self._carry_out(time.monotonic() - self.since)

    def _carry_out(self, seconds: float) -> None:
        """Do what a request that is `seconds` old requires."""
        rank, flag = os.environ.get("RANK", "0"), self.flag
        if self.exit_code is not None:  # the interpreter is ending
            if seconds > LEAVE:
                leave(self.exit_code)
        elif self._again:
            leave(
                self.signal_code,
                f"rank {rank}: a second Ctrl-C; leaving at once. The last complete checkpoint is whole.",
            )
        elif flag is not None and flag.begun:
            flag.noticed()
            if seconds > LEAVE and (missing := self.stuck()):
                self.abandon()
                waits = f"stopped ({self.reason}) while it waits for {missing}. The last complete checkpoint is whole."
                leave(self.signal_code, f"rank {rank}: {waits}")
            if seconds > flag.grace:
                leave(
                    1,
                    f"rank {rank}: stop requested ({self.reason}) but not done within {flag.grace:g} s; leaving now. "
                    "The last complete checkpoint is whole. A longer engine.stop_grace gives more time.",
                )
        elif flag is not None or (self._is_rank and not self.stopped):
            line = f"stopped before it began ({self.reason}): nothing is lost, and the same command continues the run"
            leave(self.signal_code, line if rank == "0" else "")
        elif seconds > LEAVE and not self.stopped:
            leave(self.signal_code)

    def _at_exit(self) -> None:
        """The last of what is registered: what C++ libraries do afterwards may wait for threads for ever."""
        if self.exit_code is not None and self.since is not None:
            leave(self.exit_code)


def ignored(number: int) -> bool:
    """Whether a signal is to be ignored, as `nohup` asks for SIGHUP."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


_forking = threading.local()


def _hold() -> None:
    """Before a fork: block signals, so that none reaches the child while it still has the handlers of its parent."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _go_on() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _forget() -> None:
    """In a forked child: drop the handlers of the parent, so that a signal to the child does not end the run."""
    if Watch.running is not None:
        Watch.running.restore()
    _go_on()


os.register_at_fork(before=_hold, after_in_parent=_go_on, after_in_child=_forget)


def leave(code: int, line: str = "") -> None:
    """End this process now, with what it has started, and after a line on standard error; from any thread."""
    with contextlib.suppress(RuntimeError):  # no new threads at the very end
        flushing = threading.Thread(target=sys.stdout.flush, daemon=True)  # the main thread may hold its lock
        flushing.start()
        flushing.join(0.5)
    if line:
        with contextlib.suppress(OSError):
            os.write(2, f"{line}\n".encode())
    end_children()
    os._exit(code)


def end_children() -> None:
    """SIGTERM to the processes below this one, such as a compiler; SIGKILL to loader workers, which ignore it."""
    server, tracker = _multiprocessing_pids()
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                below = child.children(recursive=True)
                for process in [child, *below]:
                    process.kill() if child.pid in (server, tracker) else process.terminate()
    if leftovers := sys.modules.get("mmpeft_ds.leftovers"):  # what the tracker removes, after lines about it
        leftovers.remove_own()


def _multiprocessing_pids() -> tuple[int | None, int | None]:
    """Process ids of the fork server, and of the process that removes named semaphores when all others have ended."""
    server, tracker = (sys.modules.get(f"multiprocessing.{m}") for m in ("forkserver", "resource_tracker"))
    return (
        server and server._forkserver._forkserver_pid,
        tracker and tracker._resource_tracker._pid,
    )


def launchers_above() -> tuple[list[psutil.Process], str]:
    """Launcher processes among the ancestors of this one, nearest first, none for a plain `python train.py`; and which
    one must have been there and is gone, empty if none.
    """
    launchers: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        above = psutil.Process().parents()
        for process in above:
            with contextlib.suppress(psutil.Error):
                if _is_launcher(process.cmdline()):
                    launchers.append(process)
        # `launch.py` and torchrun set these for their ranks.
        launched = "CROSS_RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
        if launched and not launchers and _adopts(above[:1]):
            return [], "the launcher is gone"
        for launcher in launchers[-1:]:
            # `deepspeed` starts it in its own process group; whoever starts it by hand, or as a service, does not.
            starts_ranks = any(word.startswith("deepspeed.launcher.launch") for word in launcher.cmdline())
            in_a_group = os.getpgid(launcher.pid) != launcher.pid
            if starts_ranks and in_a_group and _adopts(launcher.parents()[:1]):
                return launchers, f"the `deepspeed` command that started launch.py (pid {launcher.pid}) is gone"
    return launchers, ""


def _adopts(parent: list[psutil.Process]) -> bool:
    """Whether this parent is one that takes in orphans."""
    return not parent or parent[0].pid == 1 or parent[0].name() in ADOPTING


def alive(process: psutil.Process) -> bool:
    """Whether the process runs: the same one, by pid and start time, and no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # it cannot be seen, which does not mean that it is dead


def _is_launcher(command: list[str]) -> bool:
    """Whether interpreter, options and program are those of a launcher; later words belong to the script."""
    for i, word in enumerate(command[:6]):
        name = os.path.basename(word)
        if word == "-m" and i + 1 < len(command):
            return any(command[i + 1] == known or command[i + 1].startswith(f"{known}.") for known in LAUNCHERS)
        if name in ("deepspeed", "ds", "torchrun") or word.endswith(
            ("deepspeed/launcher/launch.py", "torch/distributed/run.py", "launchers/supervise.py")
        ):
            return True
        if i and not word.startswith("-"):
            return False
    return False
