"""Training of a study: its members take turns at each batch, in one process group, over one frozen base.

Every member is a run with its own run directory: its engine, optimiser, schedule, random numbers, curves, checkpoints
and adapter are those of the same recipe trained alone. Members share the frozen base, the batches, and the computation
of everything below the lowest trained layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmpeft_ds import recipe as recipes
from mmpeft_ds.distributed import processes
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import ewc, frozen_images, same_everywhere
from mmpeft_ds.engine.assembly import hub
from mmpeft_ds.engine.assembly.checks import check_schedule
from mmpeft_ds.engine.assembly.idle import idle_notes
from mmpeft_ds.engine.assembly.resolve import Resolved, resolve
from mmpeft_ds.engine.identities import identities
from mmpeft_ds.engine.run_lock import first_free
from mmpeft_ds.engine.rundir import RunDir, finished_words
from mmpeft_ds.engine.streams import check_shards, make_stream, total_steps
from mmpeft_ds.engine.study import report
from mmpeft_ds.engine.study.build import Builder
from mmpeft_ds.engine.study.checks import check, check_directory
from mmpeft_ds.engine.study.share import Sharing
from mmpeft_ds.engine.study.streams import SharedStream
from mmpeft_ds.engine.study.work import SharedWork
from mmpeft_ds.engine.trainer import observer_of, restored
from mmpeft_ds.engine.training import Training
from mmpeft_ds.engine.turns import Place
from mmpeft_ds.errors import AgreedBadInput
from mmpeft_ds.recipe.study import Study
from mmpeft_ds.stop import StopFlag


@dataclass
class Member:
    """One run of a study.

    Attributes:
        total: number of optimizer steps.
        done: training is finished.
        problem: reason why it ended early; empty if it did not.
    """

    name: str
    resolved: Resolved
    run_dir: RunDir
    total: int
    done: bool = False
    problem: str = ""

    @property
    def over(self) -> bool:
        return self.done or bool(self.problem)


@dataclass
class Turns:
    """A member in training.

    Attributes:
        work: the rest of its training, which yields each place that it reaches.
        place: the batch that it processes next.
    """

    member: Member
    training: Training
    sharing: Sharing
    work: Generator[Place, None, bool]
    place: Place


def run(study: Study, *, fresh: bool = False) -> int:
    """Train or continue all members that are not finished; every rank calls it. Returns the exit code.

    Args:
        fresh: train in the first of RUN_DIR, RUN_DIR-1, ... that does not exist.

    Raises:
        BadInput: on all ranks, in one line. If a member ends early, the others continue; it is reported at the end.
    """
    with contextlib.ExitStack() as stack:
        recipe = next(iter(study.members.values()))
        stop = stack.enter_context(StopFlag(recipe.engine.stop_grace))

        # Check all recipes before the ranks meet.
        for own in study.members.values():
            hub.have(own)
        resolved = {name: resolve(own) for name, own in study.members.items()}
        check(study, resolved)
        for parts in resolved.values():
            frozen_images.check(parts)
            ewc.check(parts.recipe)
        ranks = processes.start(**recipe.start_options())
        first = next(iter(resolved.values()))
        same_everywhere.check(
            resolved, {name: identities(first) if p is first else {} for name, p in resolved.items()}
        )
        folder = on_rank0(lambda: first_free(study.run_dir)) if fresh else study.run_dir
        on_rank0(lambda: check_directory(folder))
        stream = SharedStream(make_stream(first, first.train, ranks, train=True))
        stack.callback(stream.end)
        members = [_opened(name, parts, folder, stream, ranks, stack) for name, parts in resolved.items()]

        # Build and train.
        if left := [member for member in members if not member.done]:
            _print_notes(left, ranks)
            check_shards(first, ranks)
            _train(left, stream, ranks, stop, stack)
        if all(member.over for member in members):
            table = on_rank0(lambda: report.write(folder, study.settings, {m.name: m.problem for m in members}))
            if ranks.rank == 0:
                print(table, flush=True)
    if ended := [member for member in members if member.problem]:
        raise AgreedBadInput(
            f"{len(ended)} of {len(members)} members ended early. {ended[0].name}: {ended[0].problem}"
        )
    return 0


def _opened(
    name: str, resolved: Resolved, folder: Path, stream: SharedStream, ranks: Ranks, stack: contextlib.ExitStack
) -> Member:
    """A member with its run directory, which is created or continued. Collective. Raises BadInput."""
    recipe = resolved.recipe
    recipe.run_dir = str(folder / name)
    at_paths = identities(resolved) if ranks.rank == 0 else {}
    run_dir = RunDir.open(recipe.run_dir, recipes.to_dict(recipe), identities=at_paths)
    stack.callback(run_dir.close)
    total = total_steps(recipe, stream)
    check_schedule(recipe, total, stream.steps_per_epoch())
    member = Member(name, resolved, run_dir, total)
    if (finished := run_dir.finished(total, recipe.engine.patience)) is not None:
        member.done = True
        if ranks.rank == 0:
            print(f"{run_dir.path}: {finished_words(finished, total)}", flush=True)
    return member


def _print_notes(members: Sequence[Member], ranks: Ranks) -> None:
    """Print every note once, with the names of its members unless it applies to all."""
    of_note: dict[str, list[str]] = {}
    for member in members:
        notes = [*member.resolved.notes, *member.resolved.remarks, *idle_notes(member.resolved, ranks.world_size)]
        for note in dict.fromkeys(notes):
            of_note.setdefault(note, []).append(member.name)
    for note, names in of_note.items() if ranks.rank == 0 else ():
        about = "" if len(names) == len(members) else f"{', '.join(names)}: "
        print(f"note: {about}{note}", flush=True)


def _train(
    members: Sequence[Member], stream: SharedStream, ranks: Ranks, stop: StopFlag, stack: contextlib.ExitStack
) -> None:
    """Build the members and train them in turns until all are over or stopped."""
    work = SharedWork()
    builder = Builder(members[0].resolved, ranks, work)
    validation: dict[tuple[int, bool], SharedStream] = {}
    begun = []
    for member in members:
        built, sharing = builder.build(member.name, member.resolved, member.run_dir.resume_from)
        stream.keep_frozen(built.frozen and built.frozen.spec)
        at_paths = identities(member.resolved) if ranks.rank == 0 else {}
        state, last = restored(member.resolved, built, member.run_dir, at_paths)
        observer = observer_of(member.resolved.recipe, member.run_dir, member.total, state, member.name)
        stack.callback(observer.close)
        streams = _validation(member.resolved, ranks, validation)
        training = Training(
            member.resolved, built, ranks, stream, member.total, state, member.run_dir, observer, stop, streams, last
        )
        training.say_opening()
        begun.append(Turns(member, training, sharing, training.turns(), Place(state.step, (-1, 0))))
    for shared in validation.values():
        stack.callback(shared.end)
    stop.begin()
    _take_turns(begun, work)


def _validation(resolved: Resolved, ranks: Ranks, known: dict[tuple[int, bool], SharedStream]) -> list[SharedStream]:
    """Streams of the validation sources; the order of samples differs where the method couples them."""
    streams = []
    for index, source in enumerate(resolved.validation):
        key = (index, resolved.method_options.couples_samples)
        if key not in known:
            known[key] = SharedStream(make_stream(resolved, [source], ranks, train=False))
        streams.append(known[key])
    return streams


def _take_turns(begun: list[Turns], work: SharedWork) -> None:
    """Always continue the member that has come least far, until all are over or stopped."""
    printed: set[str] = set()
    while begun:
        turns = min(begun, key=lambda t: t.place)  # at equal places the first in the list
        work.begin(turns.place)
        trains = turns.place.batch[0] == math.inf
        learning = trains and not turns.sharing.learned
        try:
            with turns.sharing.learning() if learning else contextlib.nullcontext():
                verdict = _advance(turns)
            shared = ", ".join(turns.sharing.shared) or "nothing"
            if learning and shared not in printed:
                printed.add(shared)
                turns.training.observer.say(f"runs once for all members that have it: {shared}")
            if verdict is not None:
                work.begin(None)
                _close(turns, verdict)
                begun.remove(turns)
        except AgreedBadInput as problem:
            begun.remove(turns)
            turns.member.problem = str(problem)
            turns.training.observer.say(f"ended after step {turns.training.state.step}: {problem}")
            turns.training.built.engine.destroy()


def _advance(turns: Turns) -> bool | None:
    """Train a member up to its next place, and return None; at its end True if it is finished, False if stopped."""
    try:
        turns.place = next(turns.work)
    except StopIteration as end:
        return bool(end.value)
    return None


def _close(turns: Turns, trained: bool) -> None:
    """Write the adapter of a finished member, or report that it was stopped."""
    training = turns.training
    if trained and training.finish():
        turns.member.done = True
    else:
        training.say_stopped()
    training.observer.close()
    training.built.engine.destroy()
