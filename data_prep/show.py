"""Look at prepared shards: counts, field statistics, labels, and a contact sheet.

python data_prep/show.py DIR [--split train] [--out sheet.png] [--samples 24] [--predictions FILE]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This folder must not come first on the path: its file names would hide installed modules of the same name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import fsspec  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Column, Table  # noqa: E402

from data_prep.common.reading import StoredSample, parse_sample  # noqa: E402
from mmpeft_ds import console  # noqa: E402
from mmpeft_ds.contact_sheet import Layout, Tile, draw  # noqa: E402
from mmpeft_ds.data.manifest import Manifest  # noqa: E402
from mmpeft_ds.data.pictures import shown  # noqa: E402
from mmpeft_ds.errors import BadInput, BadSample  # noqa: E402
from mmpeft_ds.files import replacing, writing  # noqa: E402

LAYOUT = Layout()
RIGHT, WRONG, GUESS = "#007a33", "#b00020", "#0050b0"  # an answer, and what is neither right nor wrong as a whole


def main(argv: list[str] | None = None) -> None:
    """Print the tables and, if asked, draw the sheet."""
    parser = console.Parser(prog="show.py", description=__doc__)
    parser.add_argument("dir", metavar="DIR", help="directory with a manifest.json; a path or a URL")
    parser.add_argument("--split", help="only this one (default: tables of all, pictures of the first)")
    parser.add_argument("--out", type=Path, help="write a contact sheet there (.png); folders are made")
    parser.add_argument("--samples", type=int, default=24, help="how many samples on the sheet, evenly spread")
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="of launchers/evaluate.py for that split, onto the sheet"
    )
    args = parser.parse_args(argv)
    if args.samples < 1:
        raise BadInput(f"--samples: {args.samples} is too few.")
    if args.predictions and not (args.out and args.split):
        raise BadInput("--predictions: say too which --split they are of, and with --out where to draw them.")
    ending = Image.registered_extensions()
    if args.out and args.out.suffix.lower() not in ending:
        raise BadInput(f"--out {args.out}: no ending of a picture format. Use .png or .jpg.")
    manifest = Manifest.load(args.dir)
    splits = [args.split] if args.split else list(manifest.splits)
    manifest.shards(splits[0])  # refuses an unknown split
    print_tables(manifest, splits)
    if args.out:
        sheet = contact_sheet(manifest, splits[0], args.samples, args.predictions)
        with writing(args.out):
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(args.out) as partial:
                sheet.save(partial, ending[args.out.suffix.lower()])
        print(f"contact sheet of {splits[0]!r}: {args.out}")


def print_tables(manifest: Manifest, splits: list[str]) -> None:
    """Counts, field statistics and labels as tables on stdout."""
    console = Console(width=None if sys.stdout.isatty() else 118, markup=False)
    source = manifest.source
    console.print(f"{manifest.name}, from {source['name']}, licence {manifest.licence}, {manifest.dir}")
    table = Table("split", *(_right(n) for n in ("samples", "shards", "MB", "images")))
    for split in splits:
        shards, images = manifest.shards(split), manifest.fields[split].get("images", {})
        size = sum(s.bytes for s in shards) / 1e6
        total = round(images.get("mean", 0) * images.get("present", 0))
        table.add_row(split, f"{manifest.samples(split):,}", f"{len(shards):,}", f"{size:,.1f}", f"{total:,}")
    console.print(table)
    for split in splits:
        table = Table(
            "field", "type", *(_right(n) for n in ("present", "min", "mean", "max")), title=f"fields of {split}"
        )
        table.caption = "lengths of texts and lists, values of numbers"
        for path, stats in manifest.fields[split].items():
            numbers = (f"{stats[n]:,.6g}" for n in ("min", "mean", "max"))
            table.add_row(path, stats["type"], f"{stats['present']:,}", *numbers)
        console.print(table)
    if manifest.labels:
        total = max(sum(manifest.label_counts), 1)
        shown = list(zip(manifest.labels, manifest.label_counts, strict=True))[:20]
        more = f"{len(manifest.labels)} labels" + (", the first 20" if len(manifest.labels) > 20 else "")
        table = Table("label", _right("in training"), _right("share"), title=more)
        for label, count in shown:
            table.add_row(label, f"{count:,}", f"{count / total:.1%}")
        console.print(table)
    for key, stats in manifest.statistics.items():
        console.print(f"feature statistics {key}: {len(stats['mean'])} dimensions over {stats['count']:,} images")


def contact_sheet(manifest: Manifest, split: str, count: int, predictions: Path | None = None) -> Image.Image:
    """A picture of `count` samples spread evenly over the split, each with its images and its texts.

    Args:
        predictions: file of launchers/evaluate.py, whose rows are drawn below the texts.
    """
    total = manifest.samples(split)
    numbers = sorted({i * total // min(count, total) for i in range(min(count, total))})
    rows = rows_by_sample(predictions, manifest.name) if predictions else None
    return draw([("", [_tile(manifest, split, number, rows) for number in numbers])], LAYOUT)


def rows_by_sample(predictions: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """Key of a sample -> what was predicted of it. Raises BadInput where that cannot be read, or is of other data."""
    rows: dict[str, list[dict[str, Any]]] = {}
    try:
        with open(predictions, encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                data, _, key = row["sample_id"].partition("/")
                if data == name:
                    rows.setdefault(key, []).append(row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--predictions {predictions}: no predictions of launchers/evaluate.py ({error}).") from error
    if not rows:
        raise BadInput(f"--predictions {predictions}: holds nothing about {name!r}.")
    return rows


def predicted(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Lines about the first three predictions of a sample, green where right and red where wrong."""
    lines = []
    for row in rows:
        if row.get("kind") == "text_to_image":
            continue
        guess = f"{row.get('text') or ''} {row['prediction']}".strip()
        if row.get("kind"):
            lines.append((f"{guess} (a text of its own: place {row['rank']})", RIGHT if row["rank"] == 1 else WRONG))
        elif row.get("answers"):
            lines.append((guess, RIGHT if row["prediction"] in row["answers"] else WRONG))
        else:
            lines.append((guess, GUESS))
    return lines[:3]


def _tile(manifest: Manifest, split: str, number: int, rows: dict[str, list[dict[str, Any]]] | None = None) -> Tile:
    """Images and texts of one sample; one that cannot be read says so in its place."""
    try:
        sample = _sample(manifest, split, number)
    except BadSample as error:
        return Tile(lines=[f"sample {number}: {error}"])
    try:
        pictures = [shown(data) for data in sample.images[:4]]
    except BadSample:
        return Tile(lines=[f"{sample.key}: an image cannot be read"])
    count = f"  {len(sample.images)} images" if len(sample.images) != 1 else ""
    if rows is None:
        return Tile(pictures, [f"{sample.key}{count}", *describe(sample)])
    # The predictions first: long captions must not push them out of the tile.
    return Tile(pictures, [*predicted(rows.get(sample.key, [])), *sample.record.get("captions", [])[:1]])


def _sample(manifest: Manifest, split: str, number: int) -> StoredSample:
    for i, shard in enumerate(manifest.shards(split)):
        if number < shard.samples:
            begin, length = manifest.offsets(split, i)[number].tolist()
            try:
                with fsspec.open(manifest.path(shard.file), "rb") as stream:
                    stream.seek(begin)
                    return parse_sample(stream.read(length))
            except OSError as error:
                raise BadSample("read", f"{shard.file}: {error.strerror or error}") from error
        number -= shard.samples
    raise IndexError(number)


def describe(sample: StoredSample) -> list[str]:
    """A record's texts in a few lines: whatever of captions, questions, label and conversation it has."""
    record = sample.record
    lines = []
    if "class_name" in record:
        lines.append(f"{record['label']}: {record['class_name']}")
    lines += record.get("captions", [])[:2]
    questions = record.get("questions", [])
    for question in questions[:3]:
        answers = dict.fromkeys(question["answers"])
        lines.append(f"{question['question']} {' | '.join(answers)}")
    if len(questions) > 3:
        lines.append(f"... {len(questions)} questions")
    lines += [f"{turn['from']}: {turn['value']}" for turn in record.get("conversations", [])[:2]]
    if sample.features is not None:
        lines.append(f"features {sample.features.dtype} {sample.features.shape}")
    return lines


def _right(name: str) -> Column:
    return Column(name, justify="right")


if __name__ == "__main__":
    console.run(main)
