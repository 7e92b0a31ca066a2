"""Diagonal empirical Fisher information of a finished run, for elastic weight consolidation (engine/ewc.py).

    F = mean over global batches of (gradient of the batch's mean loss)^2, at the weights theta* of a checkpoint

The mean over ranks is taken before the square. The other way round F would be another one, with noise that grows with
the number of ranks. The global batches are those of the run's first epoch with the transform of evaluation, and the
model is in eval mode, so F does not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.engine import ewc
from mmpeft_ds.engine.assembly import hub
from mmpeft_ds.engine.assembly.resolve import resolve
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.engine.streams import make_stream
from mmpeft_ds.engine.text_counts import TextCounts, nothing_learnt
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import full_state, gradients
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.errors import AgreedBadInput, BadInput
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.progress import Progress
from mmpeft_ds.recipe.options import EwcOptions
from mmpeft_ds.runs.finished import FinishedRun, open_run
from mmpeft_ds.stop import StopFlag


class SquaredGradients:
    """Mean over batches of the squared gradient, float64, of the parts that this rank holds."""

    def __init__(self) -> None:
        self.batches = 0
        self.sums: dict[int, tuple[int, Tensor]] = {}

    def add(self, shards: Iterable[gradients.Shard]) -> None:
        """Add the gradient of one global batch, already averaged over ranks."""
        self.batches += 1
        for shard in shards:
            start, total = self.sums.get(id(shard.parameter), (shard.start, 0.0))
            self.sums[id(shard.parameter)] = start, total + shard.gradient.detach().double() ** 2

    def whole(self, parameter: nn.Parameter, device: torch.device | str = "cpu", mine: bool = True) -> Tensor:
        """F of a parameter in its shape, float64, on every rank. Collective.

        Args:
            mine: whether this rank's part counts; of ranks that hold copies only one does.
        """
        shape = zero_state.full_shape(parameter)
        flat = torch.zeros(math.prod(shape), dtype=torch.float64, device=device)
        if mine and id(parameter) in self.sums:
            start, total = self.sums[id(parameter)]
            flat[start : start + total.numel()] = total.to(device) / self.batches
        if collectives.world_size() > 1:
            dist.all_reduce(flat)
        return flat.reshape(shape)


def measure(
    stepper: Stepper, steps: Iterable[Step], micro_steps: Callable[[int], int] = lambda step: 1
) -> tuple[SquaredGradients, dict[str, float]] | None:
    """Forward and backward of every global batch; the weights stay as they are. Collective.

    Args:
        micro_steps: gives the micro-steps of each step, for a rank that cannot read its data.

    Returns:
        the squares, and `loss` (mean over batches), `batches`, `samples`; None if a stop was requested on a rank.

    Raises:
        AgreedBadInput: too many bad samples, or a loss or gradient that is not finite.
    """
    engine, squares = stepper.engine, SquaredGradients()
    # A head may estimate F on other logits than it trains on, as the released code of GA-Net does.
    head = head_of(engine.module)
    estimated = contextlib.nullcontext if head is None else head.estimating_fisher
    losses, samples, texts = 0.0, 0, TextCounts()
    for number, step in enumerate(_together(steps, stepper, micro_steps)):
        task = stepper.resolved.train[step.source].task
        agreed = stepper.agree(step.micro, task)
        texts.add(task, agreed.changed)
        if agreed.stop:
            return None
        for batch in step.micro:
            stepper.budget.feed(batch)
        if agreed.bad:
            stepper.check_budget()
        with estimated():
            loss, *_ = stepper.accumulate(step.micro, task, agreed)
        shards = list(gradients.shards(engine))
        finite = all(bool(torch.isfinite(s.gradient).all()) for s in shards)
        loss, wrong = collectives.sum_scalars([loss.item(), float(not finite)], stepper.ranks.device)
        if wrong or not math.isfinite(loss):
            raise AgreedBadInput(f"batch {number}: loss or gradient is not finite (loss {loss}). Look at its data.")
        if agreed.weight > 0:
            squares.add(shards)
            losses, samples = losses + loss, samples + agreed.rows
        with _unwarned():
            gradients.discard(engine)
    if not squares.batches:
        tasks = [source.task for source in stepper.resolved.train]
        why = nothing_learnt(stepper.resolved.backbone, tasks, texts)
        raise AgreedBadInput(f"no batch has a sample that can be used: {why} Or choose another --split.")
    return squares, {"loss": losses / squares.batches, "batches": squares.batches, "samples": samples}


def estimate(
    run: Path,
    out: Path,
    split: str = "train",
    which: str = "best",
    overrides: Sequence[str] = (),
    weights: Sequence[tuple[str, float]] = (),
) -> dict[str, Any] | None:
    """Write F and theta* of checkpoint `which` of a run to `out`. Every rank calls it.

    Args:
        run: run directory.
        split: of the run's training data sets.
        which: `best`, `last`, or the name of a checkpoint; `best` is `last` in a run without validation.
        overrides: as `--set`, for where and how to run.
        weights: (pattern, factor): F of the parameters whose name matches is multiplied by the factor of the first
            shell-style pattern that does.

    Returns:
        on every rank, the facts in the file about its origin; None if a stop was requested: nothing is written.

    Raises:
        BadInput: no run there, no such checkpoint or split, a pattern that no trained parameter matches, or a
            method that trains nothing by gradient.
    """
    recipe = recipes.of_run(run, overrides)
    recipe.data.sources = [
        source if source.split == split else replace(source, split=split, subset="") for source in recipe.data.sources
    ]
    recipe.engine.patience = 0
    recipe.engine.train_dropout = recipe.engine.gradient_checkpointing = False
    recipe.optim.ewc = EwcOptions()
    with StopFlag(recipe.engine.stop_grace) as stop:
        hub.have(recipe)
        resolved = resolve(recipe)  # with the validation split, which methods that search insist on
        if resolved.method_options.gradient_free:
            name = recipe.method["name"]
            raise BadInput(f"{run}: {name} trains nothing by gradient, so it has no Fisher information.")
        resolved.validation, resolved.recipe.data.validation = [], []
        opened = open_run(run, resolved, which)
        factors = factors_of(list(opened.built.trainables), weights)
        stop.begin()
        measured = _measure_run(opened, stop)
        if measured is None:
            return None
        squares, facts = measured
        facts |= {
            "run": str(run),
            "checkpoint": opened.checkpoint.name,
            "step": opened.state.step,
            "split": split,
            "dirs": [source.options.dir for source in resolved.train],
            "global_batch": recipe.data.global_batch,
            "seed": recipe.seed,
            "weights": [list(pair) for pair in weights],
        }
        trace = _write(out, opened, squares, factors, facts)
        return facts | {"parameters": len(opened.built.trainables), "trace": trace}


def _measure_run(opened: FinishedRun, stop: StopFlag) -> tuple[SquaredGradients, dict[str, Any]] | None:
    """`measure` over the first epoch of the run's training data, without augmentation."""
    resolved, ranks = opened.resolved, opened.ranks
    stream = make_stream(resolved, resolved.train, ranks, train=True, augment=False)
    data, steps = resolved.recipe.data, stream.steps_per_epoch()
    budget = BadBudget(data.max_bad_fraction, data.max_bad_in_a_row, stream.num_samples)
    stepper = Stepper(resolved, opened.built, ranks, steps, TrainState(), budget, stop.requested)
    try:
        with Progress("fisher", steps, "steps", shown=ranks.rank == 0) as progress:
            return measure(stepper, progress.track(stream.epoch(0)), lambda step: stream.micro_steps(0, step))
    finally:
        stream.close()


def _write(
    out: Path, opened: FinishedRun, squares: SquaredGradients, factors: dict[str, float], facts: dict[str, Any]
) -> float:
    """Gather F and theta* and write them on rank 0; the trace of F, on every rank. Collective."""
    built = opened.built
    mine = not gradients.replicated(built.engine)
    anchor = full_state.on_rank0(built.engine, built.trainables, [full_state.WEIGHT])[full_state.WEIGHT]
    fisher = {}
    for name, parameter in built.trainables.items():
        whole = (factors[name] * squares.whole(parameter, opened.ranks.device, mine)).float()
        if opened.ranks.rank == 0:
            fisher[name] = whole.cpu()
    base = ewc.base_of(built.model, built.fingerprint, opened.resolved.train)
    on_rank0(lambda: out.parent.mkdir(parents=True, exist_ok=True))
    on_rank0(lambda: ewc.save(out, fisher, anchor, base, facts))
    return on_rank0(lambda: sum(f.double().sum().item() for f in fisher.values()))


def factors_of(names: Sequence[str], weights: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The factor of each parameter: that of the first pattern that its name matches, else 1.

    Raises:
        BadInput: if a pattern matches no name.
    """
    for pattern, _ in weights:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadInput(f"--weight {pattern}: matches no trained parameter. They are named like {names[0]}.")
    return {n: next((f for pattern, f in weights if fnmatchcase(n, pattern)), 1.0) for n in names}


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Context in which DeepSpeed does not warn that steps are skipped: here all are, on purpose."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _together(steps: Iterable[Step], stepper: Stepper, micro_steps: Callable[[int], int]) -> Iterator[Step]:
    """`steps`; if a rank cannot read its data, all ranks end with its problem."""
    number = 0
    try:
        for step in steps:
            yield step
            number += 1
    except AgreedBadInput:
        raise
    except BadInput as problem:
        stepper.fail(problem, micro_steps(number))
