"""Notes that ranks leave for each other, without a process group: whoever dies or hangs is noticed by its silence."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Collection
from typing import Any

import torch.distributed as dist

from mmpeft_ds.distributed.processes import why_not_met
from mmpeft_ds.errors import BadInput

FAREWELL = 5.0  # seconds that rank 0, which keeps the notes, waits for the others to leave


class Notes:
    """A store on the address where the ranks of a run meet.

    Args:
        rank, world_size: of this process.
        patience: seconds without a sign of life after which another rank is given up.

    Raises:
        BadInput: rank 0 cannot be reached within `patience`, or its port is taken.
    """

    def __init__(self, rank: int, world_size: int, patience: float):
        self.rank, self.world_size, self.patience = rank, world_size, patience
        given = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps a store already
        try:
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                None,
                rank == 0 and not given,
                datetime.timedelta(seconds=patience),
                wait_for_workers=False,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise BadInput(why_not_met(error)) from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"preflight/{attempt}", store)

    def write(self, name: str, value: Any) -> None:
        """Leave a JSON-able value under a name."""
        self._reaching(lambda: self.store.set(name, json.dumps(value)))

    def working(self) -> None:
        """Say that this rank is busy, so that rank 0 waits on."""
        self._reaching(lambda: self.store.add("work", 1))

    def read(self, name: str, patience: float | None = None) -> Any:
        """The note that rank 0 writes under a name; waits as long as rank 0 lives.

        Args:
            patience: in place of `self.patience`, for a time in which rank 0 gives no sign of life.

        Raises:
            BadInput: rank 0 is silent for longer, or gone.
        """
        patience = patience or self.patience
        beats, since, pause = -1, time.monotonic(), 0.001
        # By asking again and again, since torch prints two lines for every wait that is over without a result.
        while not self._reaching(lambda: self.store.check([name])):
            time.sleep(pause := min(0.1, 1.5 * pause))
            if (now := self._reaching(lambda: self.store.add("rank 0", 0))) != beats:
                beats, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                raise BadInput(f"rank {self.rank}: rank 0 has been silent for {patience:g} s. See what it printed.")
        return json.loads(self.store.get(name))

    def answer(self, name: str) -> Any:
        """On rank 0, what one other rank writes under a name; None if it is silent for `patience` seconds."""
        end, pause = time.monotonic() + self.patience, 0.001
        while not self.store.check([name]):
            if time.monotonic() > end:
                return None
            time.sleep(pause := min(0.1, 1.5 * pause))
            self.store.add("rank 0", 1)
        return json.loads(self.store.get(name))

    def collect(self, name: str, ranks: Collection[int]) -> dict[int, Any]:
        """On rank 0, what each of `ranks` has written under `name`/rank. Ends when all have, or when no rank has given
        a sign of life for `patience` seconds; ranks that have not written by then are absent."""
        notes: dict[int, Any] = {}
        work, since, pause = -1, time.monotonic(), 0.01
        while len(notes) < len(ranks) and time.monotonic() - since < self.patience:
            before = len(notes)
            for rank in ranks:
                if rank not in notes and self.store.check([f"{name}/{rank}"]):
                    notes[rank] = json.loads(self.store.get(f"{name}/{rank}"))
            self.store.add("rank 0", 1)
            if len(notes) > before or (now := self.store.add("work", 0)) != work:
                work, since = (work if len(notes) > before else now), time.monotonic()
            pause = min(0.25, 1.5 * pause)
            time.sleep(pause if len(notes) < len(ranks) else 0)
        return notes

    def leave(self, ranks: int) -> None:
        """The last call of a rank; rank 0 stays a little until `ranks` have called it."""
        try:
            left, end = self.store.add("left", 1), time.monotonic() + FAREWELL
            while self.rank == 0 and left < ranks and time.monotonic() < end:
                time.sleep(0.02)
                left = self.store.add("left", 0)
        except (dist.DistNetworkError, dist.DistStoreError):  # rank 0 has left
            return

    def _reaching(self, call: Callable[[], Any]) -> Any:
        """Result of a call of the store. Raises BadInput where rank 0 is gone."""
        try:
            return call()
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise BadInput(
                f"rank {self.rank}: lost its connection to rank 0 at {os.environ['MASTER_ADDR']}. See what rank 0 "
                f"printed, and whether its machine is reached from here. ({str(error).splitlines()[0]})"
            ) from error
