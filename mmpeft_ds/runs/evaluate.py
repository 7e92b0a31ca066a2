"""Evaluate a finished or interrupted run on a split: every sample exactly once, over any number of ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.data.shards import ShardReader, members
from mmpeft_ds.distributed import processes
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.engine import checkpoint, streams
from mmpeft_ds.engine.assembly.build import build
from mmpeft_ds.engine.assembly.resolve import ResolvedSource, resolve, titles
from mmpeft_ds.engine.evaluator import evaluate
from mmpeft_ds.engine.monitor import plain
from mmpeft_ds.engine.stop import StopFlag
from mmpeft_ds.engine.zero import fingerprint
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import write_atomic, write_json
from mmpeft_ds.progress import Progress

CHUNK = 256  # records read at a time for the baselines


def evaluate_run(
    run: Path, split: str, which: str = "best", overrides: list[str] | None = None
) -> list[dict[str, Any]] | None:
    """Score checkpoint `which` of a run on `split` of each of its training data sets and tasks. Every rank calls it.

    Writes RUN/evaluation-SPLIT.json and RUN/predictions-SPLIT.jsonl.

    Args:
        run: run directory.
        which: `best`, `last`, or the name of a checkpoint; `best` is `last` in a run without validation.
        overrides: as `--set`, for where and how to run: engine.deepspeed, data.workers, data.sources.0.dir.

    Returns:
        on every rank, one report a data set and task: dir, split, task, checkpoint, step, samples, rows, scores,
        baselines, seconds. None if it was told to stop (a signal, or the launcher has died): nothing is written.

    Raises:
        BadInput: no run there, no such checkpoint or split.
    """
    if not (run / "recipe.yaml").is_file():
        raise BadInput(f"{run}: no run directory (it has no recipe.yaml). Give --run the run_dir of a recipe.")
    recipe = recipes.load(run / "recipe.yaml", overrides)
    recipe.data.validation = []
    for source in (_on(s, split) for s in recipe.data.sources):
        if source not in recipe.data.validation:
            recipe.data.validation.append(source)
    # Nothing has to be saved: a launcher that is gone, or a signal, ends it within a step.
    with StopFlag(recipe.engine.stop_grace) as stop:
        return _evaluate_run(run, split, which, recipe, stop)


def _evaluate_run(run: Path, split: str, which: str, recipe: Any, stop: StopFlag) -> list[dict[str, Any]] | None:
    ranks = processes.start(recipe.engine.threads, recipe.seed)
    resolved = resolve(recipe)
    if ranks.rank == 0:
        for note in resolved.notes:
            print(f"note: {note}", flush=True)
    streams.check_shards(resolved, ranks)
    path = on_rank0(lambda: find_checkpoint(run, which))
    built = build(resolved, ranks)
    fingerprints = fingerprint.frozen_fingerprint(fingerprint.frozen_tensors(built.model))
    state = checkpoint.load(path, built.engine, built.trainables, fingerprints)
    reports, rows = [], []
    for title, source in zip(titles(resolved.validation), resolved.validation, strict=True):
        began = time.perf_counter()
        stream = streams.make_stream(resolved, [source], ranks, train=False)
        progress = Progress(title, stream.steps_per_epoch(), "steps", shown=ranks.rank == 0)
        steps = progress.track(stream.epoch(0))
        result = evaluate(
            built.engine, resolved.backbone, source.task, steps, ranks.device, stop_requested=stop.requested
        )
        stream.close()
        if result is None:
            return None
        seconds = time.perf_counter() - began
        train = next(s for s in resolved.train if _on(s.options, split) == source.options)
        report = {
            "dir": source.options.dir,
            "split": split,
            "task": source.options.task["name"],
            "checkpoint": path.name,
            "step": state.step,
            "samples": source.samples,
            "rows": on_rank0(lambda result=result: len(result.rows)),
            "bad_samples": result.bad,
            "scores": result.scores,
            "baselines": on_rank0(lambda s=source, t=train: s.task.baselines(records(t), records(s))),
            "seconds": seconds,
        }
        reports.append(report)
        rows += [{"source": title, **row} for row in result.rows] if len(resolved.validation) > 1 else result.rows
    if ranks.rank == 0:
        write_json(run / f"evaluation-{split}.json", plain(reports))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(run / f"predictions-{split}.jsonl", "".join(lines))
    return reports


def _on(options: SourceOptions, split: str) -> SourceOptions:
    """A training source's data set and task, on all of another split."""
    return replace(options, split=split, weight=1.0, subset="")


def find_checkpoint(run: Path, which: str) -> Path:
    """The checkpoint that `which` names, whole. Raises BadInput."""
    folder = run / "checkpoints"
    name = which
    if which in ("best", "last"):
        pointers = [folder / "best", folder / "latest"] if which == "best" else [folder / "latest"]
        found = [p for p in pointers if p.is_file()]
        if not found:
            raise BadInput(f"{run}: no checkpoint yet. Train first; the same train command continues the run.")
        name = found[0].read_text().strip()
    path = folder / name
    if not path.is_dir():
        there = ", ".join(p.name for p in checkpoint.listing(folder)) or "none"
        raise BadInput(f"{run}: no checkpoint {name!r}. There: {there}; or use --checkpoint best or last.")
    wrong = checkpoint.damage(path)
    if wrong is not None:
        raise BadInput(f"{path}: damaged: {wrong}. Use another one with --checkpoint NAME.")
    return path


def records(source: ResolvedSource) -> Iterator[dict[str, Any]]:
    """The json of every sample that is used of a split, in order; images are not decoded."""
    manifest, split = source.manifest, source.options.split
    reader = ShardReader(manifest, split)
    places = [range(s.samples) for s in manifest.shards(split)] if source.subset is None else None
    try:
        for number, rows in enumerate(places or source.subset.places(manifest)):
            for first in range(0, len(rows), CHUNK):
                wanted = [(number, int(i)) for i in rows[first : first + CHUNK]]
                for piece in reader.read(wanted):
                    if isinstance(piece, bytes):
                        yield json.loads(members(piece)[1]["json"])
    finally:
        reader.close()
