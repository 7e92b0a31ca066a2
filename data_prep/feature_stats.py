"""Mean and standard deviation of the frozen vision tower's features over a split, kept in manifest.json.

    python data_prep/feature_stats.py DIR --recipe recipes/quickstart.yaml [--split train] [--set A.B=VALUE ...]

A backbone with `feature_norm: zscore` needs them. Their key hashes the tower's weights, the image
transform and the choice of feature, so statistics of another tower are never taken by mistake; what is there is not
computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This folder must not come first on the path: its file names would hide installed modules of the same name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from data_prep.reading import parse_sample  # noqa: E402
from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.data.decode import MAX_PIXELS, decode  # noqa: E402
from mmpeft_ds.data.manifest import Manifest, local_path  # noqa: E402
from mmpeft_ds.data.shards import ShardReader  # noqa: E402
from mmpeft_ds.engine.assembly import resolve  # noqa: E402
from mmpeft_ds.errors import BadInput, BadSample  # noqa: E402
from mmpeft_ds.progress import Progress  # noqa: E402


class Moments:
    """Mean and variance per dimension of rows that come in batches, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, rows_ID: Tensor) -> None:
        """Merge a batch by the differences of the means, which does not cancel as a sum of squares would."""
        rows_ID = rows_ID.double().cpu()
        n = len(rows_ID)
        mean = rows_ID.mean(0)
        delta = mean - self.mean
        total = self.count + n
        self.squares = self.squares + ((rows_ID - mean) ** 2).sum(0) + delta**2 * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        """Standard deviation of the rows seen, divided by their number."""
        return (self.squares / self.count).sqrt()


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
    backbone = resolve.make_backbone(recipes.components(recipe).backbone, recipe.engine, manifest.labels)
    if not backbone.wants_statistics:
        print(f"{args.recipe}: this backbone asks for no feature statistics; nothing to do")
        return
    key = backbone.statistics_key()
    if key in manifest.statistics:
        found = manifest.statistics[key]
        print(f"{args.dir}: statistics {key} are there already, over {found['count']:,} images of {found['split']!r}")
        return
    torch.set_num_threads(args.threads)
    statistics = measure(manifest, args.split, backbone, args.batch, recipe.data.max_pixels)
    manifest = Manifest.load(args.dir)  # another run may have added its own meanwhile
    manifest.statistics[key] = statistics
    manifest.save(args.dir)
    print(
        f"{args.dir}: statistics {key}, {len(statistics['mean'])} dimensions over {statistics['count']:,} images of "
        f"{args.split!r}" + (f", {statistics['bad']} unreadable" if statistics["bad"] else "")
    )


def measure(manifest: Manifest, split: str, backbone: Any, batch: int, max_pixels: int = MAX_PIXELS) -> dict[str, Any]:
    """Statistics of all readable images of a split, of at most `max_pixels` pixels as in training.

    Returns:
        mean, std: d numbers each; count: images; bad: samples left out; split; backbone: the options of the tower.

    Raises:
        BadInput: if no image is readable.
    """
    moments, bad = Moments(), 0
    vision = backbone.build_vision()
    transform = backbone.image_transform(False)
    with Progress("features", manifest.samples(split)) as progress:
        for images, samples, unreadable in _ahead(image_batches(manifest, split, transform, batch, max_pixels)):
            bad += unreadable
            if images:
                moments.add(vision(backbone.collate_images(images)))
            progress.advance(samples)
    if not moments.count:
        raise BadInput(
            f"{manifest.dir}: no readable image in split {split!r}; data_prep/verify.py shows what is wrong."
        )
    return {
        "mean": moments.mean.tolist(),
        "std": moments.std.tolist(),
        "count": moments.count,
        "bad": bad,
        "split": split,
    }


def image_batches(
    manifest: Manifest, split: str, transform: Callable[[Tensor, Any], Any], batch: int, max_pixels: int
) -> Iterator[tuple[list[Any], int, int]]:
    """(transformed images, samples read, samples left out as bad), about `batch` images at a time, in order."""
    reader = ShardReader(manifest, split)
    images, samples, bad = [], 0, 0
    for number, shard in enumerate(manifest.shards(split)):
        for first in range(0, shard.samples, batch):
            wanted = [(number, i) for i in range(first, min(first + batch, shard.samples))]
            for piece in reader.read(wanted):
                samples += 1
                try:
                    if isinstance(piece, BadSample):
                        raise piece
                    # all or none of the images of a sample, as in training
                    images += [transform(decode(data, max_pixels), None) for data in parse_sample(piece).images]
                except BadSample:
                    bad += 1
                if len(images) >= batch:
                    yield images, samples, bad
                    images, samples, bad = [], 0, 0
    reader.close()
    if samples:
        yield images, samples, bad


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, each made while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (found := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield found


if __name__ == "__main__":
    console.run(main)
