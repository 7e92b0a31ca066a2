"""Check prepared shards against their manifest: sizes, sha256, side files, every sample.

    python data_prep/verify.py DIR [--list-bad] [--processes N]

One line per problem; exit code 0 if there is none, 2 otherwise. The images' headers are read, their pixels are not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from data_prep.engines import run_jobs  # noqa: E402
from data_prep.options import Parser  # noqa: E402
from data_prep.progress import Progress  # noqa: E402
from data_prep.reading import check_image, read_sample  # noqa: E402
from mmpeft_ds.data.manifest import FILE, Manifest, local_path, sample_key  # noqa: E402
from mmpeft_ds.data.writer import file_sha256  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402


@dataclass(frozen=True)
class Job:
    """One shard to check: where it is, what the manifest says of it, its first sample's number in the split."""

    dir: str
    split: str
    number: int
    first: int


@dataclass
class Found:
    """Problems of one shard, of its samples (key, what is wrong), and how many samples read well."""

    problems: list[str]
    bad: list[tuple[str, str]]
    read: int = 0


def main(argv: list[str]) -> int:
    try:
        parser = Parser(prog="verify.py", description=__doc__)
        parser.add_argument("dir", metavar="DIR", help="directory with a manifest.json")
        parser.add_argument("--list-bad", action="store_true", help="name every bad sample, not one a shard")
        parser.add_argument("--processes", type=int, default=0, help="how many at a time (default: all CPUs)")
        args = parser.parse_args(argv)
        problems = list(verify(args.dir, args.list_bad, args.processes))
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return 2 if problems else 0


def verify(dir: str, list_bad: bool = False, processes: int = 0) -> Iterator[str]:
    """Check everything below `dir`; print and yield one line per problem, and a summary at the end.

    Raises:
        BadInput: if there is no readable manifest.
    """
    manifest = Manifest.load(dir)
    if local_path(manifest.dir) is None:
        raise BadInput(f"{dir}: verify.py reads local directories; copy it here first.")
    jobs: list[Job] = []
    count = samples = 0
    for split, shards in manifest.splits.items():
        first = 0
        for number, shard in enumerate(shards):
            jobs.append(Job(manifest.dir, split, number, first))
            first += shard.samples
        try:
            manifest.offsets(split, 0)
        except BadInput as error:
            print(error)
            yield str(error)
            count += 1
    with Progress("verify", sum(manifest.samples(s) for s in manifest.splits)) as progress:
        results: list[Found | None] = [None] * len(jobs)
        for i, found in run_jobs(check_shard, jobs, "local", processes):
            results[i] = found
            progress.advance(manifest.splits[jobs[i].split][jobs[i].number].samples)
    for job, found in zip(jobs, results, strict=True):
        shard = manifest.splits[job.split][job.number]
        samples += found.read
        lines = [f"{shard.file}: {problem}" for problem in found.problems]
        if list_bad:
            lines += [f"{shard.file}: sample {key}: {what}" for key, what in found.bad]
        elif found.bad:
            key, what = found.bad[0]
            lines.append(f"{shard.file}: {len(found.bad)} bad samples, first {key}: {what}; --list-bad names all")
        for line in lines:
            print(line)
            yield line
        count += len(lines)
    strange = _unlisted(manifest)
    if strange:
        print(f"note: {FILE} does not name {', '.join(strange[:5])}{' ...' if len(strange) > 5 else ''}")
    verdict = f"{count} problems" if count else "all good"
    print(f"{manifest.name}: {len(jobs)} shards, {samples:,} samples read: {verdict}")


def check_shard(job: Job) -> Found:
    """All that is wrong with one shard."""
    manifest = Manifest.load(job.dir)
    shard = manifest.splits[job.split][job.number]
    path = Path(local_path(manifest.path(shard.file)))
    if not path.exists():
        return Found(["is missing. Restore it, or prepare again with --overwrite"], [])
    found = Found([], [])
    size = path.stat().st_size
    if size != shard.bytes:
        found.problems.append(
            f"has {size:,} bytes, expected {shard.bytes:,}. Restore it, or prepare again with --overwrite"
        )
    else:
        digest = file_sha256(path)
        if digest != shard.sha256:
            found.problems.append(
                f"has sha256 {digest[:12]}.., expected {shard.sha256[:12]}..; its bytes were changed"
            )
    try:
        offsets = manifest.offsets(job.split, job.number)
    except BadInput:
        return found  # reported once for the split
    with open(path, "rb") as stream:
        for i, (begin, length) in enumerate(offsets.tolist()):
            key = sample_key(job.split, job.first + i)
            try:
                sample = read_sample(stream, begin, length)
                if sample.key != key:
                    raise ValueError(f"bears the key {sample.key}")
                for image in sample.images:
                    check_image(image)
                found.read += 1
            except ValueError as error:
                found.bad.append((key, str(error)))
    return found


def _unlisted(manifest: Manifest) -> list[str]:
    """Shards in the directory that the manifest does not name."""
    named = {shard.file for shards in manifest.splits.values() for shard in shards}
    there = (p.name for p in Path(local_path(manifest.dir)).iterdir())
    return sorted(n for n in there if re.fullmatch(r".*\.tar", n) and n not in named)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
