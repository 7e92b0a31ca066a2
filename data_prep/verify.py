"""Check prepared shards against their manifest: sizes, sha256, side files, every sample.

    python data_prep/verify.py DIR [--list-bad] [--decode] [--processes N]
    python data_prep/verify.py DIR --recipe R.yaml

With a recipe that reads DIR, also how many texts are longer than its backbone reads, or hold control tokens, and its
data.max_pixels in place of the default.
One line per problem; exit code 0 if there is none, 2 otherwise. Of images the headers are read, and with --decode the
pixels, which takes as long as a pass of training.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    # This folder must not come first on the path: its file names would hide installed modules of the same name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep.common.engines import run_jobs  # noqa: E402
from data_prep.common.reading import check_picture, parse_sample  # noqa: E402
from data_prep.sources.common.unknown_keys import looks_like  # noqa: E402
from mmpeft_ds import console  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.data.formats import MAX_PIXELS  # noqa: E402
from mmpeft_ds.data.manifest import FILE, Manifest, local_path, sample_key  # noqa: E402
from mmpeft_ds.data.parsing import check_questions, one_sample  # noqa: E402
from mmpeft_ds.errors import BadInput, BadSample, counted  # noqa: E402
from mmpeft_ds.files import sha256  # noqa: E402
from mmpeft_ds.progress import Progress  # noqa: E402

HINT = "Restore it, or prepare the data set again with --overwrite"


@dataclass(frozen=True)
class Job:
    """One shard to check: where it is, what the manifest says of it, its first sample's number in the split; the
    most pixels that training reads, and whether to read them."""

    dir: str
    split: str
    number: int
    first: int
    max_pixels: int
    decode: bool


@dataclass
class ShardReport:
    """Problems of one shard, of its samples (key, what is wrong), how many read well, and their features' widths."""

    problems: list[str]
    bad: list[tuple[str, str]]
    good: int = 0
    widths: dict[tuple[int, ...], list[str]] = field(default_factory=dict)  # of stored features -> keys


def main(argv: list[str] | None = None) -> int:
    """Check one directory; exit code."""
    parser = console.Parser(prog="verify.py", description=__doc__)
    parser.add_argument("dir", metavar="DIR", help="directory with a manifest.json")
    parser.add_argument("--list-bad", action="store_true", help="name every bad sample, not one per shard")
    parser.add_argument("--decode", action="store_true", help="read the pixels too, and find images that are cut off")
    parser.add_argument("--processes", type=int, default=0, help="how many at a time (default: all CPUs)")
    parser.add_argument("--recipe", help="YAML file whose data.sources or data.validation name DIR")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one key; repeatable")
    args = parser.parse_args(argv)
    if args.set and not args.recipe:
        parser.error("--set is about a recipe. Add --recipe")
    most = MAX_PIXELS
    if args.recipe:
        show_texts(args.dir, args.recipe, args.set)
        most = recipes.load(args.recipe, args.set).data.max_pixels
    return 2 if verify(args.dir, args.list_bad, args.processes, most, args.decode) else 0


def verify(
    dir: str, list_bad: bool = False, processes: int = 0, max_pixels: int = MAX_PIXELS, decode: bool = False
) -> list[str]:
    """Check everything below `dir`, print one line per problem and a summary, return the lines.

    Args:
        list_bad: name every bad sample, not one a shard.
        processes: how many at a time, 0 = all CPUs.
        max_pixels: images with more are bad samples, as in training.
        decode: read the pixels of every image.

    Raises:
        BadInput: if there is no readable manifest.
    """
    manifest = Manifest.load(dir)
    if local_path(manifest.dir) is None:
        raise BadInput(f"{dir}: verify.py reads local directories; copy it here first.")
    problems: list[str] = []
    jobs: list[Job] = []
    for split, shards in manifest.splits.items():
        first = 0
        for number, shard in enumerate(shards):
            jobs.append(Job(manifest.dir, split, number, first, max_pixels, decode))
            first += shard.samples
        try:
            manifest.offsets(split, 0)
        except BadInput as error:
            problems.append(str(error))
    results: list[ShardReport | None] = [None] * len(jobs)
    checked = run_jobs(check_shard, jobs, "local", processes)
    with Progress("verify", sum(manifest.samples(s) for s in manifest.splits)) as progress:
        for i, report in checked:
            results[i] = report
            progress.advance(manifest.splits[jobs[i].split][jobs[i].number].samples)
    for split in manifest.splits:
        _compare_widths(manifest, [r for job, r in zip(jobs, results, strict=True) if job.split == split])
    for job, report in zip(jobs, results, strict=True):
        file = manifest.splits[job.split][job.number].file
        problems += [f"{file}: {problem}" for problem in report.problems]
        if list_bad:
            problems += [f"{file}: sample {key}: {what}" for key, what in report.bad]
        elif report.bad:
            key, what = report.bad[0]
            problems.append(
                f"{file}: {counted(len(report.bad), 'bad sample')}, first {key}: {what} (--list-bad names all)"
            )
    for problem in problems:
        print(problem)
    strange = _unlisted(manifest)
    if strange:
        print(f"note: {FILE} does not name {', '.join(strange[:5])}{' ...' if len(strange) > 5 else ''}")
    for split, key, kind in _left_aside(manifest):
        print(f"note: split {split}: no task reads the key {key!r} of its records, which looks like {kind}")
    verdict = counted(len(problems), "problem") if problems else "all good"
    good = counted(sum(f.good for f in results), "sample")
    print(f"{manifest.name}: {counted(len(jobs), 'shard')}, {good} read well: {verdict}")
    return problems


def show_texts(dir: str, recipe_file: str, overrides: list[str]) -> None:
    """Print which texts of `dir` the recipe's backbone would cut, read otherwise than they stand, or refuse.

    Raises:
        BadInput: if the recipe does not read `dir`, or cannot be resolved.
    """
    recipe = recipes.load(recipe_file, overrides)
    named = [source for source in (*recipe.data.sources, *recipe.data.validation) if _same(source.dir, dir)]
    if not named:
        raise BadInput(f"--recipe {recipe_file}: does not read {dir}. Name one whose data.sources or validation do.")
    from mmpeft_ds.engine.assembly.resolve import resolve
    from mmpeft_ds.engine.text_check import check_texts

    resolved = resolve(recipe)
    sources = [s for s in (*resolved.train, *resolved.validation) if _same(s.options.dir, dir)]
    for source, check in check_texts(resolved, sources):
        print(check.line(resolved.backbone, source) or f"{dir} ({source.options.split}): all texts are read whole.")


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def check_shard(job: Job) -> ShardReport:
    """All that is wrong with one shard."""
    manifest = Manifest.load(job.dir)
    shard = manifest.splits[job.split][job.number]
    path = Path(local_path(manifest.path(shard.file)))
    report = ShardReport([], [])
    try:
        size, digest = path.stat().st_size, sha256(path)
    except OSError as error:
        report.problems.append(f"cannot be read ({error.strerror}). {HINT}")
        return report
    if size != shard.bytes:
        report.problems.append(f"has {size:,} bytes, expected {shard.bytes:,}. {HINT}")
    elif digest != shard.sha256:
        report.problems.append(f"has sha256 {digest[:12]}.., expected {shard.sha256[:12]}..: changed bytes. {HINT}")
    try:
        offsets = manifest.offsets(job.split, job.number)
    except BadInput:
        return report  # reported once for the split
    with open(path, "rb") as stream:
        for i, (begin, length) in enumerate(offsets.tolist()):
            key = sample_key(job.split, job.first + i)
            stream.seek(begin)
            try:
                width = _check_sample(stream.read(length), key, job)
                report.good += 1
                report.widths.setdefault(width, []).append(key)
            except BadSample as error:
                report.bad.append((key, str(error)))
    return report


def _check_sample(piece: bytes, key: str, job: Job) -> tuple[int, ...]:
    """Width of its stored features, () without any. Raises BadSample."""
    with one_sample():
        sample = parse_sample(piece)
        if sample.key != key:
            raise BadSample("key", f"{sample.key}, and {key} belongs here")
        check_questions(sample.record)
        for image in sample.images:
            check_picture(image, job.max_pixels)
            if job.decode:
                from mmpeft_ds.data.decode import decode  # imports torch

                decode(image, job.max_pixels)
        return () if sample.features is None else sample.features.shape[-1:]


def _compare_widths(manifest: Manifest, reports: list[ShardReport]) -> None:
    """Move samples whose features are not as wide as most of the split, or as its towers say, to the bad ones."""
    counts = Counter({w: 0 for r in reports for w in r.widths if w})
    for report in reports:
        counts.update({w: len(keys) for w, keys in report.widths.items() if w})
    said = manifest.towers.get("image_width")
    usual = (said,) if said else max(counts, key=counts.get, default=())
    for report in reports:
        for width, keys in report.widths.items():
            if width and width != usual:
                report.bad += [(key, f"features of width {width[0]}, where others have {usual[0]}") for key in keys]
                report.good -= len(keys)


def _left_aside(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """(split, key, what it looks like) of the keys under `extra` that may have been meant for a task."""
    for split, fields in manifest.fields.items():
        present = [name for name in fields if name != "images" or fields[name]["max"]]
        present += ["image"] if "images" in present else []
        for key in dict.fromkeys(re.split(r"[.\[]", path)[1] for path in fields if path.startswith("extra.")):
            if (kind := looks_like(key, present)) is not None:
                yield split, key, kind


def _unlisted(manifest: Manifest) -> list[str]:
    """Shards in the directory that the manifest does not name."""
    named = {shard.file for shards in manifest.splits.values() for shard in shards}
    there = (p.name for p in Path(local_path(manifest.dir)).iterdir())
    return sorted(n for n in there if re.fullmatch(r".*\.tar", n) and n not in named)


if __name__ == "__main__":
    console.run(main)
