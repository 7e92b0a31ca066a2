"""Facts that a process collects about its node; plain mappings that travel as JSON."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.manifest import FILE, Manifest, read_side_file
from mmpeft_ds.data.shards import verify_shards
from mmpeft_ds.distributed import gpus, processes
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import check_writable
from mmpeft_ds.preflight import imports

SHM = "/dev/shm"


def of_rank() -> dict[str, Any]:
    """`rank`, `local_rank`, `local_size`, `first` (the node's first rank), `host`, `device` and `device_problem`,
    where this rank can have none, or uses the CPU beside GPUs."""
    rank, size = int(os.environ["RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    facts = {"rank": rank, "local_size": size, "host": socket.gethostname(), "device_problem": ""}
    try:
        local_rank, device = processes.own_device()
        facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        facts["device_problem"] = gpus.unseen()
    except (BadInput, RuntimeError) as error:
        local_rank = int(os.environ["LOCAL_RANK"])
        facts |= {"device": "none", "device_problem": " ".join(str(error).split())}
    return facts | {"local_rank": local_rank, "first": rank - local_rank}


def of_node(
    recipe: recipes.Recipe | None, probe: imports.Probe, patience: float, working: Callable[[], None]
) -> dict[str, Any]:
    """Software, room and network card of the node; the node's first rank asks, once for all.

    Args:
        probe: of the imports, which has begun.
        patience, working: of `imports.Probe.result`.
    """
    versions, failed = probe.result(patience, working)
    software = {"python": imports.python(), "mmpeft_ds": imports.ours()}
    software |= {name: version for name, version in versions.items() if name in imports.PACKAGES}
    memory, shm = psutil.virtual_memory(), shutil.disk_usage(SHM) if os.path.isdir(SHM) else None
    return {
        "software": software,
        "failed": failed,
        "recipe": hashlib.sha256(recipes.to_yaml(recipe).encode()).hexdigest()[:12] if recipe else "",
        "driver": gpus.driver(),
        "operator": processes.operator_is_built(),
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": {"total": memory.total, "free": memory.available},
        "shm": {"total": shm.total, "free": shm.free} if shm else None,
        "disk": room(recipe),
        "card": card(),
        "infiniband": sorted(os.listdir("/sys/class/infiniband")) if os.path.isdir("/sys/class/infiniband") else [],
        "locked_memory": locked_memory(),
    }


def room(recipe: recipes.Recipe | None) -> dict[str, dict[str, Any]]:
    """Disk space of the run directory and of the one for temporary files: `path`, `free` bytes, `problem` where
    nothing can be written."""
    places = {"TMPDIR": Path(tempfile.gettempdir())} | ({"run_dir": Path(recipe.run_dir)} if recipe else {})
    rooms = {}
    for name, path in places.items():
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
        problem = ""
        try:
            check_writable(there)
        except BadInput as error:
            problem = str(error)
        rooms[name] = {"path": str(path), "free": shutil.disk_usage(there).free, "problem": problem}
    return rooms


def card() -> dict[str, str]:
    """The network card that gloo takes on this node: `name`, `address`, `how` it was chosen, `problem`.

    gloo listens on the card of `GLOO_SOCKET_IFNAME`, otherwise on the one with the address of the host's name, and on
    the loopback device where that is no address of this host.
    """
    cards = {
        name: [a.address for a in addresses if a.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    host, wanted = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME", "")
    others = ", ".join(name for name, of in cards.items() if of and not of[0].startswith("127.")) or "none"
    if wanted:
        name, how = wanted.split(",")[0], "GLOO_SOCKET_IFNAME"
        problem = "" if name in cards else f"{how}={wanted}: there is no such network card. There are: {others}."
        return {"name": name, "address": next(iter(cards.get(name, [])), ""), "how": how, "problem": problem}
    how = "address of the host name"
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        address, how = "", f"the host name has no address ({error.strerror})"
    name = next((name for name, of in cards.items() if address in of), "")
    if not name or address.startswith("127."):
        what = f"its name resolves to {address}" if address else "its name has no address"
        problem = (
            f"{what}, so that gloo would listen where no other node reaches it. Set GLOO_SOCKET_IFNAME to "
            f"the card that they reach ({others}), or mend its /etc/hosts."
        )
        return {"name": name or "lo", "address": address or "127.0.0.1", "how": how, "problem": problem}
    return {"name": name, "address": address, "how": how, "problem": ""}


def locked_memory() -> int | None:
    """Bytes that a process may lock, which RDMA needs; None: no limit."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def of_data(
    recipe: recipes.Recipe | None, local_rank: int, local_size: int, working: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Data sets of the recipe as this node sees them, checked as `data.verify` says; this rank takes its share.

    Args:
        working: called after every shard.

    Returns:
        `DIR SPLIT` -> `manifest` (the first digits of its sha256), `shards` checked by this rank, `problems`.
    """
    if recipe is None:
        return {}
    sets: dict[str, dict[str, Any]] = {}
    for source in (*recipe.data.sources, *recipe.data.validation):
        name = f"{source.dir} {source.split}"
        if name in sets:
            continue
        facts: dict[str, Any] = {"manifest": "", "shards": 0, "problems": []}
        sets[name] = facts
        try:
            manifest = Manifest.load(source.dir)
            text = read_side_file(manifest.dir, FILE, "")
            facts["manifest"] = hashlib.sha256(text).hexdigest()[:12]
            shards = len(manifest.shards(source.split))
            for i in range(local_rank, shards, local_size):
                facts["problems"] += verify_shards(manifest, source.split, recipe.data.verify, i, shards)
                facts["shards"] += 1
                working()
        except BadInput as error:
            facts["problems"] = [str(error)]
    return sets
