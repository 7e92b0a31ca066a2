"""A start is refused where ranks do not read the same recipe, data and base: a machine with another copy of one would
train its share of the same weights on other samples, or at another rate, without a sign of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

from mmpeft_ds import recipe as recipes
from mmpeft_ds.distributed.collectives import first_message, on_rank0, rank
from mmpeft_ds.engine.assembly.resolve import Resolved
from mmpeft_ds.errors import AgreedBadInput

# What machines may do in their own way.
OWN = (
    "run_dir",  # only that of rank 0 is written
    "data.workers",
    "data.worker_threads",
    "data.prefetch",
    "data.cache_dir",
    "data.verify",
    "engine.cache_frozen.dir",
    "engine.deepspeed",  # its content is compared
    "engine.threads",
)
LISTED = 3  # keys in the message


def check(parts: Mapping[str, Resolved], at_paths: Mapping[str, dict[str, str]]) -> None:
    """Compare what this rank has read with what rank 0 has. Collective.

    Args:
        parts: by name, the members of a study, or one alone under an empty name.
        at_paths: for each, `identities` of what its paths lead to; places may differ if that is the same.

    Raises:
        AgreedBadInput: on all ranks, naming the first rank with something else, its host, and the keys.
    """
    own = {f"{name}.{k}" if name else k: v for name in parts for k, v in _read(parts[name], at_paths[name]).items()}
    first = on_rank0(lambda: own)
    differing = [key for key in sorted({**first, **own}) if first.get(key) != own.get(key)]
    more = f" and {len(differing) - LISTED} more" if len(differing) > LISTED else ""
    mine = (
        f"rank {rank()} on {socket.gethostname()} does not have what rank 0 has in {', '.join(differing[:LISTED])}"
        f"{more}. Give all ranks the same command, recipe, data and base; launchers/preflight.py compares machines."
    )
    if message := first_message(mine if differing else ""):
        raise AgreedBadInput(message)


def _read(resolved: Resolved, at_paths: dict[str, str]) -> dict[str, str]:
    """Key of the recipe -> its value as text, or the hash of what is at its path."""
    values = dict(_leaves(recipes.to_dict(resolved.recipe)))
    values = {k: v for k, v in values.items() if not any(k == own or k.startswith(f"{own}.") for own in OWN)}
    return values | {"engine.deepspeed": json.dumps(resolved.ds_config, sort_keys=True, default=str)} | at_paths


def _leaves(value: Any, key: str = "") -> list[tuple[str, str]]:
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    )
    if inner is None:
        return [(key, str(value))]
    return [leaf for k, v in inner for leaf in _leaves(v, f"{key}.{k}" if key else str(k))]
