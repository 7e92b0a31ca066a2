"""Run directory: its lock, whether a run is continued in it, and what a resume cuts off.

RUN/recipe.yaml       resolved recipe of the run
RUN/checkpoints/      engine/checkpoint.py
RUN/metrics.jsonl     one object per step
RUN/tensorboard/      event files
RUN/adapter/          the result, engine/export.py
RUN/finished.json     the final table; where it exists, the same command prints it and exits
RUN/.lock             held by the process that writes here
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmpeft_ds import recipe as recipes
from mmpeft_ds.adapter_files import whole
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.engine import checkpoint_files, events
from mmpeft_ds.engine.identities import of_saved
from mmpeft_ds.engine.run_lock import Lock, first_free, refuse_foreign, refuse_taken, refuse_unwritable
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import write_atomic, write_json
from mmpeft_ds.redaction import masked_values

# Keys that a resume may change: length, the ZeRO JSON, workers and reading, the cadence of logs and evaluations, and
# the limits of bad data and skipped steps: the message asks the user to raise them.
MAY_DIFFER = (
    "run_dir",
    "optim.epochs",
    "optim.max_steps",
    "optim.ewc.file",  # its content may not
    "backbone.image_backend",  # pixels differ by rounding
    "engine.deepspeed",
    "engine.save_every",
    "engine.save_in_background",
    "engine.eval_every",
    "engine.keep_last",
    "engine.patience",
    "engine.stop_grace",
    "engine.stall",
    "engine.timeout",
    "engine.threads",
    "engine.cache_frozen",
    "engine.adapter_matmul",
    "engine.compile",
    "engine.max_skipped",
    "data.evaluation_batch",  # scores differ by rounding; the memory of an evaluation follows from it
    "data.max_bad_fraction",
    "data.max_bad_in_a_row",
    "data.max_sample_bytes",
    "data.workers",
    "data.prefetch",
    "data.worker_threads",
    "data.pack",  # the samples of a step and their losses stay
    "data.cache_dir",
    "data.verify",
    "monitor",
)
_TORN = re.compile(r"\.(recipe\.yaml|metrics\.jsonl|finished\.json|latest|best|evaluated\.json)\.\d+\.tmp")
IDENTITIES = "identities"  # key of the state's `extra`
logger = logging.getLogger(__name__)


@dataclass
class RunDir:
    """An opened run directory; rank 0 holds its lock until `close` or the end of the process.

    Attributes:
        path: the directory.
        resume_from: checkpoint to continue from, None for a new run.
        differing: keys in which the recipe differs from the saved one, all of them allowed, as `key: old -> new`.
    """

    path: Path
    resume_from: Path | None = None
    differing: tuple[str, ...] = ()
    _lock: Lock | None = None

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @classmethod
    def open(
        cls, path: str | Path, recipe: dict[str, Any], fresh: bool = False, identities: dict[str, str] | None = None
    ) -> RunDir:
        """Open the run directory `path`, new or to be continued. Collective: rank 0 works, all ranks get the result.

        Args:
            recipe: resolved recipe, plain data; written to recipe.yaml.
            identities: of what its paths lead to, by which it is known at another place.
            fresh: take the first of PATH, PATH-1, PATH-2, ... that does not exist.

        Raises:
            BadInput: on all ranks, if a live run owns it, it holds something else, all checkpoints are damaged, or the
                recipe differs from the saved one in a key that a resume may not change.
        """
        recipe = _plain(recipe)
        lock: list[Lock] = []  # stays on rank 0; the rest of the result is broadcast

        def take() -> tuple[str, str | None, tuple[str, ...]]:
            target = first_free(Path(path)) if fresh else Path(path)
            refuse_foreign(target)
            refuse_unwritable(target)
            target.mkdir(parents=True, exist_ok=True)
            lock.append(Lock(target / ".lock"))
            try:
                remove_torn(target)
                newest, differing = _compared(target, recipe, identities or {})
                write_atomic(target / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
            except BaseException:
                lock.pop().release()
                raise
            return str(target), None if newest is None else str(newest), differing

        target, newest, differing = on_rank0(take)
        return cls(Path(target), None if newest is None else Path(newest), differing, lock[0] if lock else None)

    def opening_words(self, step: int, total_steps: int, world_size: int, stage: int) -> str:
        """A line that says where a start begins, on how many ranks, and which keys differ from the saved recipe."""
        begins = f"continues {_where(step, total_steps)}" if step else f"begins, {total_steps:,} steps"
        ranks = f"{world_size:,} rank{'s' if world_size != 1 else ''}"
        changed = f"; changed: {', '.join(self.differing)}" if self.differing else ""
        return f"{self.path}: {begins}, on {ranks} at ZeRO-{stage}{changed}"

    def finished(self, total_steps: int, patience: int = 0) -> dict[str, Any] | None:
        """Contents of finished.json, or None if there is more to train. Collective.

        That is so if the run is to be longer, or if it stopped early and is to be more patient.
        """
        return on_rank0(lambda: _finished(self.path, total_steps, patience, self.resume_from))

    def finish(self, total_steps: int, metrics: dict[str, Any], table: str, patience: int = 0) -> None:
        """Mark the run of `total_steps` steps as done, with its final metrics and printed table. Collective.

        Args:
            patience: `engine.patience` if the run stopped early, else 0.
        """
        value = {"total_steps": total_steps, "patience": patience, "metrics": metrics, "table": table}
        on_rank0(lambda: write_json(self.path / "finished.json", value))

    def truncate(self, step: int, evaluated: bool = True) -> dict[str, Any]:
        """Cut metrics.jsonl and the TensorBoard files after `step`, and unmark a finished run. Collective.

        Args:
            evaluated: the evaluation after `step` is not made again.

        Returns:
            the last line that is left, empty if there is none.
        """

        def cut() -> dict[str, Any]:
            with contextlib.suppress(FileNotFoundError):
                (self.path / "finished.json").unlink()
            rows = truncate_jsonl(self.metrics_path, step)
            events.truncate(self.tensorboard, step, evaluated)
            if lost := sorted(set(range(1, step + 1)) - {row.get("step") for row in rows}):
                some = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
                logger.warning("%s: the lines of %d steps are lost (%s)", self.metrics_path, len(lost), some)
            return rows[-1] if rows else {}

        return on_rank0(cut)

    def keep(self) -> None:
        """On rank 0, see that this run still owns its directory.

        Raises:
            BadInput: another run has taken it, since somebody removed the lock.
            CannotWrite: it is gone.
        """
        if self._lock is not None:
            self._lock.keep()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def preview(
    path: str | Path,
    recipe: dict[str, Any],
    total_steps: int,
    patience: int = 0,
    identities: dict[str, str] | None = None,
) -> list[str]:
    """Lines that say what a start would do in the run directory `path`; none for a new one. Changes nothing.

    Args:
        recipe: resolved recipe, plain data.
        identities: as of `RunDir.open`.
        total_steps: optimizer steps of the recipe.

    Raises:
        BadInput: as the start itself would.
    """
    target = Path(path)
    refuse_taken(target)
    if not target.is_dir():
        return []
    newest, differing = _compared(target, _plain(recipe), identities or {})
    lines = [f"{target}: continued with another {', '.join(differing)}"] if differing else []
    if newest is None:
        return lines
    step = _state(newest).get("step", 0)
    if (done := _finished(target, total_steps, patience, newest)) is not None:
        return [*lines, f"{target}: {finished_words(done, total_steps)}; a start prints its table"]
    return [*lines, f"{target}: a start continues this run {_where(step, total_steps)}"]


def finished_words(done: dict[str, Any], total_steps: int) -> str:
    """A sentence about a finished run, with the number of steps of the recipe if it is smaller now."""
    trained = done["total_steps"]
    fewer = f", and {total_steps:,} are asked for" if total_steps < trained else ""
    return f"this run is finished, with {trained:,} steps{fewer}"


def _where(step: int, total_steps: int) -> str:
    if step < total_steps:
        return f"after step {step:,} of {total_steps:,}"
    fewer = f", and {total_steps:,} are asked for" if step > total_steps else ""
    return f"after all its {step:,} steps{fewer}: nothing is left to train, only to evaluate and to export"


def _plain(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as it is saved: tuples become lists, and credentials in URLs are left out."""
    return masked_values(json.loads(json.dumps(recipe, default=str)))


def _compared(target: Path, recipe: dict[str, Any], identities: dict[str, str]) -> tuple[Path | None, tuple[str, ...]]:
    """The checkpoint to continue from, and the keys that differ from its recipe and may. Raises BadInput."""
    newest = checkpoint_files.newest(target / "checkpoints")
    old = _saved_recipe(target, newest)
    differing = tuple(_differences(old, recipe)) if newest is not None and old is not None else ()
    keys = {d: d.split(":")[0] for d in differing}
    known = {} if newest is None else _state(newest).get("extra", {}).get(IDENTITIES)
    older = known is None  # of a version that did not note them: what the old paths lead to, if they still do
    if known is None:
        known = of_saved(old or {}) if any(not _may_differ(key) for key in keys.values()) else {}
    same = {key for key, value in identities.items() if known.get(key) == value}
    for key in sorted(identities.keys() & known.keys() - same):
        if key.startswith("data.sources."):
            raise BadInput(
                f"{target}: {key} names other data than this run was trained on (another manifest). Restore the data "
                "set, or add --fresh to start in a new directory."
            )
    refused = [d for d, key in keys.items() if not _may_differ(key) and key not in same]
    if refused:
        moved = older and any(keys[d] in identities for d in refused)
        link = " What has only moved is known where the old path leads to it (ln -s NEW OLD)." if moved else ""
        raise BadInput(
            f"{target}: the recipe differs from the one of this run in {'; '.join(refused)}. "
            f"Restore these values to continue it, or add --fresh to start in a new directory.{link}"
        )
    return newest, differing


def _state(path: Path) -> dict[str, Any]:
    header = checkpoint_files.read_json(path, "state")
    return header.get("state", header)


def _finished(path: Path, total_steps: int, patience: int, newest: Path | None) -> dict[str, Any] | None:
    # A file of another form is as good as none.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        stored = json.loads((path / "finished.json").read_text())
        out_of_patience = stored.get("patience", 0)
        more_patient = out_of_patience and (patience > out_of_patience or not patience)
        if stored["total_steps"] >= total_steps and not more_patient and isinstance(stored["table"], str):
            return stored if _has_adapter(path, newest) else None
    return None


def _has_adapter(path: Path, newest: Path | None) -> bool:
    """Whether the adapter of a finished run is whole. Raises BadInput where no checkpoint could give it again."""
    try:
        whole(path / "adapter")
    except BadInput as damage:
        if newest is None:
            raise BadInput(
                f"{path}: finished, but its adapter is not whole and there is no checkpoint to export it from "
                f"({damage}) Restore it, or add --fresh to train in a new directory."
            ) from damage
        logger.warning("%s It is exported again from checkpoint %s", damage, newest.name)
        return False
    return True


def remove_torn(target: Path) -> None:
    """Remove the temporary files that a killed run has left, of those that only the owner of the lock writes."""
    for folder in (target, target / "checkpoints", *checkpoint_files.listing(target / "checkpoints")):
        for path in folder.glob(".*.tmp"):
            if _TORN.fullmatch(path.name):
                path.unlink(missing_ok=True)
    for path in (target / "tensorboard").rglob(f".*{events.PARTIAL}*"):
        path.unlink(missing_ok=True)


def truncate_jsonl(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of `path` whose `step` is above `step`, and a last line that a kill left half written.

    Returns:
        the rows that are left.
    """
    if not path.exists():
        return []
    kept, rows = [], []
    lines = path.read_bytes().splitlines(keepends=True)
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            if line.endswith(b"\n") and (row := json.loads(line)).get("step", 0) <= step:
                kept.append(line)
                rows.append(row)
    if len(kept) != len(lines):
        write_atomic(path, b"".join(kept))
    return rows


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs; a list counts as a leaf unless it holds sections."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        differences = []
        for k in keys:
            differences += _differences(old.get(k, "absent"), new.get(k, "absent"), f"{key}.{k}" if key else str(k))
        return differences
    if (
        isinstance(old, list)
        and isinstance(new, list)
        and len(old) == len(new)
        and any(isinstance(o, dict) for o in old)
    ):
        return [d for i, (o, n) in enumerate(zip(old, new, strict=True)) for d in _differences(o, n, f"{key}.{i}")]
    return [] if old == new else [f"{key}: {old} -> {new}"]


def _may_differ(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_DIFFER)


def _saved_recipe(target: Path, newest: Path | None) -> dict[str, Any] | None:
    """The recipe that the checkpoint was trained with; without one, what recipe.yaml says does not matter.

    Options that did not exist then have the values with which they change nothing.
    """
    if newest is None:
        return None
    saved = masked_values(checkpoint_files.read_json(newest, "recipe"))
    try:
        recipe = recipes.from_dict(copy.deepcopy(saved))
        saved = {**saved, "backbone": {**saved["backbone"], **recipes.former(saved, recipe)}}
        return recipes.to_dict(recipes.filled(recipes.from_dict(saved)))
    except BadInput:  # options that do not exist any more: reported as a difference
        return saved
