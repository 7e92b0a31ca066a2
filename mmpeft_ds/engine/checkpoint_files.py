"""The files of checkpoints: writing and pruning them, and finding those that are undamaged. See `checkpoint`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmpeft_ds.engine.checkpoint_tensors import XXH3, hashed
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import check_regular, naming, new_directory, sha256, write_atomic, write_json

CHECKSUMS = "checksums.json"
_HEADER = {"format": int, "optimizer_step": (int, float), "state": dict}
# The position in the data: without one of these a start would begin elsewhere.
_POSITION = ("epoch", "step", "step_in_epoch", "global_batch")
_MAPPINGS = ("identities", "epoch_weight")  # of the state's `extra`
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
logger = logging.getLogger(__name__)


def place(folder: Path, step: int) -> Path:
    """The directory of the next checkpoint of `step`, never that of a complete one."""
    again = 0
    while (path := folder / name(step, again)).exists():
        again += 1
    return path


def name(step: int, again: int = 0) -> str:
    """The name of the first checkpoint of a step, and those of the following ones."""
    return f"step-{step:08d}" + (f".{again}" if again else "")


def write(folder: Path, step: int, files: dict[str, Callable], keep_last: int, best: bool) -> Path:
    """Write a checkpoint into `folder`, move `latest` to it, and prune older ones.

    Args:
        files: name -> function that writes the file at a path, and may return its hash.
        best: also move the pointer `best`.

    Returns:
        its directory, that of `place`.
    """
    with naming(folder):
        folder.mkdir(exist_ok=True)  # and not the run directory, if somebody has removed it
    for left_over in folder.glob(".*partial*"):  # of a process that was killed while saving
        shutil.rmtree(left_over, ignore_errors=True)
    path = place(folder, step)
    with new_directory(path) as partial:
        digests = {file: write_file(partial / file) for file, write_file in files.items()}
        sums = {file: d if isinstance(d, str) else sha256(partial / file) for file, d in digests.items()}
        write_json(partial / CHECKSUMS, sums, in_new_directory=True)
    for pointer in ("best", "latest") if best else ("latest",):  # `latest` last: its state may name itself the best
        write_atomic(folder / pointer, path.name + "\n")
    prune(folder, keep_last)
    return path


def prune(folder: Path, keep_last: int) -> None:
    """Remove checkpoints beyond the newest `keep_last`, except those that `latest` and `best` name."""
    pointed = {p.read_text().strip() for p in (folder / "latest", folder / "best") if p.is_file()}
    steps: list[str] = []
    for path in listing(folder):
        step = path.name.split(".")[0]
        superseded = step in steps
        if not superseded:
            steps.append(step)
        if (superseded or len(steps) > max(1, keep_last)) and path.name not in pointed:
            shutil.rmtree(path)


def listing(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first."""
    if not folder.is_dir():
        return []
    named = [(m, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [p for m, p in sorted(named, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 0)), reverse=True)]


def newest(folder: Path) -> Path | None:
    """The checkpoint in `folder` to continue from; see `checkpoint.newest_valid`. Raises BadInput."""
    candidates, complaints = listing(folder), []
    pointer = folder / "latest"
    if pointer.is_file():  # takes precedence, so that a user may move it back by hand
        name = pointer.read_text(errors="replace").strip()
        named = [p for p in candidates if p.name == name]
        candidates = named + [p for p in candidates if p not in named]
        if not named:
            complaints.append(f"checkpoint {name[:30]!r}, which `latest` names, is missing")
    for path in candidates:
        wrong = damage(path) or _unreadable(path)
        if wrong is None:
            if complaints:
                logger.warning("%s; continuing from %s", "; ".join(complaints), path.name)
            return path
        complaints.append(f"checkpoint {path.name} is damaged: {wrong}")
    if complaints:
        raise BadInput(
            f"{folder}: no checkpoint is whole ({'; '.join(complaints)}). Restore one, or start over with --fresh."
        )
    return None


def best(folder: Path) -> Path | None:
    """The checkpoint in `folder` that `best` names; None, with a warning, if it is missing or damaged."""
    pointer = folder / "best"
    path = folder / pointer.read_text(errors="replace").strip() if pointer.is_file() else pointer
    wrong = (damage(path) or _unreadable(path)) if path.is_dir() else f"{path.name} is missing"
    if wrong is not None:
        logger.warning("the best checkpoint is damaged: %s; the last weights are exported in its place", wrong)
        return None
    return path


def damage(path: str | Path) -> str | None:
    """Description of a damage to the checkpoint at `path`; None if every file is as it was written."""
    path = Path(path)
    before = _stamps(path)
    _whole.pop(path, None)
    try:
        check_regular(path / CHECKSUMS)
        checksums = json.loads((path / CHECKSUMS).read_text("utf-8"))
        for name, expected in checksums.items():
            kind = XXH3.rstrip(":") if expected.startswith(XXH3) else "sha256"  # which older versions took for all
            digest = sha256(path / name) if kind == "sha256" else hashed(path / name).removeprefix(XXH3)
            if digest != (expected := expected.removeprefix(XXH3)):
                return f"{name} has {kind} {digest[:12]}..., expected {expected[:12]}..."
    except FileNotFoundError as e:
        return f"{Path(e.filename).name} is missing"
    except (ValueError, AttributeError, TypeError, OSError) as e:
        return f"{CHECKSUMS} cannot be read ({e})"
    if not checksums:
        return f"{CHECKSUMS} is empty"
    if before is not None:
        _whole[path] = before  # as the files were before they were read
    return None


def damage_since(path: str | Path) -> str | None:
    """As `damage`, without reading again what was found whole by this process and has not changed since.

    A change shows in the size of a file, its inode, or the time at which either or its bytes were last changed.
    """
    path = Path(path)
    return None if path in _whole and _whole[path] == _stamps(path) else damage(path)


_whole: dict[Path, dict[str, tuple[int, ...]]] = {}  # checkpoints that were found whole


def _stamps(path: Path) -> dict[str, tuple[int, ...]] | None:
    """What tells a change of each file of a directory; None where it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return {e.name: (s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for e in entries for s in [e.stat()]}
    except OSError:
        return None


def _unreadable(path: Path) -> str | None:
    """Reason why files with correct checksums cannot be read, such as those of another program; None if they can."""
    try:
        for name in ("state", "recipe", "fingerprint"):
            if name == "state" or (path / f"{name}.json").is_file():
                if not isinstance(value := read_json(path, name), dict):
                    raise ValueError(f"{name}.json holds values of another type")
                if name == "state":
                    _check_form(value)
        for name in ("weights", "optimizer"):
            with safe_open(path / f"{name}.safetensors", "pt"):
                pass
    except (OSError, ValueError, RecursionError, SafetensorError) as e:
        return " ".join(str(e).split())
    return None


def _check_form(header: dict[str, Any]) -> None:
    """Raise ValueError where what a start reads of a state is of another type, or not there."""
    if absent := [key for key in _HEADER if key not in header]:
        raise ValueError(f"state.json lacks {', '.join(absent)}")
    wrong, state = [key for key, kind in _HEADER.items() if not isinstance(header[key], kind)], header["state"]
    if not wrong:
        if absent := [key for key in _POSITION if key not in state]:
            raise ValueError(f"state.json lacks {', '.join(absent)} of its state")
        wrong += [f.name for f in dataclasses.fields(TrainState) if f.name in state and not _fits(f, state[f.name])]
        extra = state.get("extra", {})
        wrong += [key for key in _MAPPINGS if isinstance(extra, dict) and not isinstance(extra.get(key, {}), dict)]
    if wrong:
        raise ValueError(f"state.json holds values of another type ({', '.join(wrong)})")


def _fits(field: dataclasses.Field, value: Any) -> bool:
    """Whether a field of TrainState may have a value that stood in JSON."""
    if field.name == "best":
        return value is None or type(value) in (int, float)
    if field.default is dataclasses.MISSING:  # of names: numbers, or anything
        return isinstance(value, dict) and (field.name == "extra" or all(type(v) is int for v in value.values()))
    return type(value) in ((int, float) if isinstance(field.default, float) else (int,))


def read_json(path: str | Path, name: str) -> dict[str, Any]:
    """One of the JSON files of a checkpoint: `state`, `recipe` or `fingerprint`."""
    check_regular(Path(path) / f"{name}.json")
    return json.loads((Path(path) / f"{name}.json").read_text("utf-8"))


def write_evaluation(path: Path, state: TrainState, keep_last: int, best: bool) -> None:
    """Add the state after an evaluation to the checkpoint at `path`; see `checkpoint.record_evaluation`."""
    if best:  # first: a run killed in between evaluates again; from a state without its pointer it would not
        write_atomic(path.parent / "best", path.name + "\n")
    value = dataclasses.asdict(state)
    write_json(path / "evaluated.json", {"sha256": _digest(value), "state": value})
    prune(path.parent, keep_last)


def evaluated(path: Path, step: int) -> dict[str, Any] | None:
    """The fields of TrainState after the evaluation of a checkpoint of `step`; None if that is to be made again.

    So it is where there is no file or, with a warning, where it is damaged.
    """
    try:
        stored = json.loads((path / "evaluated.json").read_text("utf-8"))
        state = stored.get("state", stored)  # older versions wrote the state alone
        if state["step"] == step and stored.get("sha256") == (None if state is stored else _digest(state)):
            return state
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        pass
    logger.warning("checkpoint %s: evaluated.json is damaged; the evaluation is made again", path.name)
    return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
