"""Checkpoints: only what trains, unsharded, written by rank 0, read with any number of ranks and any ZeRO stage.

    RUN/checkpoints/latest                     name of the newest one, moved atomically after it is complete
                    best                       name of the best one, if any
                    step-00000120/weights.safetensors      float32 masters of the trained parameters
                                  optimizer.safetensors    NAME.exp_avg, NAME.exp_avg_sq; of SGD NAME.momentum_buffer
                                  model_state.safetensors  state beside the weights: of the model, such as a queue, and
                                                           what an adapter was attached with
                                  state.json               TrainState, name of the optimiser, Adam's step, format
                                  recipe.json              the resolved recipe
                                  fingerprint.json         of every frozen tensor
                                  checksums.json           sha256 of the files above
                                  evaluated.json           TrainState after an evaluation that followed the saving

Random numbers need no state of their own: they are drawn from (seed, epoch, sample) and (seed, step, rank).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mmpeft_ds.backbones.base import model_hooks
from mmpeft_ds.distributed.collectives import on_rank0, rank, world_size
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import fingerprint as fingerprints
from mmpeft_ds.engine.zero import full_state
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import naming, new_directory, save_tensors, sha256, write_atomic, write_json
from mmpeft_ds.methods.common.layers import kept_buffers

FORMAT = 1
CHECKSUMS = "checksums.json"
MODEL_STATE = "model_state.safetensors"
ADAPTER = "adapter:"  # before the names of an adapter's buffers in that file
_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
logger = logging.getLogger(__name__)


def save(
    run_dir: str | Path,
    engine: Any,
    trainables: dict[str, nn.Parameter],
    state: TrainState,
    *,
    recipe: dict[str, Any],
    fingerprint: dict[str, str],
    keep_last: int,
    best: bool = False,
) -> Path:
    """Write a checkpoint below `run_dir` and move `latest` (and, if `best`, `best`) to it. Collective.

    It appears under its name only when all its bytes are on disk and have been compared with what trains; a process
    killed at any moment leaves the previous ones as they were. All but the `keep_last` newest and the best are removed
    afterwards.

    Args:
        run_dir: the run directory, seen by rank 0.
        engine: what `deepspeed.initialize` returned.
        trainables: name -> parameter; the same names in the same order on all ranks.
        fingerprint: of `fingerprint.frozen_fingerprint`.

    Returns:
        the checkpoint's directory, on every rank.

    Raises:
        RuntimeError: if what was written is not what the next forward uses and the optimizer holds.
    """
    zero_state.ensure_optimizer_state(engine)
    held = Held.of(engine, trainables)
    keys = (full_state.WEIGHT, *zero_state.moments(engine)) if trainables else (full_state.WEIGHT,)
    full = full_state.on_rank0(engine, trainables, keys)  # gathers trainables only, never a frozen weight
    weights = full.pop(full_state.WEIGHT)
    moments = {f"{name}.{key}": value for key, tensors in full.items() for name, value in tensors.items()}
    header = {
        "format": FORMAT,
        "optimizer": _optimizer(engine, trainables),
        "optimizer_step": zero_state.optimizer_step(engine),
        "state": dataclasses.asdict(state),
        "saved_by": {"world_size": world_size(), "zero_stage": engine.zero_optimization_stage()},
    }
    files: dict[str, Callable[[Path], None]] = {
        "weights.safetensors": lambda p: save_tensors(p, weights),
        "optimizer.safetensors": lambda p: save_tensors(p, moments),
        "state.json": lambda p: write_json(p, header),
        "recipe.json": lambda p: write_json(p, recipe),
        "fingerprint.json": lambda p: write_json(p, fingerprint),
    }
    extra = _model(engine, "training_state")
    extra |= {f"{ADAPTER}{name}": buffer for name, buffer in kept_buffers(engine.module).items()}
    extra = {k: v.detach().cpu().contiguous() for k, v in extra.items()}
    if extra:
        files[MODEL_STATE] = lambda p: save_tensors(p, extra)
    folder = Path(run_dir) / "checkpoints"
    return on_rank0(lambda: _write(folder, state.step, files, keep_last, best, held.check))


@dataclasses.dataclass(frozen=True)
class Held:
    """Fingerprints of all that trains, computed without DeepSpeed's map from parameters to masters, to check files by.

    Attributes:
        weights: name -> fingerprint of the float32 parameter that the next forward uses.
        moments: of the optimizer, name -> sum of the bits of all numbers.
    """

    weights: dict[str, str]
    moments: dict[str, int]

    @classmethod
    def of(cls, engine: Any, trainables: dict[str, nn.Parameter]) -> Held:
        """Those of an engine. Collective. Raises RuntimeError if ranks hold different copies of a parameter."""
        weights, differing = fingerprints.over_ranks(trainables.items())
        if differing:
            raise RuntimeError(f"trained parameter {differing[0]} is not the same on all ranks")
        return cls(weights, zero_state.state_sums(engine) if trainables else {})

    def check(self, folder: Path) -> None:
        """Compare the files of a checkpoint with them. Raises RuntimeError."""
        self.check_weights(load_file(folder / "weights.safetensors"), f"{folder}/weights.safetensors")
        written = load_file(folder / "optimizer.safetensors")
        for key, held in self.moments.items():
            written_bits = sum(zero_state.bits_sum(t) for name, t in written.items() if name.endswith(f".{key}"))
            if written_bits % 2**64 != held:
                raise RuntimeError(f"{folder}/optimizer.safetensors: {key} is not what the optimizer holds")

    def check_weights(self, written: dict[str, torch.Tensor], where: str) -> None:
        """Raise RuntimeError, naming the first tensor that differs."""
        wrong = [name for name, print in self.weights.items() if fingerprints.of_whole(written[name]) != print]
        if wrong:
            raise RuntimeError(
                f"{where}: {len(wrong)} of {len(self.weights)} tensors are not those that train, first {wrong[0]}"
            )


def load(
    path: str | Path,
    engine: Any,
    trainables: dict[str, nn.Parameter],
    fingerprint: dict[str, str] | None = None,
) -> TrainState:
    """Put a checkpoint into `engine`, whatever rank count and stage it was saved with. Collective.

    Rank 0 reads the files and broadcasts them. Afterwards the masters, the moments, Adam's step and the parameters of
    the next forward are those of the saved run. The learning rate needs no state: it is a function of the step.

    Args:
        path: a checkpoint directory, as `newest_valid` returns it.
        trainables: as for `save`.
        fingerprint: of the frozen base at hand; None skips that check.

    Raises:
        BadInput: if names or shapes of the trained parameters differ, or the optimiser or the base is another one.
    """
    path = Path(path)
    header = on_rank0(lambda: _read_header(path, trainables, fingerprint, _optimizer(engine, trainables)))
    zero_state.ensure_optimizer_state(engine)
    keys = (full_state.WEIGHT, *(zero_state.moments(engine) if trainables else ()))
    shapes = {name: zero_state.full_shape(parameter) for name, parameter in trainables.items()}
    with _reading(path, keys) as read, torch.no_grad():
        for sent in full_state.from_rank0(shapes, read, len(keys), engine.device):
            for name, tensors in sent.items():
                full = dict(zip(keys, tensors, strict=True))
                zero_state.write_full(engine, trainables[name], full)
                zero_state.write_parameter(trainables[name], full[full_state.WEIGHT])
    zero_state.set_optimizer_step(engine, header["optimizer_step"])
    extra = on_rank0(lambda: load_file(path / MODEL_STATE) if (path / MODEL_STATE).is_file() else {})
    for name, buffer in kept_buffers(engine.module).items():
        buffer.copy_(extra.pop(f"{ADAPTER}{name}"))
    if extra:
        _model(engine, "load_training_state", extra)
    known = {f.name for f in dataclasses.fields(TrainState)}
    return TrainState(**{k: v for k, v in header["state"].items() if k in known})


def record_evaluation(path: Path, state: TrainState, keep_last: int, best: bool) -> None:
    """Add to a checkpoint what an evaluation of its weights gave; if `best`, move that pointer to it. Collective.

    Args:
        path: of a checkpoint that was saved after the step that `state` is at.
    """

    def write() -> None:
        if best:  # first: a run killed in between evaluates again; from a state without its pointer it would not
            write_atomic(path.parent / "best", path.name + "\n")
        write_json(path / "evaluated.json", dataclasses.asdict(state))
        _prune(path.parent, keep_last)

    on_rank0(write)


def newest_valid(run_dir: str | Path) -> Path | None:
    """The checkpoint to continue from: the one that `latest` names, else the newest that is whole. Collective.

    Every damaged one on the way is named in a warning.

    Returns:
        its directory; None if there are no checkpoints at all.

    Raises:
        BadInput: if there are checkpoints and all are damaged.
    """
    return on_rank0(lambda: _newest_valid(Path(run_dir) / "checkpoints"))


def best_valid(run_dir: str | Path) -> Path | None:
    """The checkpoint that `best` names; None, with a warning, if it is missing or damaged. Collective."""
    return on_rank0(lambda: _best_valid(Path(run_dir) / "checkpoints"))


def damage(path: str | Path) -> str | None:
    """What is wrong with the checkpoint at `path`, in a few words; None if every file is as it was written."""
    path = Path(path)
    try:
        checksums = json.loads((path / CHECKSUMS).read_text("utf-8"))
        for name, expected in checksums.items():
            digest = sha256(path / name)
            if digest != expected:
                return f"{name} has sha256 {digest[:12]}..., expected {expected[:12]}..."
    except FileNotFoundError as e:
        return f"{Path(e.filename).name} is missing"
    except (ValueError, AttributeError, TypeError, OSError) as e:
        return f"{CHECKSUMS} cannot be read ({e})"
    return None if checksums else f"{CHECKSUMS} is empty"


def read_json(path: str | Path, name: str) -> dict[str, Any]:
    """One of the JSON files of a checkpoint: `state`, `recipe`, `fingerprint` or `evaluated`."""
    return json.loads((Path(path) / f"{name}.json").read_text("utf-8"))


def listing(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first."""
    if not folder.is_dir():
        return []
    named = [(m, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [p for m, p in sorted(named, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 0)), reverse=True)]


def _model(engine: Any, verb: str, *args: Any) -> dict[str, torch.Tensor]:
    """Call `verb` of the base model, which reads or sets the state that it keeps beside its weights."""
    return getattr(model_hooks(engine.module), verb)(*args)


@contextlib.contextmanager
def _reading(path: Path, keys: tuple[str, ...]) -> Iterator[Callable[[str], list[torch.Tensor]]]:
    """Reads weight and moments of a trained parameter, by its name, on rank 0."""
    with contextlib.ExitStack() as files:
        if rank() == 0:
            weights, optimizer = (
                files.enter_context(safe_open(path / f"{name}.safetensors", "pt")) for name in ("weights", "optimizer")
            )
        yield lambda name: [weights.get_tensor(name), *(optimizer.get_tensor(f"{name}.{key}") for key in keys[1:])]


def _optimizer(engine: Any, trainables: dict[str, nn.Parameter]) -> str | None:
    """The optimiser's name in recipes; None where nothing trains."""
    return zero_state.optimizer_name(engine) if trainables else None


def _read_header(
    path: Path, trainables: dict[str, nn.Parameter], fingerprint: dict[str, str] | None, optimizer: str | None
) -> dict[str, Any]:
    if (wrong := damage(path)) is not None:
        raise BadInput(f"checkpoint {path} is damaged: {wrong}. Name another one, or start over with --fresh.")
    header = read_json(path, "state")
    if header["format"] != FORMAT:
        raise BadInput(f"checkpoint {path} has format {header['format']}, this version reads format {FORMAT}")
    written_with = header.get("optimizer", "adamw")  # files without a name are older than the other optimisers
    if trainables and written_with != optimizer:
        raise BadInput(
            f"checkpoint {path}: was written with optim.name: {written_with}, and this run has {optimizer}. "
            "Use the recipe it was trained with, or --fresh."
        )
    with safe_open(path / "weights.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    here = {name: zero_state.full_shape(p) for name, p in trainables.items()}
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            raise BadInput(
                f"checkpoint {path}: trained parameter {name} has shape {saved.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} here. Use the recipe it was trained with, or --fresh."
            )
    if fingerprint is not None:
        fingerprints.compare(read_json(path, "fingerprint"), fingerprint, f"checkpoint {path}")
    with contextlib.suppress(FileNotFoundError, ValueError):  # without it the evaluation is made again
        header["state"] = read_json(path, "evaluated")
    return header


def _newest_valid(folder: Path) -> Path | None:
    candidates = listing(folder)
    pointer = folder / "latest"
    if pointer.is_file():  # takes precedence, so that a user may move it back by hand
        named = [p for p in candidates if p.name == pointer.read_text(errors="replace").strip()]
        candidates = named + [p for p in candidates if p not in named]
    complaints = []
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


def _best_valid(folder: Path) -> Path | None:
    pointer = folder / "best"
    path = folder / pointer.read_text(errors="replace").strip() if pointer.is_file() else pointer
    wrong = (damage(path) or _unreadable(path)) if path.is_dir() else f"{path.name} is missing"
    if wrong is not None:
        logger.warning("the best checkpoint is damaged: %s; the last weights are exported in its place", wrong)
        return None
    return path


def _unreadable(path: Path) -> str | None:
    """Why files with correct checksums cannot be read, such as those of another program; None if they can."""
    try:
        for name in ("state", "recipe", "fingerprint"):
            if name == "state" or (path / f"{name}.json").is_file():
                value = read_json(path, name)
                _check_form(value if name == "state" else {"extra": value}, f"{name}.json")
        for name in ("weights", "optimizer"):
            with safe_open(path / f"{name}.safetensors", "pt"):
                pass
    except (OSError, ValueError, RecursionError, SafetensorError) as e:
        return " ".join(str(e).split())
    return None


def _check_form(header: Any, file: str) -> None:
    """Raise ValueError where the state, or the mappings in it that a start reads, are of another type."""
    state = header.get("state", header) if isinstance(header, dict) else None
    extra = state.get("extra", {}) if isinstance(state, dict) else None
    known = extra.get("identities", {}) if isinstance(extra, dict) else None
    if not isinstance(known, dict) or type(state.get("step", 0)) is not int:
        raise ValueError(f"{file} holds values of another type")


def _write(
    folder: Path,
    step: int,
    files: dict[str, Callable],
    keep_last: int,
    best: bool,
    check: Callable[[Path], None] = lambda partial: None,
) -> Path:
    with naming(folder):
        folder.mkdir(exist_ok=True)  # and not the run directory, if somebody has removed it
    for left_over in folder.glob(".*partial*"):  # of a process that was killed while saving
        shutil.rmtree(left_over, ignore_errors=True)
    name = f"step-{step:08d}"
    again = 0
    while (folder / name).exists():  # never replace a complete checkpoint of the same step
        again += 1
        name = f"step-{step:08d}.{again}"
    with new_directory(folder / name) as partial:
        for file, write in files.items():
            write(partial / file)
        check(partial)
        write_json(partial / CHECKSUMS, {file: sha256(partial / file) for file in files})
    for pointer in ("best", "latest") if best else ("latest",):  # `latest` last: its state may name itself the best
        write_atomic(folder / pointer, name + "\n")
    _prune(folder, keep_last)
    return folder / name


def _prune(folder: Path, keep_last: int) -> None:
    pointed = {p.read_text().strip() for p in (folder / "latest", folder / "best") if p.is_file()}
    steps: list[str] = []
    for path in listing(folder):
        step = path.name.split(".")[0]
        superseded = step in steps
        if not superseded:
            steps.append(step)
        if (superseded or len(steps) > max(1, keep_last)) and path.name not in pointed:
            shutil.rmtree(path)
