"""Opening a finished or interrupted run: its recipe, one of its checkpoints in the built model, its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.distributed import processes
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import checkpoint, checkpoint_files, frozen_images
from mmpeft_ds.engine.assembly.build import Built, build
from mmpeft_ds.engine.assembly.resolve import Resolved, ResolvedSource
from mmpeft_ds.engine.evaluator import Evaluation, count, evaluate
from mmpeft_ds.engine.streams import check_shards, make_stream
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.errors import BadInput
from mmpeft_ds.progress import Progress


@dataclass
class FinishedRun:
    """A checkpoint of a run in the model that it was trained in.

    Attributes:
        path: run directory.
        checkpoint: directory of the checkpoint that is loaded.
        state: of training, when the checkpoint was written.
    """

    path: Path
    resolved: Resolved
    ranks: Ranks
    checkpoint: Path
    built: Built
    state: TrainState

    def evaluate(self, source: ResolvedSource, title: str, stop_requested: Callable[[], bool]) -> Evaluation | None:
        """Score the model on a source, see `evaluate_source`."""
        return evaluate_source(self.resolved, self.built, self.ranks, source, title, stop_requested)


def open_run(run: Path, resolved: Resolved, which: str) -> FinishedRun:
    """Join the ranks, build the model and load checkpoint `which` of a run. Every rank calls it.

    Args:
        run: run directory.
        resolved: its recipe, with the sources that are needed.
        which: `best`, `last`, or the name of a checkpoint; `best` is `last` in a run without validation.

    Raises:
        BadInput: on all ranks: no such checkpoint, shards that are missing or altered, another base model.
    """
    ranks = processes.start(**resolved.recipe.start_options())
    resolved.print_notes(ranks.rank)  # before the base is loaded, which may take minutes
    check_shards(resolved, ranks)
    path = on_rank0(lambda: find_checkpoint(run, which))
    built = build(resolved, ranks, shapes=checkpoint.shapes(path))
    built.frozen = frozen_images.of_built(resolved, built, ranks)
    state = checkpoint.load(path, built.engine, built.trainables, built.fingerprint)
    return FinishedRun(run, resolved, ranks, path, built, state)


def find_checkpoint(run: Path, which: str) -> Path:
    """The checkpoint that `which` names, whole. Raises BadInput."""
    folder = run / "checkpoints"
    name = which
    if which in ("best", "last"):
        pointers = [folder / "best", folder / "latest"] if which == "best" else [folder / "latest"]
        pointer = next((p for p in pointers if p.is_file()), None)
        if pointer is None:
            raise BadInput(f"{run}: no checkpoint yet. Train first; the same train command continues the run.")
        name = pointer.read_text().strip()
    path = folder / name
    if not path.is_dir():
        there = ", ".join(p.name for p in checkpoint_files.listing(folder)) or "none"
        raise BadInput(f"{run}: no checkpoint {name!r}. There: {there}; or use --checkpoint best or last.")
    damage = checkpoint_files.damage(path)
    if damage is not None:
        raise BadInput(f"{path}: damaged: {damage}. Use another one with --checkpoint NAME.")
    return path


def evaluate_source(
    resolved: Resolved,
    built: Built,
    ranks: Ranks,
    source: ResolvedSource,
    title: str,
    stop_requested: Callable[[], bool],
) -> Evaluation | None:
    """Score a built model on every sample of a source, once. Collective.

    Args:
        title: for the progress display.
        stop_requested: whether a stop was requested of this process.

    Returns:
        None if a stop was requested on a rank before the end.
    """
    stream = make_stream(resolved, [source], ranks, train=False)
    stream.keep_frozen(built.frozen and built.frozen.spec)
    progress = Progress(title, stream.steps_per_epoch(), "steps", shown=ranks.rank == 0)
    try:
        steps = progress.track(stream.epoch(0))
        result = evaluate(
            built.engine,
            resolved.backbone,
            source.task,
            steps,
            ranks.device,
            stop_requested=stop_requested,
            frozen=built.frozen,
        )
        return None if result is None else count(result, source)
    finally:
        progress.close()
        stream.close()


def on_split(options: SourceOptions, split: str) -> SourceOptions:
    """A training source's data set and task, on all of another split."""
    return replace(options, split=split, weight=1.0, subset="")
