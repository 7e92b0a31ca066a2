#!/usr/bin/env python
"""Write the Fisher information and the weights of a finished run's best checkpoint to one file, for EWC.

    deepspeed --num_accelerators 2 launchers/fisher.py --run runs/task-a --out runs/task-a/fisher.safetensors
    deepspeed launchers/train.py --recipe task-b.yaml --set optim.ewc.file=runs/task-a/fisher.safetensors

Any number of ranks gives the same file up to rounding.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402


def main() -> int:
    """Measure and print where the numbers come from."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory of the earlier task")
    parser.add_argument("--out", type=Path, required=True, help="file to write, ending in .safetensors")
    parser.add_argument("--split", default="train", help="split of the run's data sets (default: train)")
    parser.add_argument("--checkpoint", default="best", help="best (default), last, or a name below RUN/checkpoints")
    parser.add_argument(
        "--weight", action="append", default=[], metavar="PATTERN=FACTOR",
        help="multiply F of parameters whose name matches the shell-style pattern; the first that matches counts",
    )  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    args = parser.parse_args()
    if args.out.suffix != ".safetensors":
        raise BadInput(f"--out {args.out}: must end in .safetensors.")
    weights = [factor(item) for item in args.weight]
    recipes.of_run(args.run, args.set)  # mistakes in it are reported before torch is imported
    with console.quick_imports():
        from mmpeft_ds.runs import fisher

    facts = fisher.estimate(args.run, args.out, args.split, args.checkpoint, args.set, weights)
    if console.rank() == 0:
        if facts is None:
            print(f"{args.run}: was stopped; nothing was written")
        else:
            print("\n".join(f"{name:>16}  {value}" for name, value in facts.items()) + f"\nwritten: {args.out}")
    return 0 if facts is not None else 1


def factor(item: str) -> tuple[str, float]:
    """One `--weight`."""
    pattern, equals, number = item.rpartition("=")
    try:
        value = float(number) if equals and pattern else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise BadInput(f"--weight {item}: expected PATTERN=FACTOR, such as --weight '*classifier*=0.8'.")
    return pattern, value


if __name__ == "__main__":
    console.run(main)
