"""torch's elastic agent for runs that continue by themselves: what is worth a restart, when, and how often."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError

from mmpeft_ds import stop
from mmpeft_ds.distributed.meeting import Meeting

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
FAILED = (WorkerState.FAILED, WorkerState.UNHEALTHY)
LONGEST_PAUSE = 60.0  # seconds


@dataclass(frozen=True)
class Limits:
    """Limits on restarts and time of a supervised run.

    Attributes:
        restarts: after which it ends.
        pause: seconds before the second restart without a new step; doubled for each further one, up to a minute.
        grace: seconds that ranks have to end their step and save.
    """

    restarts: int
    pause: float
    grace: float


class Progress:
    """Progress of a run, read from its directory."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir

    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return (self.run_dir / "finished.json").is_file()

    def step(self) -> int:
        """The last step in its curves, 0 without one."""
        try:
            with (self.run_dir / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
                lines = file.read().splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):  # half a line, after a kill
                continue
        return 0


class Supervisor(LocalElasticAgent):
    """The agent of one node.

    torch's own restarts at once and after any exit code; this one waits, and ends where a restart cannot help: bad
    input (exit code 2), and the same traceback at the same step twice.
    """

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, meeting: Meeting, progress: Progress, limits: Limits):
        super().__init__(spec, logs, exit_barrier_timeout=limits.grace, shutdown_timeout=int(limits.grace) + 5)
        self.meeting, self.progress, self.limits = meeting, progress, limits
        self.verdict: tuple[int, str] | None = None  # exit code and reason of an end without a restart
        self._pause, self._in_vain, self._last_step = 0.0, 0, progress.step()
        self._tracebacks: set[tuple[int, str]] = set()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        stopped = result.state == WorkerState.SUCCEEDED and not self.progress.finished()
        if not stopped and result.state not in FAILED:
            return result
        self.verdict = self._hopeless(result)
        if self.verdict is None and self.meeting.rendezvous.num_nodes_waiting():
            # The others have stopped their ranks already, to let a node in; torch restarts ours without counting it.
            return RunResult(state=WorkerState.HEALTHY)
        what = "the ranks were stopped" if stopped else _how(result.failures.values())
        if self.verdict is None and not self._remaining_restarts:
            self.verdict = 1, f"{what}, and the budget of {self.limits.restarts} restarts is spent"
        if self.verdict is not None:
            self._remaining_restarts = 0
        else:
            self._plan_pause(what)
        return RunResult(state=WorkerState.FAILED, failures=result.failures)

    def _hopeless(self, result: RunResult) -> tuple[int, str] | None:
        for failure in result.failures.values():
            if failure.exitcode == 2:
                return (
                    2,
                    f"{_how([failure])}: bad input, which no restart mends; the line of that rank says what",
                )
        step = self.progress.step()
        # A set, since the ranks often end with the same one.
        now = {(step, trace) for failure in result.failures.values() if (trace := _traceback(failure))}
        for _, trace in sorted(now & self._tracebacks):
            where = ", ".join(trace.splitlines()[-2:])
            return 1, f"the same traceback twice after step {step}, so a restart does not help ({where})"
        self._tracebacks |= now
        return None

    def _plan_pause(self, what: str) -> None:
        step = self.progress.step()
        self._in_vain = 0 if step > self._last_step else self._in_vain + 1
        self._last_step = max(step, self._last_step)
        self._pause = min(self.limits.pause * 2 ** (self._in_vain - 1), LONGEST_PAUSE) if self._in_vain else 0.0
        number = self.limits.restarts - self._remaining_restarts + 1
        when = f"in {self._pause:g} s" if self._pause else "now"
        say(f"{what} after step {step}; restart {number} of {self.limits.restarts} {when}")

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self._stop_workers(worker_group)
        pause, self._pause = self._pause, 0.0
        time.sleep(pause)
        super()._restart_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        # Whatever this process got, such as SIGUSR1 of Slurm: SIGTERM is what lets ranks save.
        super()._shutdown(signal.SIGTERM, self._shutdown_timeout)


def supervise(
    command: list[str], nproc: int, meeting: Meeting, run_dir: Path, limits: Limits, logs: Path
) -> tuple[int, int]:
    """Run `command` on `nproc` ranks of this node, and again after faults, until the run is finished.

    Args:
        command: script and arguments.
        run_dir: that the script writes, by which its end and progress are known.
        logs: existing folder of this process, where ranks write why they ended.

    Returns:
        exit code: 0 finished, 2 bad input, 1 given up, 128 + N after signal N; and N, 0 without one.
    """
    taken = [name for name in SIGNALS if not stop.ignored(getattr(signal, name))]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(taken)
    # Otherwise torch keeps the address of the first rank 0 for ever, also when its node has gone and come back.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # our lines say it shorter
    for name in taken:  # torch sets the same once ranks run; before, nodes may be waited for
        signal.signal(getattr(signal, name), _raise)
    spec = WorkerSpec(
        role="rank", local_world_size=nproc, entrypoint=sys.executable, args=tuple(command),
        rdzv_handler=meeting.rendezvous, max_restarts=limits.restarts,
    )  # fmt: skip
    agent = Supervisor(spec, DefaultLogsSpecs(log_dir=str(logs)), meeting, Progress(run_dir), limits)
    try:
        if agent.run() is None:  # torch's word for a node that was left over when another one ended the run
            agent.verdict = meeting.ended()
    except SignalException as stopped:
        number = int(stopped.sigval)
        say(f"stopped by {signal.Signals(number).name}; the same command continues the run")
        return 128 + number, number
    except RendezvousTimeoutError:
        say("waited too long: fewer than --min-nodes came, or --max-nodes train; the same command continues")
        return 1, 0
    except RendezvousClosedError:
        agent.verdict = meeting.ended()
    code, reason = agent.verdict or (0, "the run is finished")
    meeting.end(code, reason)
    if code:
        say(f"ended: {reason}")
    return code, 0


def say(words: str) -> None:
    """A line of the supervisor of this node."""
    print(f"supervise on {socket.gethostname()}: {words}", file=sys.stderr, flush=True)


def _raise(number: int, frame: Any) -> None:
    raise SignalException(f"got {number}", signal.Signals(number))


def _how(failures: Iterable[Any]) -> str:
    """Exits of this node's ranks, except those that were ended because another one had failed."""
    codes = {failure.local_rank: failure.exitcode for failure in failures}
    first = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM} or codes
    return ", ".join(
        f"local rank {rank} " + (f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}")
        for rank, code in sorted(first.items())
    )


def _traceback(failure: Any) -> str:
    """Places and type of the exception that ended a rank, without its values; empty where it was none."""
    message = (failure.error_file_data or {}).get("message")
    lines = message.get("extraInfo", {}).get("py_callstack", "").splitlines() if isinstance(message, dict) else []
    places = [line.strip() for line in lines if line.lstrip().startswith("File ")]
    return "\n".join([*places, lines[-1].split(":")[0]]) if lines else ""
