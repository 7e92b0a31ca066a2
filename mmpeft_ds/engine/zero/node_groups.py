"""Groups of ranks that keep one more copy of a base split by ZeRO-3, so that gathers stay inside a machine (hpZ)."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch.distributed as dist

from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.errors import BadInput

KEY = "zero_hpz_partition_size"


def make(ds_config: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Make the groups that `zero_hpz_partition_size` asks for, for every model that is loaded from now on. Collective.

    DeepSpeed would make them once per model that it splits, and stop with an assertion at the second one: a base of
    two checkpoints, or a second run in the same process. It would also let a group span machines without a warning.

    Args:
        ds_config: of `check_ds_config`; "auto" means the ranks of one machine, or of machines of different sizes their
            greatest common divisor.
        ranks: of this process.

    Returns:
        a copy of `ds_config` with the size as a number. It is 1, no second copy, where one group would hold all ranks.

    Raises:
        BadInput: if a group would span machines, or ranks would be left over.
    """
    zero = ds_config["zero_optimization"]
    if KEY not in zero:
        size = 1
    else:
        size = group_size(zero[KEY], _machines(ranks))
        zero = {**zero, KEY: size}
    _use(size)
    return {**ds_config, "zero_optimization": zero}


def group_size(wanted: int | str, machines: list[tuple[int, int]]) -> int:
    """Number of ranks that together hold one copy of the base.

    Args:
        wanted: `zero_hpz_partition_size`.
        machines: of each rank, the first rank of its machine and the number of ranks there.

    Raises:
        BadInput: if a group would span machines, or ranks would be left over.
    """
    world = len(machines)
    size = math.gcd(*(count for _, count in machines)) if wanted == "auto" else int(wanted)
    if size <= 1 or size >= world:
        return 1
    if world % size:
        raise BadInput(f'{KEY}: {size} does not divide the {world} ranks. Use "auto", or another number of ranks.')
    for rank, (first, count) in enumerate(machines):
        start = rank - rank % size
        if start < first or start + size > first + count:
            raise BadInput(
                f"{KEY}: {size}: ranks {start} to {start + size - 1} would keep a copy of the base together, but rank "
                f'{rank} is on a machine with ranks {first} to {first + count - 1}. Use "auto", and start '
                "neighbours on one machine (srun --distribution=block)."
            )
    return size


def _machines(ranks: Ranks) -> list[tuple[int, int]]:
    """For each rank, the first rank of its machine and the number of ranks there. Collective."""
    machines: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(machines, (ranks.rank - ranks.local_rank, ranks.local_size))
    return machines


_made: tuple[int, Any] = (1, None)  # size of the groups that DeepSpeed keeps in a global, and the world they are of


def _use(size: int) -> None:
    """Let DeepSpeed find groups of `size` ranks wherever it would make them."""
    global _made
    from deepspeed.utils import groups

    create = getattr(groups._create_zero_param_parallel_group, "__wrapped__", groups._create_zero_param_parallel_group)
    if _made != (size, dist.group.WORLD):
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        if size > 1:
            create(size)
        _made = (size, dist.group.WORLD)

    @functools.wraps(create)
    def keep(group_size: int) -> None:
        """Leave the groups as they are."""

    groups._create_zero_param_parallel_group = keep
