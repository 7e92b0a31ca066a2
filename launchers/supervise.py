#!/usr/bin/env python
"""Train a recipe, and restart by itself after a lost rank or node, with the nodes that are there.

    python launchers/supervise.py --nproc-per-node 2 --recipe recipes/quickstart.yaml
    python launchers/supervise.py --min-nodes 1 --max-nodes 4 --recipe R.yaml      # the same on each node
    srun --ntasks-per-node=1 python launchers/supervise.py --max-nodes 4 --requeue --recipe R.yaml

The run continues from its last checkpoint on the nodes that are left, and takes in a node that comes back. Exit code
0: finished; 2: bad input, which no restart mends; 1: given up; 128 + N: stopped by signal N, with its last step saved.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from mmpeft_ds import console, leftovers, stop  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402


def main() -> int:
    """Parse, meet the other nodes, train to the end."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="YAML file, see recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks of this node (default: its GPUs, or 1)")
    parser.add_argument("--min-nodes", type=int, default=1, metavar="N", help="wait for that many (default: 1)")
    parser.add_argument("--max-nodes", type=int, metavar="N", help="take no more than that (default: --min-nodes)")
    parser.add_argument("--max-restarts", type=int, default=20, metavar="N",
                        help="after faults, before this node ends the run (default: 20)")  # fmt: skip
    parser.add_argument("--pause", type=float, default=2.0, metavar="S",
                        help="seconds before a restart that follows one without a new step; twice as long for each "
                        "further one, up to 60 (default: 2)")  # fmt: skip
    parser.add_argument("--wait", type=float, default=600.0, metavar="S",
                        help="seconds for which --min-nodes are waited for (default: 600)")  # fmt: skip
    parser.add_argument("--requeue", action="store_true",
                        help="after SIGUSR1 or SIGTERM in a job of Slurm: scontrol requeue, but not "
                        "after scancel")  # fmt: skip
    args = parser.parse_args()
    most = args.min_nodes if args.max_nodes is None else args.max_nodes
    if not 1 <= args.min_nodes <= most or args.max_restarts < 0 or args.pause < 0 or args.wait <= 0:
        parser.error("--max-nodes N must be --min-nodes or more, which is 1 or more; other numbers not below 0")
    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        parser.error("--nproc-per-node: must be 1 or more")
    if args.requeue and "SLURM_JOB_ID" not in os.environ:
        parser.error("--requeue: this is no job of Slurm. Leave it out, or start by sbatch")
    if args.requeue and not all(map(shutil.which, ("squeue", "scontrol"))):
        parser.error("--requeue: squeue and scontrol of Slurm are not on the PATH. Add their folder, or leave it out")
    recipe = recipes.load(args.recipe, args.set)
    with console.quick_imports():
        import torch

        from mmpeft_ds.distributed import meeting, supervisor

    nproc = args.nproc_per_node or torch.cuda.device_count() or 1
    overrides = [word for value in args.set for word in ("--set", value)]
    command = [str(ROOT / "launchers" / "train.py"), "--recipe", args.recipe, *overrides]
    run_dir = Path(recipe.run_dir)
    limits = supervisor.Limits(args.max_restarts, args.pause, recipe.engine.stop_grace)
    stop.Watch.running.close()  # a signal is for the ranks first, and torch's agent passes it on
    with tempfile.TemporaryDirectory(prefix=f"{leftovers.own_name()}-") as own:  # goes after a kill too
        # A node on its own shares nothing, and need not wait until what a killed start left has grown old.
        folder = Path(own) if most == 1 else run_dir.parent / f".{run_dir.name}.nodes"
        try:
            place = meeting.Meeting(folder, args.min_nodes, most, args.wait, "127.0.0.1" if most == 1 else None)
        except OSError as error:
            raise BadInput(f"{folder}: {error.strerror}; the nodes meet there. Mend it, or move run_dir.") from error
        code, number = supervisor.supervise(command, nproc, place, run_dir, limits, Path(own))
    if args.requeue and number in (signal.SIGUSR1, signal.SIGTERM) and os.environ.get("SLURM_NODEID", "0") == "0":
        _queue_again(os.environ["SLURM_JOB_ID"])
    return code


def _queue_again(job: str) -> None:
    """Have Slurm start this job anew, unless someone has cancelled it.

    A signal before a limit finds the job running. `scancel` ends it first, and so does the limit itself, which is the
    reason that Slurm then shows.
    """
    from mmpeft_ds.distributed import supervisor

    asked = ["squeue", "--noheader", f"--jobs={job}", "--format=%T %r"]
    state, _, reason = subprocess.run(asked, capture_output=True, text=True).stdout.strip().partition(" ")
    if state == "COMPLETING" and reason != "TimeLimit":
        supervisor.say(f"job {job} was cancelled, so it is not queued again")
    else:
        subprocess.run(["scontrol", "requeue", job])


if __name__ == "__main__":
    console.run(main)
