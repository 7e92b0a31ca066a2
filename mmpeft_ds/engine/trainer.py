"""A training run: parse, build, restore, train, finish, close. One optimizer step is in step.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from mmpeft_ds import recipe as recipes
from mmpeft_ds.distributed import gpus, processes
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.engine import checkpoint, ewc, frozen_images, same_everywhere
from mmpeft_ds.engine.assembly import hub
from mmpeft_ds.engine.assembly.build import Built, build
from mmpeft_ds.engine.assembly.checks import check_schedule
from mmpeft_ds.engine.assembly.idle import idle_notes
from mmpeft_ds.engine.assembly.resolve import Resolved, resolve
from mmpeft_ds.engine.identities import identities
from mmpeft_ds.engine.monitor import Monitor, Observer
from mmpeft_ds.engine.rundir import IDENTITIES, RunDir, finished_words
from mmpeft_ds.engine.streams import check_shards, first_batches, make_stream, total_steps
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.training import Training
from mmpeft_ds.stop import StopFlag


def run(recipe: recipes.Recipe, *, fresh: bool = False, conclude: Callable[[Training], bool] | None = None) -> int:
    """Train `recipe`, or continue its run directory; every rank calls it. Returns the exit code.

    Args:
        conclude: called on all ranks with the weights that will be exported, before the run counts as finished;
            returns False if it was stopped early.

    Raises:
        BadInput: on all ranks, in one line.
    """
    with contextlib.ExitStack() as stack:
        # Enter first: a request during the build ends the process at once.
        stop = stack.enter_context(StopFlag(recipe.engine.stop_grace))

        # Check the recipe before the ranks meet, so that mistakes are reported at once. Only if it needs files of the
        # hub, they meet first, so that one rank per node fetches them.
        hub.have(recipe)
        resolved = resolve(recipe)
        recipe = resolved.recipe
        frozen_images.check(resolved)
        ranks = processes.start(**recipe.start_options())
        at_paths = identities(resolved)
        same_everywhere.check({"": resolved}, {"": at_paths})
        run_dir = RunDir.open(recipe.run_dir, recipes.to_dict(recipe), fresh=fresh, identities=at_paths)
        stack.callback(run_dir.close)
        stream = make_stream(resolved, resolved.train, ranks, train=True)
        stack.callback(stream.close)  # loader workers that still start would delay the exit after an error
        total = total_steps(recipe, stream, resolved.method_options.gradient_free)
        check_schedule(recipe, total, stream.steps_per_epoch())
        finished = run_dir.finished(total, recipe.engine.patience)
        if finished is not None:
            if ranks.rank == 0:
                print(f"{run_dir.path}: {finished_words(finished, total)}\n{finished['table']}")
            return 0
        ewc.check(recipe)
        resolved.remarks += idle_notes(resolved, ranks.world_size)
        resolved.remarks += [unseen] if (unseen := gpus.unseen()) else []
        resolved.print_notes(ranks.rank, of_training=True)  # before the base is loaded, which may take minutes
        check_shards(resolved, ranks)

        # Build.
        shapes = run_dir.resume_from and checkpoint.shapes(run_dir.resume_from)
        built = build(resolved, ranks, lambda: first_batches(resolved, ranks), shapes)
        built.frozen = frozen_images.of_built(resolved, built, ranks)
        stream.keep_frozen(built.frozen and built.frozen.spec)

        # Restore.
        state, last = restored(resolved, built, run_dir, at_paths)

        # Train.
        observer = observer_of(recipe, run_dir, total, state)
        stack.callback(observer.close)
        validation = [make_stream(resolved, [source], ranks, train=False) for source in resolved.validation]
        training = Training(resolved, built, ranks, stream, total, state, run_dir, observer, stop, validation, last)
        stack.callback(training.close)
        training.say_opening()
        stop.begin()
        if not (training.loop() and training.finish(conclude)):
            training.say_stopped()

        # Close. DeepSpeed's hooks on the parameters' autograd nodes, which no garbage collector sees, would keep the
        # model for ever.
        built.engine.destroy()
        return 0


def restored(
    resolved: Resolved, built: Built, run_dir: RunDir, at_paths: dict[str, str]
) -> tuple[TrainState, dict[str, Any]]:
    """Load the checkpoint of a run directory into the engine, if it has one, and cut its curves after that step.
    Collective.

    Args:
        at_paths: `identities` of the recipe, on rank 0.

    Returns:
        the state, and the last remaining line of metrics.jsonl.
    """
    recipe = resolved.recipe
    state = TrainState(global_batch=recipe.data.global_batch)
    if run_dir.resume_from is not None:
        state = checkpoint.load(run_dir.resume_from, built.engine, built.trainables, built.fingerprint)
    base = ewc.base_of(built.model, built.fingerprint, resolved.train)
    built.ewc = ewc.load(recipe, built, base, state, fresh=run_dir.resume_from is None)
    # To 0 as well: an earlier start may have died before its first checkpoint.
    last = run_dir.truncate(state.step, evaluated=state.extra.get("evaluated_at") == state.step)
    state.extra[IDENTITIES] = at_paths
    return state, last


def observer_of(recipe: recipes.Recipe, run_dir: RunDir, total: int, state: TrainState, name: str = "") -> Observer:
    """The monitor of a run on rank 0; on the other ranks an observer that does nothing. Collective.

    Args:
        name: of the run among those of a study.
    """
    observers: list[Observer] = []
    yaml = recipes.to_yaml(recipe)
    about = (run_dir.path, recipe.monitor, total, state.step, yaml, name, run_dir.keep)
    on_rank0(lambda: observers.append(Monitor(*about)))
    return observers[0] if observers else Observer()
