"""Turn a data set as it comes into WebDataset shards with a manifest.

    python data_prep/prepare.py SOURCE --out DIR [--engine local|ray] [--processes N] [--samples-per-shard N]
        [--resize SIDE [--quality Q]] ...

The same command continues an interrupted preparation and leaves a finished one alone. Two runs give the same bytes.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This folder must not come first on the path: its file names would hide installed modules of the same name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_prep import sources  # noqa: E402
from data_prep.common import bad_pictures, duplicates, report, resize  # noqa: E402
from data_prep.common.engines import ENGINES, run_jobs  # noqa: E402
from data_prep.common.options import add_options, as_json, compared, read_options  # noqa: E402
from data_prep.sources.base import Source  # noqa: E402
from mmpeft_ds import console, registry  # noqa: E402
from mmpeft_ds.data import identity  # noqa: E402
from mmpeft_ds.data.manifest import FILE, NAME, Manifest  # noqa: E402
from mmpeft_ds.data.parts import PARTS, Part, finished_part, shard_file  # noqa: E402
from mmpeft_ds.data.writer import write_manifest, write_shard  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402
from mmpeft_ds.files import write_json  # noqa: E402
from mmpeft_ds.progress import Progress  # noqa: E402

PLAN = "plan.json"


@dataclass(frozen=True)
class Job:
    """One shard: samples `first` to `first` + `count` of a split."""

    source: str
    options: Any
    dir: Path
    name: str
    split: str
    number: int
    first: int
    count: int
    resize: resize.Resize | None = None


def main(argv: list[str] | None = None) -> None:
    """Prepare one data set; `argv` without the program's name, default sys.argv."""
    argv = sys.argv[1:] if argv is None else argv
    args, source, options = _parse(argv)
    out: Path = args.out
    resized = {"resize": args.resize, "quality": args.quality} if args.resize else {}
    wanted = {
        "name": args.name,
        "samples_per_shard": args.samples_per_shard,
        "source": {"name": args.source, "options": as_json(options) | resized, "fingerprint": source.fingerprint()},
    }
    shaping = {**compared(options), "name": args.name, "samples_per_shard": args.samples_per_shard}
    shaping |= {"resize": args.resize, **resized}
    shaping.pop("features_are", None)  # a statement about the shards, which stay the same
    if args.overwrite:
        _clear(out)
    elif _is_done(out, wanted, shaping):
        return
    with _locked(out):
        _write_plan(out, wanted, shaping)
        try:
            jobs = _planned(out, args, source, options)
            _make_shards(out, args, source, jobs, wanted["source"])
        except KeyboardInterrupt:
            print(f"{out}: stopped; the same command continues", file=sys.stderr)
            raise
    shutil.rmtree(out / PARTS)
    _report(Manifest.load(out), f"prepared in {out}")


def _parse(argv: list[str]) -> tuple[Any, Source, Any]:
    """Common options, the source, and its own options."""
    known = [n.replace("_", "-") for n in registry.names(sources)]
    first = console.Parser(add_help=False, allow_abbrev=False)
    first.add_argument("source", nargs="?")
    name = first.parse_known_args(argv)[0].source
    parser = console.Parser(prog="prepare.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE", help=f"one of: {', '.join(known)}")
    parser.add_argument("--out", type=Path, required=True, help="directory of the shards, made if needed")
    parser.add_argument("--name", help="name of the data set in file names and sample ids (default: SOURCE)")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="processes here, or Ray tasks")
    parser.add_argument("--processes", type=int, default=0, help="how many at a time (default: all CPUs)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="default 1000")
    parser.add_argument(
        "--resize",
        type=int,
        default=0,
        metavar="SIDE",
        help="store larger pictures with a shorter side of SIDE pixels",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what was prepared in DIR and start over")
    if name is None:
        parser.parse_args(argv)  # --help, or the line that says what is missing
        raise BadInput(f"prepare.py: which source? One of: {', '.join(known)}.")
    try:
        entry = registry.load(sources, name.replace("-", "_"), "SOURCE")
    except BadInput as error:
        spelled = name.replace("_", "-")
        if spelled in known:
            raise
        near = difflib.get_close_matches(spelled, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise BadInput(f"SOURCE: no source named {name!r}. {hint}Known: {', '.join(known)}.") from error
    if "quality" not in {field.name for field in fields(entry.Options)}:  # sources of videos have one, of their frames
        text = f"of JPEG and WebP pictures that --resize stores, 1 to 95 (default {resize.QUALITY})"
        parser.add_argument("--quality", type=int, default=resize.QUALITY, help=text)
    add_options(parser.add_argument_group(f"options of {name}"), entry.Options)
    args = parser.parse_args(argv)
    args.source = name.replace("_", "-")
    args.name = args.name or args.source
    if not NAME.fullmatch(args.name):
        raise BadInput(f"--name: {args.name!r} may hold a-z, 0-9, _ and - only.")
    for option in ("processes", "samples_per_shard"):
        if getattr(args, option) < (option == "samples_per_shard"):
            raise BadInput(f"--{option.replace('_', '-')}: {getattr(args, option)} is too small.")
    args.how = resize.Resize(args.resize, args.quality) if args.resize else None
    options = read_options(entry.Options, args)
    source = entry(options)
    return args, source, options


def _planned(out: Path, args: Any, source: Source, options: Any) -> list[Job]:
    """All jobs, after everything there is to read has been read; an error leaves nothing behind in a new directory."""
    try:
        return _jobs(args, source, options)
    except BaseException:
        if not any((out / PARTS).glob("*.tar.json")):
            shutil.rmtree(out / PARTS)
            with contextlib.suppress(OSError):  # not empty: it was there before
                out.rmdir()
        raise


def _jobs(args: Any, source: Source, options: Any) -> list[Job]:
    """All shards of all splits."""
    source.index(args.out / PARTS)
    jobs: list[Job] = []
    for split in source.splits():
        if not re.fullmatch("[a-z0-9_]+", split):
            raise BadInput(f"split {split!r}: the name of a split may hold a-z, 0-9 and _ only.")
        total = source.count(split)
        if total == 0:
            raise BadInput(f"{args.source}: split {split!r} has no samples. Leave it out, or give data that has some.")
        step = args.samples_per_shard
        for number, first in enumerate(range(0, total, step)):
            job = Job(args.source, options, args.out, args.name, split, number, first, min(step, total - first))
            jobs.append(job)
    if args.how:
        how = args.how.measured_on(sum(job.count for job in jobs))
        jobs = [replace(job, resize=how) for job in jobs]
    return jobs


def _make_shards(out: Path, args: Any, source: Source, jobs: list[Job], description: dict[str, Any]) -> None:
    """Run all jobs that are not done yet, then write the manifest."""
    splits = list(dict.fromkeys(job.split for job in jobs))
    _SOURCES[args.source, repr(jobs[0].options)] = source  # forked workers find it ready
    parts: list[Part | None] = [None] * len(jobs)
    kept = 0
    results = run_jobs(make_shard, jobs, args.engine, args.processes)
    with Progress(args.source, sum(job.count for job in jobs)) as progress:
        for i, (part, was_there) in results:
            parts[i] = part
            kept += was_there
            progress.advance(jobs[i].count)
    if kept:
        print(f"{kept} of {len(jobs)} shards were already finished and intact")
    if args.how:
        description["resize"] = resize.described(args.how, parts)
    by_split = {split: [p for p, job in zip(parts, jobs, strict=True) if job.split == split] for split in splits}
    label_split = "train" if "train" in splits else splits[0]
    write_manifest(
        out,
        args.name,
        source.licence,
        description,
        args.samples_per_shard,
        by_split,
        source.labels(label_split),
        label_split,
        features_are=description["options"].get("features_are") or "",
        account=_account(source, out, by_split),
    )


def _account(source: Source, out: Path, parts: dict[str, list[Part]]) -> dict[str, dict[str, Any]]:
    """Counts of the records of each split, also of splits without samples, pictures that training cannot use, and
    those that occur in several splits."""
    bad, also_in = bad_pictures.by_reason(out, parts), duplicates.across_splits(out, parts)
    splits = (*parts, *source.empty())
    accounts = {split: source.account(split) | bad.get(split, {}) | also_in.get(split, {}) for split in splits}
    return {split: account for split, account in accounts.items() if account}


_SOURCES: dict[tuple[str, str], Source] = {}


def make_shard(job: Job) -> tuple[Part, bool]:
    """Write one shard unless it exists intact; (its part, whether it was there)."""
    part = finished_part(job.dir, shard_file(job.name, job.split, job.number))
    if part is not None and part.shard.samples == job.count:
        return part, True
    key = job.source, repr(job.options)
    if key not in _SOURCES:
        _SOURCES[key] = registry.load(sources, job.source.replace("-", "_"), "SOURCE")(job.options)
        _SOURCES[key].index(job.dir / PARTS)
    samples = islice(_SOURCES[key].samples(job.split, job.first), job.count)
    place = job.dir, job.name, job.split, job.number, job.first
    looks: list[Any] = [*([resize.Resizer(job.resize)] if job.resize else []), bad_pictures.BadPictures()]
    for look in looks:
        samples = look.samples(samples)
    part = write_shard(*place, samples, lambda: {k: v for look in looks for k, v in look.numbers().items()})
    if part.shard.samples != job.count:
        raise BadInput(
            f"{job.source}: split {job.split!r} gave {part.shard.samples} samples from {job.first} on, "
            f"{job.count} were counted before. Did the source change? Run the same command again."
        )
    return part, False


def _is_done(out: Path, wanted: dict[str, Any], shaping: dict[str, Any]) -> bool:
    """True if `out` holds this data set; BadInput if it holds another one or lost a shard."""
    if not (out / FILE).exists():
        return False
    manifest = Manifest.load(out)
    have = {"name": manifest.name, "samples_per_shard": manifest.samples_per_shard, "source": manifest.source}
    _refuse_difference(out, have, wanted, shaping)
    for shard in (s for split in manifest.splits for s in manifest.shards(split)):
        path = out / shard.file
        if not path.exists() or path.stat().st_size != shard.bytes:
            raise BadInput(
                f"{path}: missing or of another size than {FILE} says. data_prep/verify.py {out} shows all that is "
                "wrong; --overwrite prepares it again."
            )
    shutil.rmtree(out / PARTS, ignore_errors=True)
    declared = wanted["source"]["options"].get("features_are")
    if declared and declared != manifest.features_are:
        manifest.features_are = declared
        manifest.save(out)
        print(f"{out / FILE}: says now that stored features are {declared}")
    _report(manifest, f"{out} is already prepared, nothing to do")
    return True


def _write_plan(out: Path, wanted: dict[str, Any], shaping: dict[str, Any]) -> None:
    """Note what is being prepared, or check that an interrupted preparation was of the same."""
    plan = out / PARTS / PLAN
    if plan.exists():
        _refuse_difference(out, json.loads(plan.read_text("utf-8")), wanted, shaping)
        for stale in (
            *(out / PARTS).glob("*.tmp"),
            *out.glob(f".{wanted['name']}-*.tmp"),
            *out.glob(f".{FILE}.*.tmp"),
        ):
            stale.unlink()
    else:
        strange = sorted(p.name for p in out.iterdir() if p.suffix in (".tar", ".npy"))
        if strange:
            raise BadInput(f"{out}: holds {strange[0]}, but no {FILE} that tells of it. Choose an empty directory.")
        write_json(plan, wanted)


def _refuse_difference(out: Path, have: dict[str, Any], wanted: dict[str, Any], shaping: dict[str, Any]) -> None:
    """BadInput that lists what differs between what is in `out` and what was asked."""
    old = {**have["source"]["options"], "name": have["name"], "samples_per_shard": have["samples_per_shard"]}
    differs = []
    if have["source"]["name"] != wanted["source"]["name"]:
        differs.append(f"source {have['source']['name']}, now {wanted['source']['name']}")
    else:
        new = json.loads(json.dumps(shaping))
        # An option that the version before did not have is as good as left out where it is empty.
        differs += [f"{k} {old.get(k)}, now {v}" for k, v in new.items() if old.get(k) != v and (k in old or v)]
        before, after = have["source"]["fingerprint"], wanted["source"]["fingerprint"]
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                differs.append(_difference(key, before.get(key), after.get(key)))
    if differs:
        raise BadInput(
            f"{out}: holds shards that were prepared otherwise: {'; '.join(differs)}. Choose another --out, or "
            "replace them: --overwrite."
        )


def _difference(key: str, before: str | None, after: str | None) -> str:
    """What has happened to the file, or the version of a package, that a fingerprint names `key`."""
    if before is None or after is None:
        return f"{key} {'was not there before' if before is None else 'is not there now'}"
    if len(before) == len(after) == 64:  # a sha256, which says nothing to a reader
        return f"{key} changed"
    return f"{key} {before}, now {after}"


def _clear(out: Path) -> None:
    """Delete what a preparation wrote into `out`, and nothing else."""
    if not out.exists():
        return
    names = set()
    if (out / FILE).exists():
        with contextlib.suppress(BadInput):
            names.add(Manifest.load(out).name)
    with contextlib.suppress(OSError, ValueError, KeyError):
        names.add(json.loads((out / PARTS / PLAN).read_text("utf-8"))["name"])
    (out / FILE).unlink(missing_ok=True)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    for name in names:
        ours = re.compile(re.escape(name) + r"-[a-z0-9_]+(-\d{6}\.tar|\.index\.npy)")
        for path in out.iterdir():
            if ours.fullmatch(path.name):
                path.unlink()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Only one preparation of a directory at a time."""
    try:
        (out / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be made ({error.strerror}).") from error
    with open(out / PARTS / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"{out}: another prepare.py is at work there. Wait for it or choose another.") from error
        yield


def _report(manifest: Manifest, title: str) -> None:
    print(f"{manifest.name}: {title}")
    for split, shards in manifest.splits.items():
        size = sum(s.bytes for s in shards) / 1e6
        print(f"  {split:8} {manifest.samples(split):>9,} samples  {len(shards):>5,} shards  {size:>9,.1f} MB")
    for split, of_split in manifest.fields.items():
        for line in identity.notes(split, of_split):
            print(f"  {line}")
    if "resize" in manifest.source:
        print(f"  {resize.line(manifest.source['resize'])}")
    report.show(manifest)
    if manifest.labels:
        print(f"  {len(manifest.labels)} labels, most frequent first: {', '.join(manifest.labels[:8])}"[:118])


if __name__ == "__main__":
    console.run(main)
