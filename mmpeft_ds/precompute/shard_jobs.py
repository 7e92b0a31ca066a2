"""Jobs that make new shards out of old ones, one for one, as features.py and captions.py do.

Ranks take shards in turn. The bytes of a shard depend on its samples and the options alone, so any number of ranks
writes the same files, and an interrupted run continues where it was.
"""

from __future__ import annotations

import abc
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from mmpeft_ds.data.manifest import FILE, Manifest
from mmpeft_ds.data.packing import spread
from mmpeft_ds.data.parts import PARTS, Part, finished_part, part_path, shard_file
from mmpeft_ds.data.shards import ShardReader, verify_shards
from mmpeft_ds.data.writer import write_shard
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.files import cannot_write, write_json
from mmpeft_ds.precompute.feature_samples import FeatureSample
from mmpeft_ds.progress import Progress
from mmpeft_ds.recipe import Recipe
from mmpeft_ds.stop import StopFlag

PLAN = "plan.json"
Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class Job:
    """One shard: number `number` of a split, whose first sample is the split's sample `first`."""

    split: str
    number: int
    first: int
    count: int


@dataclass
class Plan:
    """All jobs, and those that are left to do; the same on all ranks."""

    jobs: list[Job]
    todo: list[Job]
    done: bool = False


@dataclass
class ShardNotes:
    """Notes about a shard beside its samples.

    Attributes:
        bad: (key, kind) of the samples that could not be used.
        counts: further numbers, by name.
    """

    bad: list[tuple[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: ShardNotes) -> None:
        """Add the notes about another shard."""
        self.bad += other.bad
        self.counts.update(other.counts)


class ShardMaker(abc.ABC, Generic[Prepared]):
    """Makes one new shard out of one shard of the source.

    Args:
        recipe: its `data` section says how shards are read.
        source: the data set.
        out: directory of the new shards.
        name: of the new data set.
        batch: samples per forward pass.
        threads: number of threads that prepare samples ahead of the model.
        stop: notices requests to stop.
    """

    def __init__(
        self, recipe: Recipe, source: Manifest, out: Path, name: str, batch: int, threads: int, stop: StopFlag | None
    ):
        self.recipe, self.source, self.out, self.name = recipe, source, out, name
        self.batch, self.threads, self.stop = batch, threads, stop
        self._usual: dict[str, list[Prepared]] = {}

    @abc.abstractmethod
    def prepare(self, job: Job, number: int, piece: bytes | BadSample) -> Prepared:
        """Read and decode sample `number` of the job's shard, in a thread. Must not raise for a bad sample."""

    @abc.abstractmethod
    def make(self, job: Job, number: int, prepared: list[Prepared], notes: ShardNotes) -> Iterator[FeatureSample]:
        """The new samples of consecutive ones, the first of which is sample `number` of the job's shard."""

    def write(self, job: Job, progress: Progress | None = None) -> Part | None:
        """Make one shard. None if a stop was requested meanwhile; nothing of the shard is left then."""
        try:
            return write_shard(self.out, self.name, job.split, job.number, job.first, self._samples(job, progress))
        except _Stopped:
            return None
        except OSError as error:
            if not (reason := cannot_write(error)):
                raise
            raise BadInput(f"{error.filename or self.out}: {reason}") from error

    def usual(self, split: str) -> list[Prepared]:
        """Some samples of a split from all over it, prepared, bad ones as well; the same for every shard and rank."""
        if split not in self._usual:
            shards, data = self.source.shards(split), self.recipe.data
            reader = ShardReader.of(self.source, split, data)
            wanted = spread([shard.samples for shard in shards])
            pieces = zip(wanted, reader.read(wanted), strict=True)
            self._usual[split] = [
                self.prepare(Job(split, shard, 0, shards[shard].samples), number, piece)
                for (shard, number), piece in pieces
            ]
            reader.close()
        return self._usual[split]

    def finished(self, plan: Plan) -> Iterator[tuple[Job, Part, ShardNotes]]:
        """All shards of a finished plan in order, and the notes about each.

        Raises:
            BadInput: a shard was removed or changed since it was made.
        """
        for job in plan.jobs:
            part = finished_part(self.out, self.file(job))
            if part is None:
                path = self.out / self.file(job)
                what = "was changed" if path.exists() else "is not there any more"
                raise BadInput(f"{path}: {what} since this command made it. The same command makes it again.")
            noted = json.loads(self._notes_path(job).read_text("utf-8"))
            yield job, part, ShardNotes(noted["bad"], Counter(noted["counts"]))

    def file(self, job: Job) -> str:
        """Name of the shard of a job."""
        return shard_file(self.name, job.split, job.number)

    def _notes_path(self, job: Job) -> Path:
        """File of the notes about a shard until the manifest is written."""
        return part_path(self.out, self.file(job)).with_suffix(".told.json")

    def _samples(self, job: Job, progress: Progress | None) -> Iterator[FeatureSample]:
        notes = ShardNotes()
        for number, prepared in self._ahead(job):
            if self.stop is not None and self.stop.requested():
                raise _Stopped
            yield from self.make(job, number, prepared, notes)
            if progress is not None:
                progress.advance(len(prepared))
        # Write the notes before the part, which says that the shard is finished.
        write_json(self._notes_path(job), {"bad": notes.bad, "counts": notes.counts})

    def _ahead(self, job: Job) -> Iterator[tuple[int, list[Prepared]]]:
        """Prepared samples, `batch` at a time, and the number of the first; the next ones are prepared meanwhile."""
        data = self.recipe.data
        reader = ShardReader.of(self.source, job.split, data)
        starts = list(range(0, job.count, self.batch))

        def submit(first: int) -> list[Future[Prepared]]:
            wanted = [(job.number, i) for i in range(first, min(first + self.batch, job.count))]
            pieces = zip(wanted, reader.read(wanted), strict=True)
            return [pool.submit(self.prepare, job, number, piece) for (_, number), piece in pieces]

        with ThreadPoolExecutor(self.threads) as pool:
            try:
                coming = submit(starts[0])
                for first, following in zip(starts, [*starts[1:], None], strict=True):
                    ready, coming = coming, [] if following is None else submit(following)
                    yield first, [future.result() for future in ready]
            finally:
                pool.shutdown(cancel_futures=True)
                reader.close()


def open_plan(
    source: Manifest,
    out: Path,
    name: str,
    splits: Sequence[str],
    wanted: dict[str, Any],
    of_manifest: Callable[[Manifest], dict[str, Any]],
    refuse_difference: Callable[[dict[str, Any], dict[str, Any]], None],
) -> Plan:
    """Plan the shards in `out`, on rank 0, and write there what is being made.

    Args:
        splits: of the source; empty: all.
        wanted: all that the new shards depend on, JSON-able.
        of_manifest: gives the same of a finished data set; raises BadInput for one of another kind.
        refuse_difference: takes the same of what is in `out`, and `wanted`; raises BadInput if they differ.

    Raises:
        BadInput: a damaged source, or a directory that holds something else.
    """
    splits = list(splits) or list(source.splits)
    for split in splits:
        if problems := verify_shards(source, split, "size"):
            raise BadInput(problems[0])
    if (out / FILE).exists():
        refuse_difference(of_manifest(Manifest.load(out)), wanted)
        shutil.rmtree(out / PARTS, ignore_errors=True)
        return Plan([], [], done=True)
    try:
        (out / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be made ({error.strerror}).") from error
    if (out / PARTS / PLAN).exists():
        refuse_difference(json.loads((out / PARTS / PLAN).read_text("utf-8")), wanted)
        for stale in (out / PARTS).glob("*.tmp"):
            stale.unlink()
    elif strange := sorted(p.name for p in out.iterdir() if p.suffix in (".tar", ".npy")):
        raise BadInput(f"{out}: holds {strange[0]}, but no {FILE} that tells of it. Choose an empty directory.")
    else:
        write_json(out / PARTS / PLAN, wanted)
    jobs = []
    for split in splits:
        first = 0
        for number, shard in enumerate(source.shards(split)):
            jobs.append(Job(split, number, first, shard.samples))
            first += shard.samples
    return Plan(jobs, [j for j in jobs if finished_part(out, shard_file(name, j.split, j.number)) is None])


def carry_out(maker: ShardMaker, plan: Plan, ranks: Any, what: str) -> bool:
    """Make all missing shards, in rounds of one shard per rank; False if a stop was requested on a rank.

    Args:
        what: title of the progress display.

    Raises:
        BadInput: on all ranks.
    """
    mine = plan.todo[ranks.rank :: ranks.world_size]
    total = sum(job.count for job in mine)
    title = what if ranks.world_size == 1 else f"{what} (rank 0 of {ranks.world_size})"
    with Progress(title, total, shown=ranks.rank == 0) as progress:
        for round_ in range(-(-len(plan.todo) // ranks.world_size)):
            problem, stopped = None, False
            if round_ < len(mine):
                try:
                    stopped = maker.write(mine[round_], progress) is None
                except BadInput as error:
                    problem = str(error)
            # Meet after every round, so that no rank waits for another longer than one shard takes.
            outcomes: list[Any] = [None] * ranks.world_size
            if ranks.world_size > 1:
                dist.all_gather_object(outcomes, (problem, stopped or maker.stop.requested()))
            else:
                outcomes = [(problem, stopped)]
            if problems := [p for p, _ in outcomes if p]:
                raise BadInput(problems[0])
            if any(s for _, s in outcomes):
                return False
    return True


class _Stopped(Exception):  # noqa: N818 - a stop was requested, which is no error
    pass
