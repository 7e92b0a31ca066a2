"""Moving a process to a host of `tests.helpers.hosts`."""

from __future__ import annotations

import ctypes
import os

from tests.helpers import ROOT


def enter(pid: int) -> None:
    """Go on, in a new process, in the network, host name, mounts and process numbers of a host.

    Args:
        pid: `hosts.Host.pid`. This process must have one thread; it stays outside and leaves with the new one's code.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    handles = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts", "pid", "mnt")]
    for handle in handles:
        if libc.setns(handle, 0):
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
        os.close(handle)
    os.chdir(ROOT)
    if child := os.fork():  # only a new process gets a number on the host
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
