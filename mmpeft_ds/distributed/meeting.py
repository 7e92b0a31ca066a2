"""Meeting place of the supervisors of several nodes: files next to the run directory, so that any node may fail."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import FileStore
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousBackend,
    RendezvousTimeout,
)

HEARTBEAT, MISSED = 3, 5  # seconds between signs of life of a node, and how many may be missing
LAST_CALL = 5  # seconds for which nodes wait for more of them, once there are enough


class SharedFile(RendezvousBackend):
    """State of a rendezvous in one file, whose content is the token of the next change.

    torch's own backend on a `FileStore` appends every state, and a node changes it with every sign of life.
    """

    name = "shared-file"

    def __init__(self, path: Path):
        self.path = path

    def get_state(self) -> tuple[bytes, Any] | None:
        """The state and its token; None before the first one."""
        with self._locked() as descriptor:
            return self._read(descriptor)

    def set_state(self, state: bytes, token: Any | None = None) -> tuple[bytes, Any, bool] | None:
        """Replace the state if it is the one of `token`: what stands there then, its token, and whether it is ours."""
        with self._locked() as descriptor:
            there = self._read(descriptor)
            if (there[1] if there else None) != token:
                return (*there, False) if there else None
            # In this order a kill in between leaves a whole state with a tail, which unpickling does not read.
            os.pwrite(descriptor, state, 0)
            os.ftruncate(descriptor, len(state))
            return state, state, True

    @staticmethod
    def _read(descriptor: int) -> tuple[bytes, Any] | None:
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        return (content, content) if content else None

    @contextlib.contextmanager
    def _locked(self) -> Any:
        # On NFS flock is a lock of the server, and taking it drops what this machine has cached of the file.
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


class Meeting:
    """The nodes that train one run together, until one of them ends it for all.

    Args:
        folder: on a file system that all nodes share; made if needed.
        min_nodes, max_nodes: between which the ranks are started.
        wait: seconds for which `min_nodes` are waited for.
        address: of this machine, by which the others reach it; by default its host name.
    """

    def __init__(self, folder: Path, min_nodes: int, max_nodes: int, wait: float, address: str | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        number = max((int(path.stem) + 1 for path in folder.glob("*.ended")), default=0)
        for path in folder.iterdir():
            if path.stem.isdecimal() and int(path.stem) < number - 1:  # nobody reads them any more
                path.unlink(missing_ok=True)
        self._ended = folder / f"{number}.ended"
        self.rendezvous = DynamicRendezvousHandler.from_backend(
            run_id=str(number),
            store=FileStore(str(folder / f"{number}.store")),
            backend=SharedFile(folder / f"{number}.state"),
            min_nodes=min_nodes,
            max_nodes=max_nodes,
            local_addr=address,
            timeout=RendezvousTimeout(join=timedelta(seconds=wait), last_call=timedelta(seconds=LAST_CALL)),
            keep_alive_interval=HEARTBEAT,
            keep_alive_max_attempt=MISSED,
        )

    def end(self, code: int, reason: str) -> None:
        """End the run for all nodes: those that restart their ranks learn of it, later ones start again."""
        with contextlib.suppress(FileExistsError), self._ended.open("x") as file:
            json.dump({"code": code, "reason": reason}, file)
        self.rendezvous.shutdown()

    def ended(self) -> tuple[int, str]:
        """Exit code and reason with which another node has ended the run."""
        try:
            ending = json.loads(self._ended.read_text())
            return int(ending["code"]), str(ending["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            return 1, "another node ended the run"
