#!/usr/bin/python3
"""Process 1 of a container: passes signals on to every process, and ends only when all of them have left.

    docker/init.py COMMAND [ARGUMENT ...]

`docker stop` signals process 1 alone, and the kernel kills all others when that ends. `deepspeed` as process 1 would
not even get SIGTERM, which the kernel keeps from a process 1 without a handler; below `docker run --init` it ends at
once, and its ranks with it, before they have saved their step. The exit code is the command's, 128 + N if signal N
ended it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

GRACE = 60  # seconds for what is left when the command has ended; a run itself leaves within engine.stop_grace
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def main() -> int:
    """Run the command of the command line."""
    command = sys.argv[1:]
    if not command:
        return fail(2, "no command is given")
    if os.getpid() != 1:  # in the host's own process table (`--pid host`) "all others" would be the host's
        try:
            os.execvp(command[0], command)
        except OSError as error:
            return fail(127, f"{command[0]}: {error.strerror}")
    for number in SIGNALS:
        signal.signal(number, pass_on)
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        return fail(127, f"{command[0]}: {error.strerror}")
    code = reap(child.pid)
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(code))
    signal.alarm(GRACE)
    to_all(signal.SIGTERM)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    return code


def pass_on(number: int, _frame: object) -> None:
    """Signal all processes, unless the terminal has done so."""
    if number != signal.SIGINT or not os.isatty(0):
        to_all(number)


def to_all(number: int) -> None:
    """Signal every process of the container but this one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, number)


def reap(child: int) -> int:
    """Exit code of the child, once it has ended; processes that have lost their parent are waited for meanwhile."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


def fail(code: int, message: str) -> int:
    """Print why the command cannot run."""
    print(f"docker/init.py: {message}. Give it as in: docker run mmpeft_ds COMMAND ARGUMENTS", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
