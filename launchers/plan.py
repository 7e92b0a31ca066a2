#!/usr/bin/env python
"""Plan a run before paying for its machines: memory of a GPU, traffic, time of a step, and which ZeRO to take.

    python launchers/plan.py --recipe recipes/lora_llava15_instruct.yaml --nodes 8 --gpus-per-node 8 --hbm 80
    python launchers/plan.py --recipe R.yaml --nodes 1 --gpus-per-node 4 --hbm 24 --card l40s --apply ds.json
    python launchers/train.py --recipe R.yaml --set engine.deepspeed=ds.json

Nothing big is loaded, and no GPU is needed: the model runs by shapes alone. Data sets that are not prepared yet are
assumed, as by --check --samples.
"""

import json
import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402
from mmpeft_ds.files import write_json  # noqa: E402


def main() -> int:
    """Parse, count, print, and write what was asked for."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="YAML file, see recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    machines = parser.add_argument_group("machines")
    machines.add_argument("--nodes", type=int, required=True, metavar="N")
    machines.add_argument("--gpus-per-node", type=int, required=True, metavar="G")
    machines.add_argument("--hbm", type=float, metavar="GIB", help="memory of a GPU (default: the card's)")
    machines.add_argument("--card", default="h100", help="whose rates are taken: a100-40, a100-80, h100, h200, b200, "
                          "l40s (default: h100)")  # fmt: skip
    machines.add_argument("--link", type=float, metavar="GB/S", help="between GPUs of a node (default: the card's)")
    machines.add_argument("--nic", type=float, metavar="GB/S",
                          help="of a node to the others, all adapters together (default: 50 per GPU)")  # fmt: skip
    filling = parser.add_argument_group("samples")
    filling.add_argument("--images-per-sample", type=int, default=1, metavar="N", help="(default: 1)")
    filling.add_argument("--videos-per-sample", type=int, default=0, metavar="N", help="(default: 0)")
    filling.add_argument("--frames", type=int, default=8, metavar="N", help="of each video (default: 8)")
    filling.add_argument("--texts-per-sample", type=int, default=1, metavar="N", help="(default: 1)")
    filling.add_argument("--image-size", default="480x640", metavar="HxW",
                         help="of pictures, and of frames (default: 480x640)")  # fmt: skip
    filling.add_argument("--neighbours", type=int, default=16, metavar="N", help="in GA-Net's graph (default: 16)")
    filling.add_argument("--labels", type=int, metavar="N", help="of data that is not there (default: 1,000)")
    parser.add_argument(
        "--json", metavar="FILE", help="write the numbers as JSON; - prints them instead of the tables"
    )
    parser.add_argument("--apply", metavar="FILE", help="write the recommended DeepSpeed JSON")
    args = parser.parse_args()
    from mmpeft_ds.planning import cluster

    machine = cluster.cluster(args.nodes, args.gpus_per_node, args.hbm, args.card, args.link, args.nic)
    size = picture_size(args)
    for file in filter(None, (args.apply, args.json if args.json != "-" else None)):
        if not Path(file).absolute().parent.is_dir():
            raise BadInput(f"{file}: its folder is not there. Make it, or name another one.")
    recipe = recipes.load(args.recipe, args.set)
    from mmpeft_ds.data.assumed import Assumed
    from mmpeft_ds.engine.assembly.outline import outline
    from mmpeft_ds.planning import configs

    assumed = Assumed(labels=args.labels or Assumed.labels)
    candidates = configs.of(recipe, outline(recipe, assumed).ds_config)
    with console.quick_imports():
        from mmpeft_ds.engine.assembly import resolve
        from mmpeft_ds.planning import microbatch, planner, report

        filling = microbatch.Filling(
            args.images_per_sample, args.texts_per_sample, size, videos=args.videos_per_sample, frames=args.frames,
            neighbours=args.neighbours,
        )  # fmt: skip
        plan = planner.make(resolve.resolve(recipe, assumed), candidates, machine, filling)
    if args.json == "-":
        print(json.dumps(report.as_dict(plan), indent=1))
    else:
        report.show(plan)
    if args.json and args.json != "-":
        write_json(Path(args.json), report.as_dict(plan))
    if args.apply:
        configs.write(args.apply, plan.recommended)
    return 0


def picture_size(args) -> tuple[int, int]:
    """Height and width of --image-size, after the numbers of the samples were checked. Raises BadInput."""
    least = {"images_per_sample": int(not args.videos_per_sample), "videos_per_sample": 0, "texts_per_sample": 1}
    for name, low in (least | {"frames": 1, "neighbours": 0}).items():
        if (number := getattr(args, name)) < low:
            raise BadInput(f"--{name.replace('_', '-')}: must be {low} or more, got {number}.")
    height, _, width = args.image_size.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise BadInput(f"--image-size: {args.image_size!r} is no HEIGHTxWIDTH, such as 480x640.")
    return int(height), int(width)


if __name__ == "__main__":
    console.run(main)
