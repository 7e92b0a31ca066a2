#!/usr/bin/env python
"""Stream images and captions through frozen towers once and keep what they make, for heads that train in minutes.

    deepspeed --num_accelerators 2 launchers/features.py --data data/stamps --out data/stamps-features --views 10 \\
        --backbone dual_encoder --set vision=packaged:dinov2-focus --set image_size=126 --set text=packaged:minilm
    deepspeed launchers/features.py --data data/pets --out data/pets-features --recipe recipes/align_emoji.yaml

The same command continues an interrupted run and leaves a finished directory alone. Any number of ranks writes the
same bytes. A rank computes with one thread, since more would round otherwise: on CPU start a rank a core, or give
`--set engine.threads=N`, the same in every run.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.data.manifest import Manifest  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402

SECTIONS = ("backbone", "engine", "data", "seed")


def main() -> int:
    """Parse, then make the features."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--data", required=True, help="prepared data set of images or captions")
    parser.add_argument("--out", type=Path, required=True, help="directory of the feature shards, made if needed")
    parser.add_argument("--name", default="", help="of the new data set (default: as the source)")
    parser.add_argument("--recipe", help="YAML file whose backbone section (or its `encoder`) names the towers")
    parser.add_argument("--backbone", help="instead of a recipe: dual_encoder, clip, ...; its options follow as --set")
    parser.add_argument("--set", action="append", default=[], metavar="A=VALUE", help="override one key; repeatable")
    parser.add_argument("--splits", nargs="+", default=[], help="default: all")
    parser.add_argument("--views", type=int, default=0, help="augmented passes of each image (default: 0)")
    parser.add_argument("--view-scale", type=float, nargs=2, default=(0.08, 1.0), metavar=("LOW", "HIGH"),
                        help="share of the area that a pass covers (default: 0.08 1)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the augmented passes")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="stored (default: float16)")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), help="of the towers (default: the recipe's)")
    parser.add_argument("--template", action="append", default=[], help='"a photo of a {}."; repeatable')
    parser.add_argument("--templates", type=Path, help="file with one template a line")
    parser.add_argument(
        "--negative-template", action="append", help='"a photo of no {}."; default: made of the others'
    )
    parser.add_argument("--thumbnails", type=int, default=0, help="longer side of a small picture kept, 0 = none")
    parser.add_argument("--batch", type=int, default=64, help="images in one forward pass (default: 64)")
    parser.add_argument("--threads", type=int, default=1, help="that decode ahead of the towers (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="delete the features that are in --out")
    args = parser.parse_args()
    recipe = read_recipe(args)
    Manifest.load(args.data)  # mistakes in it are reported before torch is imported
    with console.quick_imports():
        from mmpeft_ds.precompute import features

    return features.run(
        recipe,
        features.FeatureOptions(
            args.data, args.out, args.name, tuple(args.splits), args.views, tuple(args.view_scale), args.seed,
            args.dtype, tuple(read_templates(args)) or features.TEMPLATES,
            None if args.negative_template is None else tuple(args.negative_template),
            args.thumbnails, args.batch, args.threads, args.overwrite,
        ),
    )  # fmt: skip


def read_recipe(args) -> recipes.Recipe:
    """The recipe, or one made of --backbone and its options."""
    changes = list(args.set) + ([f"engine.dtype={args.compute}"] if args.compute else [])
    if bool(args.recipe) == bool(args.backbone):
        raise BadInput("which towers? Give --recipe FILE, or --backbone NAME with its options as --set KEY=VALUE.")
    if args.recipe:
        return recipes.load(args.recipe, changes)
    raw = {"run_dir": str(args.out), "backbone": {"name": args.backbone}, "method": {"name": "lora"}}
    keys = [c if c.split("=")[0].split(".")[0] in SECTIONS else f"backbone.{c}" for c in changes]
    return recipes.overridden(raw, keys, "--backbone")


def read_templates(args) -> list[str]:
    """Templates of the command line and of the file."""
    templates = list(args.template)
    if args.templates is not None:
        try:
            templates += [line.strip() for line in args.templates.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as e:
            raise BadInput(f"--templates {args.templates}: cannot be read as UTF-8 text, one template a line.") from e
    return templates


if __name__ == "__main__":
    console.run(main)
