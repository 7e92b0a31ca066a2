"""Where the ranks of one `deepspeed` launch meet, apart from those of another launch with the same port.

All launches take port 29500 unless they are given another one. Of two that begin together on one machine the rank 0
that comes second is refused the port, but other ranks of its launch may have reached the first store by then, and
would take the places of the first one's ranks: that run would wait for its own for ever. So the keys of each launch
have its process id in front of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

from torch.distributed import PrefixStore, rendezvous
from torch.distributed.rendezvous import register_rendezvous_handler

from mmpeft_ds.stop import launchers_above

SCHEME = "launch"
_registered: list[str] = []


def meeting_of_launch() -> str | None:
    """`init_method` of ranks that the launcher of DeepSpeed has started on this machine alone; None for others, whose
    launchers have other processes on every machine, or ports of their own."""
    env = os.environ
    if env.get("CROSS_SIZE") != "1" or env.get("LOCAL_SIZE") != env["WORLD_SIZE"]:
        return None
    launchers, _ = launchers_above()
    if not launchers:
        return None
    if not _registered:
        register_rendezvous_handler(SCHEME, _apart)
        _registered.append(SCHEME)
    return f"{SCHEME}://{launchers[0].pid}"


def _apart(url: str, **options: Any) -> Iterator[tuple[PrefixStore, int, int]]:
    """The store that MASTER_ADDR and MASTER_PORT name, with keys of this launch."""
    for store, rank, size in rendezvous("env://", **options):
        yield PrefixStore(urlparse(url).netloc, store), rank, size
