#!/usr/bin/env python
"""Write captions for the images of a data set with any model that writes: new shards, everything else as it was.

    deepspeed --num_accelerators 2 launchers/describe.py --data data/stamps --out data/stamps-described \\
        --backbone blip --set model=Salesforce/blip-image-captioning-large --remove-class-names
    deepspeed launchers/describe.py --data data/stamps --out data/stamps-qwen --backbone mllm \\
        --set model=Qwen/Qwen2-VL-2B-Instruct --prompt "Describe the image." --max-new-tokens 40 --compute bfloat16
    deepspeed launchers/describe.py --data data/stamps --out data/stamps-ours --adapter runs/captioner/adapter

The same command continues an interrupted run and leaves a finished directory alone. Any number of ranks writes the
same bytes.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import adapter_files, console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.data.manifest import Manifest  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402

SECTIONS = ("backbone", "engine", "data")


def main() -> int:
    """Parse, then describe."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--data", required=True, help="prepared data set of images")
    parser.add_argument("--out", type=Path, required=True, help="directory of the new shards, made if needed")
    parser.add_argument("--name", default="", help="of the new data set (default: as the source)")
    parser.add_argument("--splits", nargs="+", default=[], help="default: all")
    parser.add_argument("--recipe", help="YAML file whose backbone section names the model")
    parser.add_argument("--backbone", help="or: blip, mllm, vision_text_decoder; its options follow as --set")
    parser.add_argument("--adapter", type=Path, help="or: an adapter directory of a run that learnt to write")
    parser.add_argument("--set", action="append", default=[], metavar="A=VALUE", help="override one key; repeatable")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), help="of the model (default: the recipe's)")
    parser.add_argument("--prompt", default="", help="what the model reads before it writes (default: nothing)")
    parser.add_argument("--captions", type=int, default=1, help="of each image; several need do_sample (default: 1)")
    parser.add_argument("--num-beams", type=int, default=1, help="1 = greedy (default)")
    parser.add_argument("--max-new-tokens", type=int, default=19, help="longest caption in tokens (default: 19)")
    parser.add_argument("--generate", action="append", default=[], metavar="KEY=VALUE",
                        help="any option of transformers' generate; repeatable")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--field", default="captions", help="of the records that gets them (default: captions)")
    parser.add_argument("--replace", action="store_true", help="leave out what that field held before")
    parser.add_argument("--remove-class-names", action="store_true",
                        help="take the names of all classes of the data set out of every caption")  # fmt: skip
    parser.add_argument("--batch", type=int, default=32, help="images in one forward pass (default: 32)")
    parser.add_argument("--threads", type=int, default=1, help="that decode ahead of the model (default: 1)")
    args = parser.parse_args()
    if sum(map(bool, (args.recipe, args.backbone, args.adapter))) != 1:
        raise BadInput("which model? Give one of --recipe FILE, --backbone NAME with --set KEY=VALUE, --adapter DIR.")
    generation = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    for item in args.generate:
        key, equals, value = item.partition("=")
        if not (equals and key):
            raise BadInput(f"--generate {item}: expected KEY=VALUE, such as --generate length_penalty=1.2.")
        generation[key] = recipes.parse_yaml(value, f"--generate {key}")
    recipe = read_recipe(args)
    Manifest.load(args.data)  # mistakes in it are reported before torch is imported
    if args.adapter:
        adapter_files.whole(args.adapter)
    with console.quick_imports():
        from mmpeft_ds.precompute import captions as describe

    options = describe.DescribeOptions(
        args.data, args.out, args.name, tuple(args.splits), args.prompt, args.captions, generation, args.seed,
        args.field, args.replace, args.remove_class_names, args.batch, args.threads,
    )  # fmt: skip
    return describe.run(recipe, options, args.adapter)


def read_recipe(args) -> recipes.Recipe:
    """The recipe, or one made of --backbone and its options; of an adapter only `engine` and `data` are used."""
    changes = list(args.set) + ([f"engine.dtype={args.compute}"] if args.compute else [])
    if args.recipe:
        return recipes.load(args.recipe, changes)
    raw = {"run_dir": str(args.out), "backbone": {"name": args.backbone or "blip"}, "method": {"name": "lora"}}
    keys = [c if c.split("=")[0].split(".")[0] in SECTIONS else f"backbone.{c}" for c in changes]
    return recipes.overridden(raw, keys, "--backbone")


if __name__ == "__main__":
    console.run(main)
