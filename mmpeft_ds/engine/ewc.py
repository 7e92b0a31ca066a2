"""Elastic weight consolidation: the optimum of an earlier task in a file, and the pull towards it in training.

    loss = loss of the new task + strength * sum_k F_k (theta_k - theta*_k)^2

F is the diagonal empirical Fisher information of the earlier task (runs/fisher.py), theta* the weights at which it was
estimated. Each rank holds the parts of F and theta* that belong to its parts of the gradients under ZeRO. The gradient
of the penalty is added after the reduction of gradients, so it is no mean over ranks, and before their norm is taken,
so it is clipped like the rest.

Source: Kirkpatrick et al., arXiv 1612.00796, equation 3 (whose lambda / 2 is `strength`); GA-Net, arXiv 2408.00290.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmpeft_ds.distributed.collectives import on_rank0, rank
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import full_state, gradients
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.engine.zero.fingerprint import base_name
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import replacing, save_tensors, sha256
from mmpeft_ds.recipe import Recipe, where
from mmpeft_ds.recipe.options import EwcOptions

FORMAT = "mmpeft_ds.ewc.1"
LISTED = 8  # parameter names in one line of the log


class Pull:
    """The gradient of the penalty, added to the gradients of the task.

    Args:
        strength: lambda.

    Attributes:
        summary: lines that say which parameters are held and which are free.
    """

    def __init__(self, strength: float = 1.0):
        self.strength = strength
        self.summary: list[str] = []
        self.parts: dict[int, tuple[Tensor, Tensor]] = {}

    def hold(self, parameter: nn.Parameter, fisher: Tensor, anchor: Tensor, start: int = 0, n: int | None = None):
        """Pull elements `start` to `start + n` of the flattened parameter; the default is all of them.

        Args:
            fisher, anchor: F and theta* of the whole parameter, in its shape. They are copied, since an anchor that
                shares its memory with the weights would move with them.
        """
        end = None if n is None else start + n
        copied = (t.detach().reshape(-1)[start:end].clone() for t in (fisher, anchor))
        self.parts[id(parameter)] = tuple(copied)

    @torch.no_grad()
    def add(self, shards: Iterable[gradients.Shard]) -> Tensor | None:
        """Add 2 * strength * F * (theta - theta*) to the gradients of `shards`. Nobody waits for the device.

        Returns:
            () float64, strength * sum F (theta - theta*)^2 over these shards, where the gradients are; over those of
            all ranks it sums to the penalty. None if nothing of these shards is held.
        """
        pulled = [s for s in shards if id(s.parameter) in self.parts and s.master.numel()]
        if not pulled:
            return None
        fisher, anchor = zip(*(self.parts[id(s.parameter)] for s in pulled), strict=True)
        away = torch._foreach_sub([s.master for s in pulled], anchor)
        pull = torch._foreach_mul(away, fisher)
        torch._foreach_add_([s.gradient for s in pulled], pull, alpha=2 * self.strength)
        for shard in pulled:
            shard.write()
        terms = [torch.dot(p.double(), a.double()) for p, a in zip(pull, away, strict=True)]
        return self.strength * torch.stack(terms).sum()


def load(recipe: Recipe, built: Any, base: dict[str, str], state: TrainState, fresh: bool) -> Pull | None:
    """Read the file of the recipe's `optim.ewc` into the parts that this rank holds; None if it names none.

    A new run starts at theta* unless `optim.ewc.start` is false. Collective.

    Args:
        built: `engine.setup.Built`.
        base: see `base_of`.
        state: stores the hash of the file that the run was started with.
        fresh: whether the run is new, not continued from a checkpoint.

    Raises:
        BadInput: no such file, of another base, with other shapes, not that of the run; an optimizer offloaded below
            ZeRO-3.
    """
    options, engine, trainables = recipe.optim.ewc, built.engine, built.trainables
    key = where(recipe, "optim.ewc.file")
    path = Path(options.file)
    digest = on_rank0(lambda: _digest(path, key)) if options.file else ""
    if not fresh and state.extra.get("ewc", "") != digest:
        raise BadInput(
            f"{key}: {options.file or 'empty'}: the run was started with another file, or without. Restore it."
        )
    if not options.file:
        return None
    state.extra["ewc"] = digest
    if getattr(engine.optimizer, "cpu_offload", False):
        raise BadInput(f"{key}: with an optimizer offloaded at ZeRO-{built.stage}, use ZeRO-3 or no offload.")
    shapes = {name: zero_state.full_shape(p) for name, p in trainables.items()}
    known, summary = on_rank0(lambda: _compare(path, key, shapes, base, options))
    pull = Pull(options.strength)
    pull.summary = summary
    anchors = []
    for name, fisher, anchor in _read(path, {name: shapes[name] for name in known}, engine.device):
        parameter = trainables[name]
        pull.hold(parameter, fisher, anchor, *gradients.place(engine, parameter))
        if options.start and fresh:
            anchors.append(anchor)
    if anchors:
        _start(engine, [trainables[name] for name in known], anchors)
    return pull


def save(
    path: Path, fisher: dict[str, Tensor], anchor: dict[str, Tensor], base: dict[str, str], facts: dict[str, Any]
) -> None:
    """Write F and theta* (whole, on the CPU) as safetensors; the file has its name only when it is complete.

    Args:
        base: see `base_of`.
        facts: json-able, where the numbers come from.
    """
    tensors = {f"fisher.{n}": t.contiguous() for n, t in fisher.items()}
    tensors |= {f"anchor.{n}": t.contiguous() for n, t in anchor.items()}
    with replacing(path) as temporary:
        save_tensors(temporary, tensors, {"format": FORMAT, "base": json.dumps(base), "facts": json.dumps(facts)})


def base_of(model: nn.Module, fingerprints: dict[str, str], sources: Iterable[Any]) -> dict[str, str]:
    """Fingerprints of the base model that the optimum of a run belongs to: of frozen parameters (buffers such as class
    texts belong to the task), and of the towers that made the stored features of its data sets.

    Args:
        sources: `engine.resolve.ResolvedSource` of the training.
    """
    names = {base_name(n) for n, p in model.named_parameters() if not p.requires_grad}
    towers = sorted({source.manifest.towers["key"] for source in sources if source.manifest.towers})
    frozen = {name: value for name, value in fingerprints.items() if name in names}
    return frozen | ({"towers of the stored features": ", ".join(towers)} if towers else {})


def check(recipe: Recipe) -> None:
    """Refuse a file that does not exist or is not ours, before anything is built. Collective. Raises BadInput."""
    if recipe.optim.ewc.file:
        on_rank0(lambda: _metadata(Path(recipe.optim.ewc.file), where(recipe, "optim.ewc.file")))


# ------------------------------------------------------------------------------------------------------- helpers


def _metadata(path: Path, key: str) -> dict[str, str]:
    how = "Write it with launchers/fisher.py --run RUN --out FILE for a run of the earlier task."
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{key}: {path}: cannot be read ({error}). {how}") from error
    if metadata.get("format") != FORMAT:
        raise BadInput(f"{key}: {path}: is no file of Fisher information. {how}")
    return metadata


def _digest(path: Path, key: str) -> str:
    _metadata(path, key)
    return sha256(path)


def _compare(
    path: Path, key: str, shapes: dict[str, tuple[int, ...]], now: dict[str, str], options: EwcOptions
) -> tuple[list[str], list[str]]:
    """Names that the file has in the shapes of the model, and a summary in lines. Raises BadInput."""
    _check_base(path, key, json.loads(_metadata(path, key)["base"]), now)
    stored = _stored_shapes(path, key)
    known = [name for name, shape in shapes.items() if stored.get(name) == shape]
    changed = [name for name, shape in shapes.items() if name in stored and stored[name] != shape]
    absent = [name for name in stored if name not in shapes]
    if not known:
        raise BadInput(
            f"{key}: {path}: knows no trained parameter of this model. Use the method that it was made with."
        )
    if (changed or absent) and not options.allow_missing:
        name = (changed or absent)[0]
        raise BadInput(
            f"{key}: {path}: {name} has shape {stored[name]} there and {shapes.get(name, 'absent')} here "
            f"({len(changed) + len(absent)} such). Set optim.ewc.allow_missing: true to leave them free."
        )
    new = [name for name in shapes if name not in stored]
    summary = [f"EWC: {len(known)} parameters are held with strength {options.strength:g} ({path})"]
    for names, what in (
        (new, "free, not in the file"),
        (changed, "free, of another shape"),
        (absent, "not in the model"),
    ):
        if names:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            summary.append(f"EWC: {what}: {', '.join(names[:LISTED])}{more}")
    return known, summary


def _check_base(path: Path, key: str, base: dict[str, str], now: dict[str, str]) -> None:
    """Raise BadInput where the fingerprints of the frozen base, by tensor, are not those that the file was made on."""
    wrong = sorted(name for name in base.keys() & now.keys() if base[name] != now[name])
    if wrong or (base and not base.keys() & now.keys()):
        first = wrong[0] if wrong else min(base)
        raise BadInput(
            f"{key}: {path}: belongs to another base model: frozen {first} is {now.get(first, 'absent')}, was "
            f"{base[first]}. Give the file of a run on this base."
        )


def _stored_shapes(path: Path, key: str) -> dict[str, tuple[int, ...]]:
    """Shape of each anchor of the file. Raises BadInput where its Fisher information has another one."""
    with safe_open(path, "pt") as file:
        both = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    stored, fisher = (
        {name.removeprefix(kind): shape for name, shape in both.items() if name.startswith(kind)}
        for kind in ("anchor.", "fisher.")
    )
    if unpaired := sorted(name for name in stored.keys() | fisher.keys() if stored.get(name) != fisher.get(name)):
        name = unpaired[0]
        raise BadInput(
            f"{key}: {path}: is damaged: the anchor of {name} has shape {stored.get(name, 'absent')}, its Fisher "
            f"information {fisher.get(name, 'absent')}. Write it again with launchers/fisher.py."
        )
    return stored


def _read(
    path: Path, shapes: dict[str, tuple[int, ...]], device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, F and theta* of parameters, whole, on every rank; rank 0 reads. Collective."""
    with safe_open(path, "pt") if rank() == 0 else contextlib.nullcontext() as file:
        kinds = ("fisher", "anchor")
        read = lambda name: [file.get_tensor(f"{kind}.{name}") for kind in kinds]  # noqa: E731
        for sent in full_state.from_rank0(shapes, read, dict.fromkeys(shapes, 2), device):
            for name, (fisher, anchor) in sent.items():
                yield name, fisher, anchor


def _start(engine: Any, parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    """Set masters and parameters to `values`. Collective."""
    for parameter, value in zip(parameters, values, strict=True):
        zero_state.write_weight(engine, parameter, value)
