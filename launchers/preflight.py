#!/usr/bin/env python
"""Before a run on several nodes: whether they have the same software, data, clocks, room, and how fast they talk.

    deepspeed --hostfile hostfile launchers/preflight.py --recipe R.yaml
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29500 \\
        launchers/preflight.py --recipe R.yaml
    srun python launchers/preflight.py --recipe R.yaml
    python launchers/preflight.py --recipe recipes/quickstart.yaml

Exit code 0: all good; 2: a line for each thing that is wrong, with its node and how to mend it. A rank that is
silent for --timeout seconds is named and no longer waited for.
"""

import os
import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402

COUNTS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def main() -> int:
    """Parse, then look."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--recipe", help="its data sets, run_dir and loader workers are looked at as well")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE",
                        help="override one key, such as data.verify=size; repeatable")  # fmt: skip
    parser.add_argument(
        "--json", metavar="FILE", help="write the numbers as JSON; - prints them instead of the tables"
    )
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S",
                        help="seconds of silence after which a rank is given up (default: 60)")  # fmt: skip
    parser.add_argument("--no-speed", action="store_true", help="do not measure all-gathers")
    parser.add_argument(
        "--clock", type=float, default=1.0, metavar="S", help="seconds that clocks may be off (default: 1)"
    )
    parser.add_argument("--free", type=float, default=1.0, metavar="GIB",
                        help="that run_dir and TMPDIR must have free (default: 1)")  # fmt: skip
    parser.add_argument("--slower", type=float, default=3.0, metavar="FACTOR",
                        help="a node is slow where the others are that many times as fast (default: 3)")  # fmt: skip
    args = parser.parse_args()
    for name in ("timeout", "clock", "free", "slower"):
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name}: must be more than 0")
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder is not there. Make it, or name another one")
    if args.set and not args.recipe:
        parser.error("--set is about a recipe. Add --recipe")
    recipe, problem = None, ""
    try:
        recipe = recipes.load(args.recipe, args.set) if args.recipe else None
    except BadInput as error:
        if all(os.environ.get(name, "1") == "1" for name in COUNTS):
            raise
        problem = str(error)  # perhaps on this node alone: the others should hear of it
    try:
        with console.quick_imports():
            from mmpeft_ds.preflight import judge, run
    except (ImportError, OSError) as error:  # OSError: a library that torch loads is not there
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(
            f"{os.uname().nodename}: {reason}. Run make setup on this node, or start it with the same environment."
        ) from error
    limits = judge.Limits(clock=args.clock, disk=int(args.free * judge.GIB), slower=args.slower)
    asked = run.Asked(recipe, problem, args.timeout, not args.no_speed, args.json, limits)
    return run.run(asked)


if __name__ == "__main__":
    console.run(main)
