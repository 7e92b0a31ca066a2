"""The loop over optimizer steps, with evaluations and checkpoints between them."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.stream import Step, Stream
from mmpeft_ds.distributed.collectives import first_message, on_rank0
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import calibrate, checkpoint, saving, summary
from mmpeft_ds.engine.assembly.build import Built
from mmpeft_ds.engine.assembly.resolve import Resolved, ResolvedSource, titles
from mmpeft_ds.engine.background import Background
from mmpeft_ds.engine.evaluator import Evaluation, count, evaluating
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.engine.monitor import Observer, plain
from mmpeft_ds.engine.rundir import RunDir
from mmpeft_ds.engine.step import EPOCH_WEIGHT, RUN_WEIGHT, Stepper, merged_budget
from mmpeft_ds.engine.streams import make_stream, thumbnails_of
from mmpeft_ds.engine.text_counts import note, nothing_learnt
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.turns import Place, exhausted, relabelled
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.errors import AgreedBadInput, BadInput
from mmpeft_ds.files import cannot_write
from mmpeft_ds.progress import Progress
from mmpeft_ds.redaction import masked_values
from mmpeft_ds.stop import StopFlag
from mmpeft_ds.tasks.base import TaskBase


class Training:
    """The loop over steps, with evaluations and checkpoints between them.

    Args:
        total: optimizer steps of the run.
        state: of the run directory, see `restored`.
        validation: streams of the validation sources.
        last: the last line of metrics.jsonl, empty if there is none.
    """

    def __init__(
        self,
        resolved: Resolved,
        built: Built,
        ranks: Ranks,
        stream: Stream,
        total: int,
        state: TrainState,
        run_dir: RunDir,
        observer: Observer,
        stop: StopFlag,
        validation: list[Stream],
        last: dict[str, Any],
    ):
        self.resolved, self.recipe, self.built, self.ranks = resolved, resolved.recipe, built, ranks
        self.stream, self.total, self.state = stream, total, state
        self.run_dir, self.observer = run_dir, observer
        data = self.recipe.data
        budget = BadBudget(data.max_bad_fraction, data.max_bad_in_a_row, stream.num_samples)
        if ranks.rank == 0 and "bad_budget" in state.extra:  # counts are summed over ranks, so rank 0 takes them all
            budget = budget.merged([state.extra["bad_budget"]])
        per_epoch = stream.steps_per_epoch()
        self.stop = stop
        self.stepper = Stepper(resolved, built, ranks, total, state, budget, stop.requested, per_epoch)
        self.validation = validation
        for validated in self.validation:
            validated.keep_frozen(built.frozen and built.frozen.spec)
        self.last = last
        self.unwritten: BadInput | None = None  # reason why rank 0 could not write the curves
        self.saved: Path | None = run_dir.resume_from  # the newest checkpoint
        self.saved_at = state.step if self.saved is not None else -1
        # Checkpoints of older versions lack them; their steps are taken to have had weight.
        state.extra.setdefault(EPOCH_WEIGHT, {"before": 1.0} if state.step_in_epoch else {})
        state.extra.setdefault(RUN_WEIGHT, float(state.step > 0))
        self.changes_noted = False
        self.unpointed: saving.Unpointed | None = None  # the best evaluation that `best` may not name yet
        self.writer = Background() if self.recipe.engine.save_in_background else None

    def say_opening(self) -> None:
        """Print the step at which this start begins."""
        words = self.run_dir.opening_words(self.state.step, self.total, self.ranks.world_size, self.built.stage)
        for line in (words, *(self.built.ewc.summary if self.built.ewc else ())):
            self.observer.say(line)

    def say_stopped(self) -> None:
        """Print that a stop request ended the run early, and why: any rank may know. Collective."""
        reason = first_message(self.stop.reason)
        why = f" ({reason})" if reason else ""
        where = f"step {self.state.step} of {self.total}"
        self.observer.say(f"stopped after {where}; the same command continues it{why}")

    def loop(self) -> bool:
        """Run `turns` to its end."""
        return exhausted(self.turns())

    def turns(self) -> Generator[Place, None, bool]:
        """Train until the end, early stopping, or a stop request; True if training is finished.

        Yields before each optimizer step and each batch of an evaluation, so that several runs can take turns.

        Bad input on which all ranks agree ends the run after a checkpoint, so that no step is lost.
        """
        try:
            self.check_weight()
            # Make up for an evaluation that was due when the run was stopped.
            verdict = (yield from self.evaluate_and_save()) if self.state.step or not self.total else None
            steps = self.steps()
            while verdict is None:
                yield Place(self.state.step)
                self.last = self.train_step(*next(steps))
                self.report(lambda: self.observer.step(self.last))
                self.note_changes()
                self.check_weight()
                verdict = yield from self.evaluate_and_save()
            self.settle()
        except AgreedBadInput:
            if self.state.step:
                lost = self.lost()  # which may be the reason: rank 0 alone has raised it then
                self.save(self.unpointed is not None and self.unpointed.retried(self.state, lost, self.saved_at))
                self.settle()
            raise
        return verdict

    def train_step(self, step: Step, waited: float) -> dict[str, Any]:
        """One optimizer step; if this rank could not write its files or do its part of a checkpoint, it ends all ranks
        instead."""
        problem = self.unwritten or (self.writer and self.writer.problem())
        if problem is not None:
            self.stepper.fail(problem, len(step.micro))
        return self.stepper.train_step(step, waited)

    def report(self, write: Callable[[], None]) -> None:
        """Let the observer write on rank 0. If it fails, the others learn of it at the next step, or when saving."""
        try:
            write()
        except BadInput as problem:
            self.unwritten = problem
        except OSError as error:
            if not (reason := cannot_write(error)):
                raise
            self.unwritten = BadInput(f"{error.filename or self.run_dir.path}: {reason}")

    def check_written(self) -> None:
        """Raise AgreedBadInput on all ranks if rank 0 could not write the curves. Collective."""
        problem = on_rank0(lambda: self.unwritten and str(self.unwritten))
        if problem:
            self.unwritten = None
            raise AgreedBadInput(problem)

    def check_weight(self) -> None:
        """End a run that learns nothing: nothing entered the loss in an epoch, or in the whole run. Of several sources
        name those that gave nothing.

        Raises:
            AgreedBadInput: on all ranks, also when such a run is started again.
        """
        state, backbone = self.state, self.resolved.backbone
        epoch_over = 0 < self.stream.steps_per_epoch(state.epoch) <= state.step_in_epoch
        run_over = 0 < self.total <= state.step
        weights, counts = state.extra[EPOCH_WEIGHT], self.stepper.text_counts()
        if (epoch_over and not any(weights.values())) or (run_over and not state.extra[RUN_WEIGHT]):
            why = nothing_learnt(backbone, self.train_tasks, counts)
            raise AgreedBadInput(f"data: nothing of epoch {state.epoch} enters the loss: {why}")
        for number, task in enumerate(self.train_tasks if epoch_over else ()):
            if weights.get(str(number)) == 0:
                title = f"data.sources.{number} in epoch {state.epoch}"
                why = nothing_learnt(backbone, [task], counts)
                self.observer.say(f"note: nothing of {title} enters the loss: {why}")

    def note_changes(self) -> None:
        """Print once per start of the run that texts are cut, or contain control tokens."""
        counts = self.stepper.text_counts()
        if counts and not self.changes_noted:
            self.changes_noted = True
            words = note(self.resolved.backbone, self.train_tasks, counts)
            self.observer.say(f"note: after step {self.state.step}: {words} (cut_texts, control_tokens in metrics)")

    @property
    def train_tasks(self) -> list[TaskBase]:
        """The tasks of the training sources."""
        return [source.task for source in self.resolved.train]

    def evaluate_and_save(self) -> Generator[Place, None, bool | None]:
        """Save and evaluate after a step, if that is due; yields like `turns`.

        Returns:
            True: training is finished; False: a stop was requested; None: continue.
        """
        state, engine = self.state, self.recipe.engine
        at_end = state.step >= self.total
        epoch_over = state.step_in_epoch >= self.stream.steps_per_epoch(state.epoch)
        due = at_end or (state.step % engine.eval_every == 0 if engine.eval_every else epoch_over)
        missing = bool(self.validation) and due and state.extra.get("evaluated_at") != state.step
        save_due = at_end or (state.step % engine.save_every == 0 if engine.save_every else due)
        if save_due or self.stepper.stopping:
            self.save()  # before the evaluation, so that a stop during it loses no step
        if missing and not self.stepper.stopping:
            best = yield from self.validate()
            missing = self.stepper.stopping
            if self.saved is not None and self.saved_at == state.step and not missing:
                on_rank0(self.run_dir.keep)
                self.settle()
                checkpoint.record_evaluation(self.saved, state, engine.keep_last, best)
                self.unpointed = None
            elif best or missing:
                self.save(best)
        if (at_end or self.out_of_patience()) and not missing:
            return True
        return False if self.stepper.stopping else None

    def out_of_patience(self) -> bool:
        """Early stopping: too many evaluations in a row without a better one."""
        patience = self.recipe.engine.patience
        return bool(patience) and self.state.evaluations_without_improvement >= patience

    def steps(self) -> Iterator[tuple[Step, float]]:
        """Steps of all epochs from the current state on, each with the seconds waited for its data."""
        while self.state.step < self.total:
            if self.state.step_in_epoch >= self.stream.steps_per_epoch(self.state.epoch):
                self.state.epoch, self.state.step_in_epoch = self.state.epoch + 1, 0
                self.state.extra[EPOCH_WEIGHT] = {}
            steps = self.stream.epoch(self.state.epoch, self.state.step_in_epoch)
            while True:
                began = time.perf_counter()
                try:
                    with self.stepper.timer.part("data"):
                        step = next(steps, None)
                except BadInput as problem:  # on this rank alone, such as a shard that cannot be read any more
                    micro_steps = self.stream.micro_steps(self.state.epoch, self.state.step_in_epoch)
                    self.stepper.fail(problem, micro_steps)
                if step is None:
                    break
                yield step, time.perf_counter() - began

    def validate(self) -> Generator[Place, None, bool]:
        """Evaluate every validation source; True if the main metric of the first is the best so far, or as good as the
        best at a lower loss.

        Yields like `turns`. A stop request ends it early, with False.
        """
        results = []
        for index, title in enumerate(titles(self.resolved.validation)):
            result = yield from self.evaluating(index)
            if result is None:
                self.stepper.stopping = True
                return False
            if not result.weight:
                task = self.resolved.validation[index].task
                why = nothing_learnt(self.resolved.backbone, [task], result.texts)
                raise AgreedBadInput(f"data.validation.{index} ({title}): nothing of it enters the loss: {why}")
            results.append(result)
            self.report(lambda title=title, result=result: self.observer.evaluation(title, self.state.step, result))
        task = self.resolved.validation[0].task
        value = results[0].scores.get(task.main_metric, math.nan)
        state = self.state
        state.extra["evaluated_at"] = state.step
        if math.isnan(value):  # such as without an answered question among the good samples
            self.observer.say(f"step {state.step}: data.validation.0 gives no {task.main_metric}; not compared")
            return False
        sign = 1.0 if task.better == "max" else -1.0
        waited = state.evaluations_without_improvement + 1
        if state.best is None or sign * value > sign * state.best:
            waited = 0
        elif value != state.best or not self.lowers_loss(results[0]):
            state.evaluations_without_improvement = waited
            return False
        self.note_best(value, results[0])
        state.evaluations_without_improvement = waited  # a lower loss alone earns no patience
        return True

    def lowers_loss(self, evaluation: Evaluation) -> bool:
        """Whether the loss on the first validation source is lower than at the best step, if both are finite."""
        known, loss = self.state.extra.get("best_scores", {}).get("loss"), evaluation.scores.get("loss", math.nan)
        return isinstance(known, (int, float)) and loss < known

    def note_best(self, value: float, evaluation: Evaluation, step: int | None = None) -> None:
        """Take the weights of this step, or of `step`, for the best, with these scores on the first validation
        source."""
        state = self.state
        self.unpointed = saving.Unpointed.before(state)
        state.best, state.best_step = value, state.step if step is None else step
        state.evaluations_without_improvement = 0
        state.extra |= {"best_scores": plain(evaluation.scores), "best_counted": evaluation.counted}

    def evaluating(self, index: int) -> Generator[Place, None, Evaluation | None]:
        """Evaluate one validation source, every sample once; None if a stop was requested meanwhile. Yields
        like `turns`."""
        stream, title = self.validation[index], titles(self.resolved.validation)[index]
        source = self.resolved.validation[index]
        progress = Progress(title, stream.steps_per_epoch(), "steps", shown=self.ranks.rank == 0)
        batches = evaluating(
            self.built.engine,
            self.resolved.backbone,
            source.task,
            progress.track(stream.epoch(0)),
            self.ranks.device,
            pictures=self.recipe.monitor.samples,
            stop_requested=self.stepper.stop_requested,
            thumbnail=thumbnails_of(source, self.built.frozen is not None),
            frozen=self.built.frozen,
        )
        result = yield from relabelled(batches, lambda number: Place(self.state.step, (index, number)))
        return None if result is None else count(result, source)

    def save(self, best: bool = False) -> None:
        """Save a checkpoint of this step, unless it has one already; with `engine.save_in_background` it is written
        beside what follows."""
        if self.saved_at == self.state.step and not best and not self.lost():
            return
        late = None
        if self.writer is not None:
            self.state.extra["bad_budget"] = self.stepper.budget.state()  # the place of that of all ranks
            late = saving.late(self.stepper.budget, self.run_dir, self.observer)
        else:
            self.state.extra["bad_budget"] = merged_budget(self.stepper.budget).state()
            on_rank0(self.run_dir.keep)  # another run that has taken the directory must find it as it left it
            self.report(lambda: self.observer.flush()())  # curves up to a checkpoint survive a kill right after it
        self.saved = checkpoint.save(
            self.run_dir.path,
            self.built.engine,
            self.built.trainables,
            self.state,
            recipe=self.written_recipe,
            fingerprint=self.built.fingerprint,
            keep_last=self.recipe.engine.keep_last,
            best=best,
            background=self.writer,
            late=late,
        )
        self.saved_at = self.state.step
        if self.writer is None or (self.unpointed and self.unpointed.step < self.saved_at):
            self.unpointed = None  # written, or the save in the background before this one was
        if self.writer is None:
            self.check_written()

    @functools.cached_property
    def written_recipe(self) -> dict[str, Any]:
        """The recipe as checkpoints hold it."""
        return masked_values(recipes.to_dict(self.recipe))

    def settle(self) -> None:
        """Wait until the newest checkpoint is whole. Collective.

        Raises:
            AgreedBadInput: it could not be written, or the curves.
        """
        if self.writer is not None:
            self.writer.wait()
            self.state.extra["bad_budget"] = merged_budget(self.stepper.budget).state()
            self.check_written()

    def lost(self) -> bool:
        """Whether the newest checkpoint could not be written, once that is known; the same on all ranks."""
        return self.writer is not None and self.writer.failure()

    def finish(self, conclude: Callable[[Training], bool] | None = None) -> bool:
        """Write the adapter directory, from the best checkpoint if there is one, and the final table.

        Returns:
            False if `conclude` returned False: the run then does not count as finished.
        """
        state = self.state
        earlier = state.best is not None and state.best_step != state.step
        held = state.step  # the step of the weights
        if earlier and (best := checkpoint.best_valid(self.run_dir.path)) is not None:
            checkpoint.load(best, self.built.engine, self.built.trainables)
            held = state.best_step
        calibrated = self.calibrate(held)  # before the numbers: its evaluation is that of the best
        metrics = plain(
            {
                "steps": state.step,
                "train_loss": self.last.get("loss"),
                "train_seconds": state.elapsed,
                "samples_per_second": state.extra.get("samples", 0) / max(state.elapsed, 1e-9),
                "trainable_parameters": sum(map(zero_state.numel, self.built.trainables.values())),
                "total_parameters": sum(map(zero_state.numel, self.built.model.parameters())),
                "peak_rss_mib": self.last.get("peak_rss_mib"),
                "best": state.best,
                "best_step": state.best_step,
                "best_metric": self.resolved.validation[0].task.main_metric if self.validation else None,
                "best_of": titles(self.resolved.validation)[0] if self.validation else None,
                "best_counted": state.extra.get("best_counted"),
                "skipped_steps": state.skipped_total,
                "bad_samples": state.bad,
                "cut_texts": state.cut_texts,
                "control_tokens": state.control_tokens,
                "world_size": self.ranks.world_size,
                "zero_stage": self.built.stage,
                **calibrated,
            }
        )
        if conclude is not None and not conclude(self):
            return False
        on_rank0(self.run_dir.keep)
        export_adapter(self.run_dir.adapter, self.built.engine, self.resolved, metrics)
        baselines = on_rank0(lambda: summary.baselines_of(self.resolved))
        table = summary.table(metrics, state.extra.get("best_scores", {}), baselines)
        early = self.recipe.engine.patience if state.step < self.total else 0
        self.run_dir.finish(max(self.total, self.state.step), metrics, table, early)  # fewer may be asked for now
        self.observer.say(table)
        return True

    def calibrate(self, held: int) -> dict[str, Any]:
        """Calibrate the head, if it has a calibration, on the training rows and the first validation source, and
        evaluate it again. The result is saved as the best checkpoint.

        Args:
            held: the step whose weights the model has.

        Returns:
            numbers that the head reports.
        """
        if calibrate.head(self.built.model) is None:
            return {}

        def rows(source: ResolvedSource) -> Any:
            stream = make_stream(self.resolved, [source], self.ranks, train=False)
            try:
                args = (self.built.engine, self.resolved.backbone, source.task, stream.epoch(0), self.ranks.device)
                return calibrate.rows_of(*args)
            finally:
                stream.close()

        chosen = self.resolved.validation[:1]
        report = calibrate.run(self.built, rows(self.resolved.train[0]), rows(chosen[0]) if chosen else None)
        if chosen and (evaluation := exhausted(self.evaluating(0))) is not None:
            self.observer.evaluation(titles(self.resolved.validation)[0], self.state.step, evaluation)
            value = evaluation.scores.get(chosen[0].task.main_metric, math.nan)
            if not math.isnan(value):
                self.note_best(value, evaluation, held)
        self.save(best=True)
        self.settle()
        return report

    def close(self) -> None:
        """End the loader workers of the validation streams."""
        for stream in self.validation:
            stream.close()
