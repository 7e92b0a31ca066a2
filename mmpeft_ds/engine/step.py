"""One optimizer step over all ranks, with two small all-reduces besides those of DeepSpeed.

Before the first forward the ranks agree on the weight of the step, on stopping, on bad samples and on which rank has
which modality; after the last backward on loss and gradient norms, and so on whether the step is applied.
"""

from __future__ import annotations

import copy
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.clock import Clock, StepTimer
from mmpeft_ds.distributed.own_process import Memory, garbage_later
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import graph_health, padding
from mmpeft_ds.engine.assembly import modality
from mmpeft_ds.engine.assembly.build import Built
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.assembly.resolve import Resolved, titles
from mmpeft_ds.engine.optim.schedule import learning_rate
from mmpeft_ds.engine.text_counts import CHANGES, TextCounts, nothing_learnt
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import gradients
from mmpeft_ds.engine.zero.config import divisor
from mmpeft_ds.errors import AgreedBadInput, BadInput
from mmpeft_ds.methods.common.head import Head
from mmpeft_ds.sites.base import base_model
from mmpeft_ds.sites.unread import LastLayer
from mmpeft_ds.tasks.base import TaskBase

# In `TrainState.extra`: weight of the loss in the epoch, by number of the source as text; and in the run.
EPOCH_WEIGHT, RUN_WEIGHT = "epoch_weight", "run_weight"
PARTS = ("data", "forward", "backward")  # of a step, as `Stepper.timer` knows them


@dataclass
class Agreed:
    """Facts about a step on which all ranks agree before its first forward pass.

    Attributes:
        weight: total weight of the loss over ranks and micro-steps.
        stop: whether a stop was requested on some rank.
        rows: texts (slots, where there are no texts) that enter the loss.
        bad: slots that could not be used.
        keys_hash: sum mod 2^64 of the hashes of the sample ids that enter the loss.
        changed: texts with a cut prompt, a cut target, and control tokens, see `PackedBatch.changed_texts`.
        present: per micro-step, `modality.present` summed over ranks; its last number is of images that a frozen tower
            sees, where values are kept.
    """

    weight: float
    stop: bool
    rows: int
    bad: int
    keys_hash: int
    changed: list[float]
    present: list[list[float]]


class Stepper:
    """Runs optimizer steps.

    Args:
        total: optimizer steps of the run, for the schedule.
        state: advanced by every step.
        budget: counts of this rank's bad samples.
        stop_requested: whether a stop was requested of this process.
        steps_per_epoch: for a schedule by epochs.
    """

    def __init__(
        self,
        resolved: Resolved,
        built: Built,
        ranks: Ranks,
        total: int,
        state: TrainState,
        budget: BadBudget,
        stop_requested: Callable[[], bool] = lambda: False,
        steps_per_epoch: int = 0,
    ):
        self.resolved, self.recipe, self.engine = resolved, resolved.recipe, built.engine
        self.ewc, self.frozen = built.ewc, built.frozen
        self.ranks, self.total, self.state, self.budget = ranks, total, state, budget
        self.stop_requested, self.stopping = stop_requested, False
        self.steps_per_epoch = steps_per_epoch
        self.source_names = titles(resolved.train) if len(resolved.train) > 1 else [""]
        self.groups, group_of = gradients.group_names(built.trainables)
        self.norms = gradients.Norms(self.engine, group_of, len(self.groups))
        self.knowing_norm = gradients.know_norm(self.engine)
        self.held = Memory()
        self.last_layer = LastLayer(base_model(built.model))
        self.timer, self.seconds = StepTimer(Clock(ranks.device)), math.inf  # of the step before
        set_modes(built.model, resolved.backbone, self.recipe)

    def train_step(self, step: Step, waited: float) -> dict[str, Any]:
        """One optimizer step; `waited` seconds were spent waiting for its data, which the caller times as part `data`
        of `timer` too. Returns the row of metrics.jsonl.

        Raises:
            AgreedBadInput: too many bad samples, or too many steps skipped in a row; the state is as before the step.
        """
        began = time.perf_counter()
        state, task = self.state, self.resolved.train[step.source].task
        # Seed per step, so that dropout is the same whether or not the run was interrupted before.
        seed_generators(seed_of(self.recipe.seed, state.step, self.ranks.rank), self.ranks.device)
        agreed = self.agree(step.micro, task)
        self.stopping = self.stopping or agreed.stop
        before = copy.deepcopy(self.budget) if agreed.bad else None
        for batch in step.micro:
            self.budget.feed(batch)
        if agreed.bad:
            try:
                self.check_budget()
            except BadInput:
                self.budget = before  # as if the step had not begun
                raise
        loss, places, report = self.accumulate(step.micro, task, agreed)
        times = self.timer.finish()
        row = [*(times.get(part, 0.0) for part in PARTS), *self.memory()]
        loss, places, penalty, report, norms, table = self.reduce(loss, places, report, row)
        norm = math.sqrt(sum(norms))
        done = state.step - state.skipped_total
        lr = learning_rate(self.recipe.optim, done, self.total, self.steps_per_epoch)
        applied = self.update(lr, task, agreed, loss, norm)
        self.count_texts(step.source, task, agreed)
        state.step, state.step_in_epoch = state.step + 1, state.step_in_epoch + 1
        seconds = time.perf_counter() - began + waited
        state.elapsed += seconds
        state.extra["samples"] = state.extra.get("samples", 0) + agreed.rows
        return {
            "step": state.step,
            "epoch": state.epoch,
            "loss": loss,
            **({"ewc_penalty": penalty} if self.ewc else {}),  # not in the loss
            **({"graph": graph_health.summary(report, self.ranks.world_size)} if report else {}),
            "lr": lr,
            "grad_norm": norm,
            "samples_per_second": agreed.rows / seconds,
            "step_seconds": seconds,
            "samples": agreed.rows,
            "weight": agreed.weight,
            **padding.share(*places),
            **({"images_computed": int(sum(bits[-1] for bits in agreed.present))} if self.frozen else {}),
            **({"micro_steps": len(step.micro)} if self.recipe.data.pack else {}),
            **({} if step.imbalance is None else {"cost_imbalance": step.imbalance}),
            "source": step.source,
            **({"source_name": self.source_names[step.source]} if len(self.source_names) > 1 else {}),
            "skipped": not applied,
            "skipped_total": state.skipped_total,
            "bad": dict(state.bad),
            "cut_texts": dict(state.cut_texts),
            "control_tokens": state.control_tokens,
            **self.of_ranks(table, seconds),
            "grad_norms": {n: math.sqrt(s) for n, s in zip(self.groups, norms, strict=True)},
            "sample_keys_hash": f"{agreed.keys_hash:016x}",
            "elapsed": state.elapsed,
        }

    def update(self, lr: float, task: Any, agreed: Agreed, loss: float, norm: float) -> bool:
        """Let the optimiser step, unless loss or gradient is not finite or nothing has weight. Collective.

        Returns:
            whether it stepped; else the gradients are discarded and the step counts as skipped.

        Raises:
            AgreedBadInput: too many steps were skipped in a row.
        """
        state = self.state
        if math.isfinite(loss) and math.isfinite(norm) and agreed.weight > 0:
            for group in self.engine.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_share", 1.0)
            with self.knowing_norm(norm):
                self.engine.step()
            state.skipped_in_a_row = 0
            return True
        gradients.discard(self.engine)
        if state.skipped_in_a_row + 1 >= self.recipe.engine.max_skipped:
            raise AgreedBadInput(f"step {state.step}: {self.why_skipped(task, agreed, loss, norm)}")
        state.skipped_in_a_row, state.skipped_total = state.skipped_in_a_row + 1, state.skipped_total + 1
        return False

    def of_ranks(self, table: list[list[float]], seconds: float) -> dict[str, Any]:
        """Times and memory of all ranks, for the row of a step that took `seconds`.

        Args:
            table: a row per rank: seconds of `PARTS`, MiB of `memory`.
        """
        waits, forward, backward, rss, peak, *device = zip(*table, strict=True)
        busy = [wait + f for wait, f in zip(waits, forward, strict=True)]  # backward waits for the other ranks
        # On a GPU the times are those of the step before.
        of_times, self.seconds = self.seconds if self.timer.clock.on_gpu else seconds, seconds
        return {
            "data_wait_share": statistics.fmean(waits) / of_times,
            "forward_seconds": statistics.fmean(forward),
            "backward_seconds": statistics.fmean(backward),
            "slowest_rank": max(range(len(busy)), key=busy.__getitem__),
            "slowest_excess": max(busy) - statistics.median(busy),
            "rss_mib": [round(mib) for mib in rss],
            "peak_rss_mib": [round(mib) for mib in peak],
            **({"device_mib": [round(mib) for mib in device[0]]} if device else {}),
        }

    def fail(self, problem: Exception, micro_steps: int) -> NoReturn:
        """End all ranks with `problem`; called in place of `train_step`, such as on a rank that cannot read the step's
        data.

        Args:
            micro_steps: of the step, as the other ranks have them.

        Raises:
            AgreedBadInput, RuntimeError: as `collectives.raise_first`.
        """
        width = 7 + CHANGES + micro_steps * modality.WIDTH
        collectives.sum_scalars([1.0] + [0.0] * (width - 1), self.ranks.device)
        collectives.raise_first(problem)

    def agree(self, micro: list[PackedBatch], task: Any) -> Agreed:
        """One all-reduce before the first forward: weights, stop flag, bad slots, changed texts, and which rank has
        which modality.

        Raises:
            AgreedBadInput, RuntimeError: some rank has called `fail`.
        """
        counts = [b.counts or b.count(task.weight) for b in micro]
        mine = [
            0.0,  # no failure here
            sum(c.loss_weight for c in counts),
            float(self.stop_requested()),
            float(sum(c.rows for c in counts)),
            float(sum(len(b.bad) for b in micro)),
            *collectives.split_64(sum(c.keys_hash for c in counts) % 2**64),
            *(sum(numbers) for numbers in zip(*(c.changed for c in counts), strict=True)),
            *(bit for b in micro for bit in modality.present(b)),
        ]
        failed, weight, stop, rows, bad, low, high, *rest = collectives.sum_scalars(mine, self.ranks.device)
        if failed:
            collectives.raise_first(None)
        width = modality.WIDTH
        changed, bits = rest[:CHANGES], rest[CHANGES:]
        present = [bits[i : i + width] for i in range(0, len(bits), width)]
        return Agreed(weight, stop > 0, int(rows), int(bad), collectives.sum_mod_2_64((low, high)), changed, present)

    def accumulate(
        self, micro: list[PackedBatch], task: Any, agreed: Agreed
    ) -> tuple[torch.Tensor, tuple[int, torch.Tensor], dict[str, float]]:
        """Forward and backward of every micro-batch.

        Returns:
            this rank's share of the loss in float64, the sums of `padding.places`, and of what heads report.
        """
        # DeepSpeed divides by the rank count and by the accumulation steps; with W the loss is one mean over the step.
        scale = self.ranks.world_size * divisor(self.recipe) / agreed.weight if agreed.weight else 0.0
        losses, places, report = [], [], {}
        passes = self.frozen.passes(micro, agreed.present) if self.frozen else [0] * len(micro)
        for i, (batch, present) in enumerate(zip(micro, agreed.present, strict=True)):
            if self.recipe.data.pack:  # their number is another at each step
                self.engine.set_gradient_accumulation_boundary(i + 1 == len(micro))
            with garbage_later():  # what a pass leaves behind is gone when it returns
                loss, read, measured = self.both_passes(batch, present, task, passes[i], scale)
            for name, value in measured.items():
                report[name] = report.get(name, 0.0) + value
            losses.append(loss)
            places.append(read)
            if i + 1 < len(micro):
                self.engine.step()  # before the accumulation boundary this only counts the micro-step
        total = sum(losses[1:], losses[0].double())
        positions, read = (sum(numbers[1:], numbers[0]) for numbers in zip(*places, strict=True))
        return total / agreed.weight if agreed.weight else total, (positions, read), report

    def both_passes(
        self, batch: PackedBatch, present: list[float], task: Any, frozen_passes: int, scale: float
    ) -> tuple[torch.Tensor, tuple[int, torch.Tensor], dict[str, float]]:
        """Forward and backward of one micro-batch, whose loss is multiplied by `scale`.

        Returns:
            the loss, `padding.places`, and what heads report.
        """
        backbone = self.resolved.backbone
        with self.timer.part("forward"):
            batch = modality.complete(batch, present, backbone, task, self.frozen is not None)
            batch = batch.to(self.ranks.device)
            if self.frozen:
                batch = self.frozen.fill(batch, frozen_passes)
            outputs = forward(self.engine, backbone, batch, scores=True, last=self.last_layer)
            loss = task.loss(outputs, batch)
            read = padding.places(outputs, batch)
        with self.timer.part("backward"):
            self.engine.backward(loss * scale)
        # It reads numbers from the device, which has the backward pass to do meanwhile.
        return loss.detach(), read, graph_health.measure(outputs, batch) if self.measures_graph else {}

    @property
    def measures_graph(self) -> bool:
        """Whether the step is one whose graph is measured; the same on all ranks."""
        every = self.recipe.monitor.graph_every
        return every > 0 and (self.state.step + 1) % every == 0

    def reduce(
        self, loss: torch.Tensor, places: tuple[int, torch.Tensor], report: dict[str, float], row: list[float]
    ) -> tuple[float, list[float], float, dict[str, float], list[float], list[list[float]]]:
        """One all-reduce after the last backward: loss, positions of texts, EWC penalty, what heads report, squared
        gradient norm per group, all timing rows.

        A value that is not finite on one rank is not finite in the sum, so all ranks skip the step together.
        """
        pulled = self.ewc.add(gradients.shards(self.engine)) if self.ewc else None
        if pulled is None or gradients.replicated(self.engine):
            pulled = torch.zeros_like(loss)
        squares = self.norms.squared()
        positions, read = places
        # The device is read once.
        scalars = [number[None] for number in (loss, read, pulled.to(loss.device))]  # offloaded masters are elsewhere
        own_loss, read, penalty, *squares = torch.cat([*scalars, squares]).tolist()
        table = [0.0] * (len(row) * self.ranks.world_size)
        table[self.ranks.rank * len(row) : (self.ranks.rank + 1) * len(row)] = row
        own = [own_loss, positions, read, penalty, *report.values(), *squares, *table]
        summed = collectives.sum_scalars(own, self.ranks.device)
        norms_start = 4 + len(report)
        table_start = norms_start + len(squares)
        rows = [summed[i : i + len(row)] for i in range(table_start, len(summed), len(row))]
        return (
            summed[0],
            summed[1:3],
            summed[3],
            dict(zip(report, summed[4:norms_start], strict=True)),
            summed[norms_start:table_start],
            rows,
        )

    def check_budget(self) -> None:
        """Merge the ranks' counts of bad samples; called by all ranks after a step that has a new one."""
        merged = merged_budget(self.budget)
        self.state.bad = dict(merged.counts)
        if (problem := merged.problem()) is not None:
            raise AgreedBadInput(f"data: {problem}")

    def count_texts(self, source: int, task: TaskBase, agreed: Agreed) -> None:
        """Add up the changed texts and the weight of a step."""
        counts = self.text_counts()
        counts.add(task, agreed.changed)
        self.state.cut_texts, self.state.control_tokens = counts.cut, counts.control
        extra = self.state.extra
        of_epoch = extra.setdefault(EPOCH_WEIGHT, {})
        of_epoch[str(source)] = of_epoch.get(str(source), 0.0) + agreed.weight
        extra[RUN_WEIGHT] = extra.get(RUN_WEIGHT, 0.0) + agreed.weight

    def text_counts(self) -> TextCounts:
        """Texts of the run so far that were changed."""
        return TextCounts(dict(self.state.cut_texts), self.state.control_tokens)

    def why_skipped(self, task: TaskBase, agreed: Agreed, loss: float, norm: float) -> str:
        """Reason why the last step of too many in a row was not applied, and what to do about it."""
        steps = self.state.skipped_in_a_row + 1
        if not agreed.weight:
            counts = self.text_counts()
            counts.add(task, agreed.changed)
            why = nothing_learnt(self.resolved.backbone, [task], counts)
            return f"nothing of it enters the loss, and no step was applied in {steps} steps in a row: {why}"
        return (
            f"loss or gradient not finite in {steps} steps in a row (loss {loss}, gradient norm {norm}). Lower "
            "optim.lr, set optim.clip, or look at the data of these steps; engine.max_skipped allows more."
        )

    def memory(self) -> list[float]:
        """MiB of this process: resident now, resident at most so far, and the peak of its GPU where there is one."""
        resident, peak = self.held.resident() / 2**20, self.held.most() / 2**20
        if self.ranks.device.type == "cuda":
            return [resident, peak, torch.cuda.max_memory_allocated(self.ranks.device) / 2**20]
        return [resident, peak]


# ------------------------------------------------------------------------------------------------------- helpers


def set_modes(model: torch.nn.Module, backbone: Any, recipe: recipes.Recipe) -> None:
    """Put the model into eval mode, or into training mode for dropout or gradient checkpointing.

    The frozen prefix stays in eval mode in any case. Modules that differ between training and evaluation by more than
    dropout (`follows_training`) are put into training mode in any case.
    """
    engine = recipe.engine
    model.train(engine.train_dropout)
    for module in model.modules():
        if isinstance(module, Head) and module.follows_training:
            module.train()
    base = model.get_base_model()
    frozen = backbone.frozen_prefix(base)
    for path in frozen:
        base.get_submodule(path).eval()
    if not engine.train_dropout and engine.gradient_checkpointing:
        # transformers computes a layer again only where the layer itself is in training mode; what is in it may drop
        # out in ways of its own, as the attention of Granite 4 Vision's Q-Former does
        for path, module in base.named_modules():
            if getattr(module, "gradient_checkpointing", False) and not _inside(path, frozen):
                module.training = True


def _inside(path: str, places: Sequence[str]) -> bool:
    """Whether a module is one of `places`, or below one."""
    return any(path == place or path.startswith(f"{place}.") for place in places)


def merged_budget(budget: BadBudget) -> BadBudget:
    """The sum of the budgets of all ranks. Collective."""
    everyone: list[Any] = [budget.state()]
    if collectives.world_size() > 1:
        everyone = [None] * collectives.world_size()
        torch.distributed.all_gather_object(everyone, budget.state())
    return budget.merged(everyone)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed like `torch.manual_seed`, which also formats the call stack three times, for kinds of devices that are
    absent."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def seed_of(*parts: int) -> int:
    """A seed that differs whenever one part does; torch's CPU generator reads its lower 32 bits, so that two of some
    65,000 seeds may give the same numbers there."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
