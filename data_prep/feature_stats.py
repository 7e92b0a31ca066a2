"""Mean and standard deviation of the frozen vision tower's features over a split, kept in manifest.json.

    python data_prep/feature_stats.py DIR --recipe recipes/quickstart.yaml [--split train] [--set A.B=VALUE ...]

A backbone with `feature_norm: zscore` needs them. Their key hashes the tower's weights, the image
transform and the choice of feature, so statistics of another tower are never taken by mistake; what is there is not
computed again. Under `engine.cache_frozen` what the tower gives is kept for the training that follows.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder must not come first on the path: its file names would hide installed modules of the same name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.data.manifest import Manifest, local_path  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Compute the statistics that a recipe's backbone asks for and store them in the manifest."""
    parser = console.Parser(prog="feature_stats.py", description=__doc__)
    parser.add_argument("dir", metavar="DIR", help="directory with a manifest.json")
    parser.add_argument("--recipe", required=True, help="YAML file whose backbone section names the tower")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    parser.add_argument("--split", default="train", help="default train")
    parser.add_argument("--batch", type=int, default=64, help="images a forward pass (default 64)")
    parser.add_argument("--threads", type=int, default=2, help="of the tower on CPU (default 2)")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.threads < 1:
        raise BadInput("--batch and --threads must be 1 or more.")
    manifest = Manifest.load(args.dir)
    if local_path(manifest.dir) is None:
        raise BadInput(f"{args.dir}: the manifest can only be rewritten in a local directory; copy it here first.")
    if manifest.samples(args.split) and not manifest.fields[args.split].get("images", {}).get("max"):
        raise BadInput(f"{args.dir}: split {args.split!r} has no images.")
    recipe = recipes.load(args.recipe, args.set)
    with console.quick_imports():  # what could be refused without torch has been
        import torch

        from data_prep.common.feature_moments import measure, measure_kept
        from mmpeft_ds.data.decode import picture_reader
        from mmpeft_ds.engine.assembly import resolve

    backbone = resolve.make_backbone(recipes.components(recipe).backbone, recipe.engine, manifest.labels)
    if not backbone.wants_statistics:
        print(f"{args.recipe}: this backbone asks for no feature statistics; nothing to do")
        return
    key = backbone.statistics_key()
    if stored := manifest.statistics_of(key):
        images = f"{stored['count']:,} images of {stored['split']!r}"
        print(f"{args.dir}: statistics {key} are there already, over {images}")
        return
    torch.set_num_threads(args.threads)
    read = picture_reader(recipe.data)
    if recipe.engine.cache_frozen.on:
        statistics = measure_kept(manifest, args.split, recipe, backbone, args.batch, read)
    else:
        statistics = measure(manifest, args.split, backbone, args.batch, read)
    manifest = Manifest.load(args.dir)  # another run may have added its own meanwhile
    manifest.statistics[key] = statistics
    manifest.save(args.dir)
    print(
        f"{args.dir}: statistics {key}, {len(statistics['mean'])} dimensions over {statistics['count']:,} images of "
        f"{args.split!r}" + (f", {statistics['bad']} unreadable" if statistics["bad"] else "")
    )


if __name__ == "__main__":
    console.run(main)
