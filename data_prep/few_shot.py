"""Choose a few samples of every class, once and for all methods, in the way of CoOp.

    python data_prep/few_shot.py DIR --shots 1 2 4 8 16 --seeds 1 2 3
    python data_prep/few_shot.py DIR --shots 16 --seeds 1 2 3 --classes base new

Writes DIR/few_shot/K-seedS.json, K samples of every class of the training split; K-seedS-val.json, min(K, 4) of the
validation split; with halves of the classes the same for each, such as K-seedS-base.json, and SPLIT-base.json, all
samples of a split of those classes. A recipe names such a file as the `subset` of a source.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This folder must not come first on the path: its file names would hide installed modules of the same name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds.data.manifest import Manifest  # noqa: E402
from mmpeft_ds.data.shards import ShardReader, members  # noqa: E402
from mmpeft_ds.data.subset import Subset, fingerprint  # noqa: E402
from mmpeft_ds.errors import BadInput, BadSample  # noqa: E402

FOLDER = "few_shot"
MOST_VAL = 4  # shots per class of the validation split
CHUNK = 256
HALVES = ("all", "base", "new")


def main(argv: list[str] | None = None) -> None:
    """Write the subsets of one data set; `argv` without the program's name, default sys.argv."""
    parser = console.Parser(prog="few_shot.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("dir", type=Path, metavar="DIR", help="prepared data set with labels, of images or features")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="default: 1 2 4 8 16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--split", default="train", help="where the shots are drawn (default: train)")
    parser.add_argument("--val-split", default="val", help="split to draw validation shots from, if it is there")
    parser.add_argument("--classes", nargs="+", choices=HALVES, default=["all"], help="which classes (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="replace subsets that differ")
    args = parser.parse_args(argv)
    for name, least in (("shots", 1), ("seeds", 0)):
        if min(getattr(args, name)) < least:
            raise BadInput(f"--{name}: {min(getattr(args, name))} is too small, the least is {least}.")
    manifest = Manifest.load(args.dir)
    if not manifest.labels:
        raise BadInput(f"{args.dir}: has no label list. Prepare it with a source of classes, such as image-folder.")
    wanted = [s for s in (args.split, args.val_split) if s in manifest.splits or s == args.split]
    manifest.shards(args.split)
    halved = any(half != "all" for half in args.classes)
    labels = {s: labels_of(manifest, s) for s in (manifest.splits if halved else wanted)}
    made: dict[str, Subset] = {}
    for shots in args.shots:
        for seed in args.seeds:
            drawn = draw(labels, wanted, shots, seed)
            for half in args.classes:
                classes = half_of(manifest.labels, half)
                for split, keys in drawn.items():
                    role = "" if split == args.split else "-val"
                    name = f"{shots}-seed{seed}{role}{'' if half == 'all' else '-' + half}"
                    most = shots if split == args.split else min(shots, MOST_VAL)
                    protocol = f"CoOp: {most} of every class of {split}, {half} classes"
                    made[name] = _subset(manifest, split, keys, labels, classes, most, seed, protocol)
    for half in (h for h in args.classes if h != "all"):
        for split in labels:
            keys, classes = list(labels[split]), half_of(manifest.labels, half)
            made[f"{split}-{half}"] = _subset(
                manifest, split, keys, labels, classes, 0, 0, f"all of {split}, {half} classes"
            )
    _write(args.dir / FOLDER, made, args.overwrite)
    _report(args.dir / FOLDER, made)


def labels_of(manifest: Manifest, split: str) -> dict[str, str]:
    """Key -> class name of every sample of a split that can be read, in stored order.

    Raises:
        BadInput: a sample without a label that the manifest lists.
    """
    labels = {}
    for key, record in _records(manifest, split):
        label = record.get("label")
        known = isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(manifest.labels or [])
        name = record.get("class_name", (manifest.labels or [])[label] if known else None)
        if name not in (manifest.labels or []):
            raise BadInput(f"{manifest.dir}: sample {key} has no label of the data set's list (label {label!r}).")
        labels[key] = name
    return labels


def draw(labels: dict[str, dict[str, str]], splits: Sequence[str], shots: int, seed: int) -> dict[str, list[str]]:
    """Split -> keys of `shots` samples per class of the first split, and min(shots, 4) of the second.

    Without repetition; a class with fewer samples gives what it has. One generator goes through all splits and, in
    them, through the classes in the order in which they first occur.

    Args:
        labels: split -> key -> class name, in stored order.

    Source: CoOp, arXiv 2109.01134, with Dassl's `generate_fewshot_dataset`: a split prepared in the order of CoOp's
    file gives CoOp's own draw.
    """
    generator = random.Random(seed)
    drawn: dict[str, list[str]] = {}
    for position, split in enumerate(splits):
        by_class: dict[str, list[str]] = {}
        for key, name in labels[split].items():
            by_class.setdefault(name, []).append(key)
        most = shots if position == 0 else min(shots, MOST_VAL)
        drawn[split] = [
            key for keys in by_class.values() for key in (generator.sample(keys, most) if len(keys) >= most else keys)
        ]
    return drawn


def half_of(labels: list[str], half: str) -> list[str] | None:
    """Class names of a half, the larger first one is `base`; None for all. Source: CoCoOp, arXiv 2203.05557."""
    middle = math.ceil(len(labels) / 2)
    return {"all": None, "base": labels[:middle], "new": labels[middle:]}[half]


def _subset(
    manifest: Manifest,
    split: str,
    keys: list[str],
    labels: dict[str, dict[str, str]],
    classes: list[str] | None,
    shots: int,
    seed: int,
    protocol: str,
) -> Subset:
    kept = [key for key in keys if classes is None or labels[split][key] in classes]
    return Subset(manifest.name, split, kept, shots, seed, protocol, classes, fingerprint(manifest, split))


def _records(manifest: Manifest, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, json) of the samples of a split; those that cannot be read are left out, as training leaves them out."""
    reader = ShardReader(manifest, split)
    try:
        for number, shard in enumerate(manifest.shards(split)):
            for first in range(0, shard.samples, CHUNK):
                places = [(number, i) for i in range(first, min(first + CHUNK, shard.samples))]
                for piece in reader.read(places):
                    try:
                        if isinstance(piece, BadSample):
                            raise piece
                        key, parts = members(piece)
                        yield key, json.loads(parts.get("json", b"{}"))
                    except (BadSample, ValueError) as error:
                        print(f"{shard.file}: left out a sample that cannot be read ({error})", file=sys.stderr)
    finally:
        reader.close()


def _write(folder: Path, made: dict[str, Subset], overwrite: bool) -> None:
    """Write what is not there yet; BadInput, before anything is written, if something else is."""
    todo = {}
    for name, subset in made.items():
        path = folder / f"{name}.json"
        try:
            old = json.loads(path.read_text("utf-8")) if path.exists() else None
        except ValueError:
            old = {}
        new = json.loads(json.dumps({k: v for k, v in vars(subset).items() if k != "file"}))
        if old == new:
            continue
        if old is not None and not overwrite:
            raise BadInput(f"{path}: chooses other samples. --overwrite replaces it; runs that used it then differ.")
        todo[path] = subset
    for path, subset in todo.items():
        if subset.keys:
            subset.save(path)


def _report(folder: Path, made: dict[str, Subset]) -> None:
    print(f"{folder}: {sum(bool(s.keys) for s in made.values())} subsets")
    for name, subset in made.items():
        print(f"  {name + '.json':28} {len(subset):>7,} samples  {subset.protocol}")


if __name__ == "__main__":
    console.run(main)
