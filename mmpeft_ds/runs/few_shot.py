"""Runs of a few-shot study: its cells (methods x shots x seeds) one after the other in one process group.

A cell is a run with its own run directory; a `result.json` in it marks it as finished. Finished cells are not run
again, so a stopped study continues where it was. Test sets are scored once, with the state at the end of training (or
the best state on validation); nothing is chosen on them.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from mmpeft_ds import recipe as recipes
from mmpeft_ds import tasks
from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.data.shards import verify_shards
from mmpeft_ds.data.subset import Subset
from mmpeft_ds.distributed import collectives, processes
from mmpeft_ds.distributed.collectives import on_rank0, rank
from mmpeft_ds.engine import trainer
from mmpeft_ds.engine.assembly import feature_bank, resolve
from mmpeft_ds.engine.assembly.checks import check_records
from mmpeft_ds.engine.assembly.outline import load_manifest
from mmpeft_ds.engine.monitor import plain
from mmpeft_ds.engine.streams import records
from mmpeft_ds.engine.training import Training
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.errors import AgreedBadInput
from mmpeft_ds.files import write_json
from mmpeft_ds.runs.few_shot_study import (
    HALVES,
    RESULT,
    Cell,
    Study,
    TestSet,
    check_prepared,
    is_done,
    read_result,
    reads,
)
from mmpeft_ds.runs.finished import evaluate_source


def run(study: Study) -> bool:
    """Run every cell that is not done; every rank calls it. False if a stop was requested before the end.

    Raises:
        BadInput: on all ranks, naming the cell.
    """
    cells = study.cells()
    device = processes.start(**(cells[0].recipe.start_options() | {"seed": 0})).device
    stop_requested: list[Callable[[], bool]] = []  # of the newest cell
    done = on_rank0(lambda: [is_done(cell) for cell in cells])
    # Before the first: a data set of the last may be missing.
    check_prepared([cell for cell, is_there in zip(cells, done, strict=True) if not is_there])
    for number, (cell, is_there) in enumerate(zip(cells, done, strict=True), 1):
        if is_there:
            continue
        # If its result has been removed, run it again; a run that counts as finished would only print its table. A
        # result without its adapter goes, so that a stop differs from an end.
        on_rank0(lambda cell=cell: [(cell.path / name).unlink(missing_ok=True) for name in ("finished.json", RESULT)])
        began = time.perf_counter()

        def conclude(training: Training, cell: Cell = cell) -> bool:
            stop_requested[:] = [training.stepper.stop_requested]
            return _score(training, cell)

        with _logged(cell.path):
            trainer.run(cell.recipe, conclude=conclude)
        result = on_rank0(lambda cell=cell: read_result(cell))
        if result is None:
            return False
        if rank() == 0:
            scores = ", ".join(f"{name} {s['accuracy']:.3f}" for name, s in result["tests"].items())
            seconds = time.perf_counter() - began
            print(f"[{number}/{len(cells)}] {cell.title}: {scores} ({seconds:.1f} s)", flush=True)
        # A signal at the very end of this run stops the study.
        if collectives.sum_scalars([float(stop_requested[-1]())], device)[0] and number < len(cells):
            return False
        gc.collect()  # an engine and its model refer to each other
    return True


# ----------------------------------------------------------------------------------------------------- one cell


def _score(training: Training, cell: Cell) -> bool:
    """Score every test set with the exported state and write the result; False if a stop was requested."""
    resolved, scores, baselines = training.resolved, {}, {}
    for test in cell.tests:
        for half in ("",) if cell.half == "all" else HALVES:
            source = _source(resolved, test, half)
            title = f"{test.name} {half}".strip()
            stop_requested = training.stepper.stop_requested
            result = evaluate_source(resolved, training.built, training.ranks, source, title, stop_requested)
            if result is None:
                return False
            scores[title] = {**result.scores, "samples": result.scored, "of": result.there}
            # Baselines see the whole training split: among a few samples of each class none is the most frequent.
            train = replace(resolved.train[0], subset=None)
            baselines[title] = on_rank0(
                lambda train=train, source=source: source.task.baselines(records(train, True), records(source, True))
            )
    result = {
        "method": cell.method,
        "shots": cell.shots,
        "seed": cell.seed,
        "half": cell.half,
        "once": cell.once,
        "reads": reads(cell.recipe),
        "classes": len(resolved.labels or []),
        "train_samples": sum(source.samples for source in resolved.train),
        "trainable_parameters": sum(map(zero_state.numel, training.built.trainables.values())),
        "steps": training.state.step,
        "train_seconds": training.state.elapsed,
        "tests": scores,
        "baselines": baselines,
        "key": cell.key,
    }
    on_rank0(lambda: write_json(cell.path / RESULT, plain(result)))
    return True


def _source(resolved: resolve.Resolved, test: TestSet, half: str) -> resolve.ResolvedSource:
    """A test set with the task of the training data, after the checks of any source. Raises BadInput."""
    recipe, train = resolved.recipe, resolved.train[0]
    options = SourceOptions(test.dir, test.split, f"few_shot/{test.split}-{half}.json" if half else "")
    options.task = dict(test.task or train.options.task)
    key = f"few_shot.tests ({test.name})"
    manifest = load_manifest(recipe, key, options)
    feature_bank.towers_of([train.manifest, manifest])
    section = recipes.Section.read(tasks, options.task, f"{key}.task", recipe.origin)
    check_records(recipe, key, options, manifest, section)
    subset = Subset.load(options.subset, manifest, options.split) if half else None
    source = resolve.make_source(section, options, manifest, subset, resolved.labels)
    problems = on_rank0(lambda: verify_shards(manifest, options.split, recipe.data.verify, 0, 1))
    if problems:
        raise AgreedBadInput(problems[0])
    return source


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Context in which output goes to a log of the run, since that of many runs would hide the table."""
    on_rank0(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    with _Log(path.with_suffix(".log") if rank() == 0 else Path(os.devnull)) as log:
        before = sys.stderr
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                yield
            except BaseException:
                if rank() == 0:
                    print(f"output of the run that failed: {path.with_suffix('.log')}", file=before)
                raise


class _Log(io.TextIOBase):
    """A log, of which what cannot be written is dropped: rank 0 alone would end by it, and the others blame it.
    Results that cannot be written end all of them."""

    def __init__(self, path: Path):
        try:
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError:
            self.file = open(os.devnull, "ab", buffering=0)  # noqa: SIM115

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.file.write(text.encode("utf-8", "backslashreplace"))
        return len(text)

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()
        super().close()
