"""Checkpoints: only what trains, unsharded, written by rank 0, read with any number of ranks and any ZeRO stage.

    RUN/checkpoints/latest                     name of the newest one, moved atomically after it is complete
                    best                       name of the best one, if any
                    step-00000120/weights.safetensors      float32 masters of the trained parameters
                                  optimizer.safetensors    NAME.exp_avg, NAME.exp_avg_sq; of SGD and Muon
                                                           NAME.momentum_buffer
                                  model_state.safetensors  state beside the weights: of the model, such as a queue, and
                                                           what an adapter was attached with
                                  state.json               TrainState, name of the optimiser, Adam's step, format
                                  recipe.json              the resolved recipe
                                  fingerprint.json         of every frozen tensor
                                  checksums.json           hashes of the files above: xxh3_128 of weights and
                                                           optimizer, sha256 of the others
                                  evaluated.json           TrainState after an evaluation that followed the saving,
                                                           and its own sha256

Random numbers need no state of their own: they are drawn from (seed, epoch, sample) and (seed, step, rank).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mmpeft_ds.backbones.common.model_hooks import model_hooks
from mmpeft_ds.distributed.collectives import gather_to_first, on_rank0, rank, world_size
from mmpeft_ds.engine import checkpoint_files, checkpoint_tensors
from mmpeft_ds.engine.background import Background
from mmpeft_ds.engine.held import Held
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import fingerprint as fingerprints
from mmpeft_ds.engine.zero import full_state
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.engine.zero.snapshot import Snapshot
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import save_tensors, write_json
from mmpeft_ds.methods.common.layers import kept_buffers

FORMAT = 1
MODEL_STATE = "model_state.safetensors"
ADAPTER = "adapter:"  # before the names of an adapter's buffers in that file


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
    background: Background | None = None,
    late: Late | None = None,
) -> Path:
    """Write a checkpoint below `run_dir` and move `latest` (and, if `best`, `best`) to it. Collective.

    It appears under its name only when all its bytes are on disk, and they are compared with what trains before they
    are written; a process killed at any moment leaves the previous ones as they were. All but the `keep_last` newest
    and the best are removed afterwards.

    Args:
        run_dir: the run directory, seen by rank 0.
        engine: what `deepspeed.initialize` returned.
        trainables: name -> parameter; the same names in the same order on all ranks.
        fingerprint: of `fingerprint.frozen_fingerprint`.
        background: where the ranks gather, compare and write copies while the training goes on, after the checkpoint
            before; nothing here is collective then. None: here, before this returns. A failure is raised on all ranks
            by the next save, or where the owner asks for it.
        late: what else is done there, on rank 0, before the files are written.

    Returns:
        the checkpoint's directory, on every rank; in the background the other ranks do not know whether one of that
        step is there already, so that rank 0 gives it another name.

    Raises:
        RuntimeError: if what was gathered is not what the next forward uses and the optimizer holds.
    """
    folder = Path(run_dir) / "checkpoints"
    kept = (folder, state.step, keep_last, best)  # the step counts on while a copy is written
    header = _header(engine, trainables, state)
    extra = _model(engine, "training_state")
    extra |= {f"{ADAPTER}{name}": buffer for name, buffer in kept_buffers(engine.module).items()}
    beside = {"recipe.json": recipe, "fingerprint.json": fingerprint}
    if background is not None:
        background.wait()  # before its copies are overwritten
        snapshot = Snapshot.take(background.copies, engine, trainables, extra if rank() == 0 else {})
        path = folder / checkpoint_files.name(state.step)
        with contextlib.suppress(OSError):  # which the thread meets again, and tells all ranks
            path = checkpoint_files.place(folder, state.step) if rank() == 0 else path

        def write(full: dict[str, dict[str, torch.Tensor]], held: Held, given: list[Any]) -> None:
            header["optimizer_step"] = max(map(int, snapshot.steps), default=0)
            if late is not None:
                late.complete(header["state"], given)
            _write(full, held, snapshot.extra, {"state.json": header} | beside, kept)

        own = None if late is None else late.own
        background.start(lambda: _gather(snapshot, background, engine, trainables, own, write))
        return path
    zero_state.ensure_optimizer_state(engine)
    header["optimizer_step"] = zero_state.optimizer_step(engine)
    held = Held.of(engine, trainables)
    # gathers trainables only, never a frozen weight
    full = full_state.on_rank0(engine, trainables, _keys(engine, trainables), copy=False)
    extra = {k: v.detach().to("cpu").contiguous() for k, v in extra.items()}
    return on_rank0(lambda: _write(full, held, extra, {"state.json": header} | beside, kept))


@dataclasses.dataclass(frozen=True)
class Late:
    """What the owner of a checkpoint leaves to the background.

    Attributes:
        own: something of this rank that pickles.
        complete: takes the fields of TrainState as they will be written, which it may change, and `own` of all ranks.
    """

    own: Any
    complete: Callable[[dict[str, Any], list[Any]], None]


def _gather(
    snapshot: Snapshot,
    background: Background,
    engine: Any,
    trainables: dict[str, nn.Parameter],
    own: Any,
    write: Callable[[dict[str, dict[str, torch.Tensor]], Held, list[Any]], None],
) -> None:
    """Bring a copy together on rank 0, which writes it. Collective, in the background."""
    background.copies.wait()
    group, host = background.group, torch.device("cpu")
    given = gather_to_first([own], group)
    held = Held.of_copies(snapshot, engine, group)
    keys = _keys(engine, trainables)
    full = full_state.of_held(engine, trainables, keys, snapshot.held, host, copy=False, group=group)
    on_rank0(lambda: write(full, held, given), group)


def _write(
    full: dict[str, dict[str, torch.Tensor]],
    held: Held,
    extra: dict[str, torch.Tensor],
    beside: dict[str, Any],
    kept: tuple[Path, int, int, bool],
) -> Path:
    """Compare what was gathered, and write it. On rank 0."""
    folder, step, keep_last, best = kept
    weights = full.pop(full_state.WEIGHT)
    moments = {f"{name}.{key}": value for key, tensors in full.items() for name, value in tensors.items()}
    held.check(weights, moments)
    files: dict[str, Callable[[Path], Any]] = {
        "weights.safetensors": lambda p: checkpoint_tensors.write(p, weights),
        "optimizer.safetensors": lambda p: checkpoint_tensors.write(p, moments),
    }
    for name, value in beside.items():
        files[name] = lambda p, value=value: write_json(p, value, in_new_directory=True)
    if extra:
        files[MODEL_STATE] = lambda p: save_tensors(p, extra)
    return checkpoint_files.write(folder, step, files, keep_last, best)


def _keys(engine: Any, trainables: dict[str, nn.Parameter]) -> tuple[str, ...]:
    return (full_state.WEIGHT, *zero_state.moments(engine)) if trainables else (full_state.WEIGHT,)


def _header(engine: Any, trainables: dict[str, nn.Parameter], state: TrainState) -> dict[str, Any]:
    """What `state.json` holds; Adam's step takes its place later."""
    return {
        "format": FORMAT,
        "optimizer": _optimizer(engine, trainables),
        "optimizer_step": 0,
        "state": dataclasses.asdict(state),
        "saved_by": {"world_size": world_size(), "zero_stage": engine.zero_optimization_stage()},
    }


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
        BadInput: if names, shapes or moments of the trained parameters differ, or the optimiser or the base is another
            one.
    """
    path = Path(path)
    kept, optimizer = kept_buffers(engine.module), _optimizer(engine, trainables)
    zero_state.ensure_optimizer_state(engine)
    keys = {name: (full_state.WEIGHT, *zero_state.moments(engine, p)) for name, p in trainables.items()}

    def beside() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        header = _read_header(path, trainables, fingerprint, optimizer, kept)
        _check_moments(path, keys)
        return header, load_file(path / MODEL_STATE) if (path / MODEL_STATE).is_file() else {}

    header, extra = on_rank0(beside)  # together, since every rank is told by a message of its own
    shapes = {name: zero_state.full_shape(parameter) for name, parameter in trainables.items()}
    with _reading(path, keys) as read, torch.no_grad():
        for name, tensors in _sent(shapes, read, {n: len(k) for n, k in keys.items()}, engine.device):
            full = dict(zip(keys[name], tensors, strict=True))
            zero_state.write_full(engine, trainables[name], full)
            zero_state.write_parameter(trainables[name], full[full_state.WEIGHT])
    zero_state.set_optimizer_step(engine, header["optimizer_step"])
    for name, buffer in kept.items():
        buffer.copy_(extra.pop(f"{ADAPTER}{name}"))
    if extra:
        _model(engine, "load_training_state", extra)
    known = {f.name for f in dataclasses.fields(TrainState)}
    return TrainState(**{k: v for k, v in header["state"].items() if k in known})


def shapes(path: Path) -> dict[str, list[int]]:
    """Name -> shape of each trained parameter of a checkpoint. Collective."""

    def read() -> dict[str, list[int]]:
        with safe_open(path / "weights.safetensors", "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    return on_rank0(read)


def record_evaluation(path: Path, state: TrainState, keep_last: int, best: bool) -> None:
    """Add the result of an evaluation to its checkpoint; if `best`, move that pointer to it. Collective.

    Args:
        path: of a checkpoint that was saved after the step of `state`.
    """
    on_rank0(lambda: checkpoint_files.write_evaluation(path, state, keep_last, best))


def newest_valid(run_dir: str | Path) -> Path | None:
    """The checkpoint to continue from: the one that `latest` names, else the newest that is whole. Collective.

    Every damaged one on the way is named in a warning.

    Returns:
        its directory; None if there are no checkpoints at all.

    Raises:
        BadInput: if there are checkpoints and all are damaged.
    """
    return on_rank0(lambda: checkpoint_files.newest(Path(run_dir) / "checkpoints"))


def best_valid(run_dir: str | Path) -> Path | None:
    """The checkpoint that `best` names; None, with a warning, if it is missing or damaged. Collective."""
    return on_rank0(lambda: checkpoint_files.best(Path(run_dir) / "checkpoints"))


def _model(engine: Any, verb: str, *args: Any) -> dict[str, torch.Tensor]:
    """Call `verb` of the base model, which reads or sets the state that it keeps beside its weights."""
    return getattr(model_hooks(engine.module), verb)(*args)


@contextlib.contextmanager
def _reading(path: Path, keys: dict[str, tuple[str, ...]]) -> Iterator[Callable[[str], list[torch.Tensor]]]:
    """Reads weight and moments of a trained parameter, by its name, on rank 0.

    Args:
        keys: name -> WEIGHT and its moments.
    """
    with contextlib.ExitStack() as files:
        if rank() == 0:
            weights, optimizer = (
                files.enter_context(safe_open(path / f"{name}.safetensors", "pt")) for name in ("weights", "optimizer")
            )

        def read(name: str) -> list[torch.Tensor]:
            return [weights.get_tensor(name), *(optimizer.get_tensor(f"{name}.{key}") for key in keys[name][1:])]

        yield read


def _sent(
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], list[torch.Tensor]],
    counts: dict[str, int],
    device: torch.device,
) -> Iterator[tuple[str, Sequence[torch.Tensor]]]:
    """Names and their tensors on every rank, as `full_state.from_rank0`; on one rank they lie in the mapped file."""
    if world_size() == 1:
        yield from ((name, read(name)) for name in shapes)
        return
    for sent in full_state.from_rank0(shapes, read, counts, device):
        yield from sent.items()


def _optimizer(engine: Any, trainables: dict[str, nn.Parameter]) -> str | None:
    """The optimiser's name in recipes; None where nothing trains."""
    return zero_state.optimizer_name(engine) if trainables else None


def _check_moments(path: Path, keys: dict[str, tuple[str, ...]]) -> None:
    """Refuse a checkpoint without a moment that is read, such as of a parameter that another version stepped by Muon
    and this one steps by AdamW. Raises BadInput.

    Args:
        keys: name -> WEIGHT and its moments.
    """
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        there = set(file.keys())
    absent = [f"{name}.{key}" for name, (_, *of_it) in keys.items() for key in of_it if f"{name}.{key}" not in there]
    if absent:
        raise BadInput(
            f"checkpoint {path}: optimizer.safetensors lacks {absent[0]}: the version that wrote it steps this "
            "parameter otherwise. Continue with that version, or add --fresh."
        )


def _read_header(
    path: Path,
    trainables: dict[str, nn.Parameter],
    fingerprint: dict[str, str] | None,
    optimizer: str | None,
    kept: dict[str, torch.Tensor],
) -> dict[str, Any]:
    if (wrong := checkpoint_files.damage_since(path)) is not None:
        raise BadInput(f"checkpoint {path} is damaged: {wrong}. Name another one, or start over with --fresh.")
    header = checkpoint_files.read_json(path, "state")
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
        # Earlier versions took fingerprints of what the checkpoint itself holds.
        saved_prints = {n: p for n, p in checkpoint_files.read_json(path, "fingerprint").items() if n not in kept}
        fingerprints.compare(saved_prints, fingerprint, f"checkpoint {path}")
    header["state"] = checkpoint_files.evaluated(path, header["state"]["step"]) or header["state"]
    return header
