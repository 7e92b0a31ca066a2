"""Evaluation of a finished or interrupted run on a split: every sample exactly once, over any number of ranks."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.engine.assembly import hub
from mmpeft_ds.engine.assembly.resolve import Resolved, ResolvedSource, resolve, titles
from mmpeft_ds.engine.evaluator import Evaluation
from mmpeft_ds.engine.monitor import plain
from mmpeft_ds.engine.streams import records
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import check_writable, write_atomic, write_json
from mmpeft_ds.redaction import masked_values
from mmpeft_ds.runs.finished import FinishedRun, on_split, open_run
from mmpeft_ds.runs.submission import FORMS, content, file_name, not_listed
from mmpeft_ds.stop import StopFlag


def evaluate_run(
    run: Path,
    split: str,
    which: str = "best",
    overrides: Sequence[str] = (),
    submission: str = "",
    data: Sequence[str] = (),
) -> list[dict[str, Any]] | None:
    """Score checkpoint `which` of a run on `split` of each of its training data sets and tasks. Every rank calls it.

    Writes RUN/evaluation-SPLIT.json and RUN/predictions-SPLIT.jsonl; where only some of the data sets are
    taken, SPLIT is followed by their names, see `named`. Files of these names that are of another checkpoint or other
    overrides stay, see `keep_others`.

    Args:
        run: run directory.
        which: `best`, `last`, or the name of a checkpoint; `best` is `last` in a run without validation.
        submission: also write RUN/submission-SPLIT-FORM for an evaluation server, a form of `runs.submission.FORMS`;
            of the first data set, where there are several.
        data: directories of the run's training data sets to take; empty: all, which must then have the split.
        overrides: as `--set`, for where and how to run: engine.deepspeed, data.workers, data.sources.0.dir.

    Returns:
        on every rank, one report per data set and task: dir, split, task, vqa_measure (the evaluator of answers; empty
        for other tasks), checkpoint, step, set (the overrides), samples, rows, scored and there (how many of `unit`
        the scores rest on, and how many the split has), bad_samples, cut_texts (by kind), control_tokens (texts with
        some), changed (these two in words), scores, grouped (`TaskBase.grouped`), baselines, seconds. None if a stop
        was requested: nothing is written.

    Raises:
        BadInput: no run there, or it cannot be written into; no such checkpoint, split or data set.
    """
    recipe = recipes.of_run(run, overrides)
    name = named(split, recipe.data.sources, data)
    recipe.data.validation = []
    for source in (on_split(s, split) for s in chosen_sources(recipe.data.sources, data)):
        if source not in recipe.data.validation:
            recipe.data.validation.append(source)
    # Nothing has to be saved: a signal, or the end of the launcher, ends it within a step.
    with StopFlag(recipe.engine.stop_grace) as stop:
        hub.have(recipe)
        resolved = resolve(recipe)
        check_writable(run)
        if submission:
            content(submission, [], records(resolved.validation[0]))  # reports wrong ids before the evaluation
        opened = open_run(run, resolved, which)
        stop.begin()
        reports, rows = [], []
        first_rows: list[dict[str, Any]] = []
        for title, source in zip(titles(resolved.validation), resolved.validation, strict=True):
            began = time.perf_counter()
            result = opened.evaluate(source, title, stop.requested)
            if result is None:
                return None
            seconds = time.perf_counter() - began
            reports.append(_report(resolved, source, opened, result, split, overrides) | {"seconds": seconds})
            several = len(resolved.validation) > 1
            first_rows = result.rows if len(reports) == 1 else first_rows
            rows += [{"source": title, **row} for row in result.rows] if several else result.rows
        on_rank0(lambda: keep_others(run, name, masked_values(plain(reports))))
        if submission:
            path = run / file_name(submission, name)
            on_rank0(lambda: _submit(path, submission, resolved.validation[0], first_rows))
        on_rank0(lambda: _write(run, name, reports, rows))
        return reports


def _report(
    resolved: Resolved,
    source: ResolvedSource,
    opened: FinishedRun,
    result: Evaluation,
    split: str,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """The report about one data set and task, on every rank. Collective."""
    return {
        "dir": source.options.dir,
        "split": split,
        "task": source.options.task["name"],
        "vqa_measure": getattr(source.task.options, "vqa_measure", ""),
        "checkpoint": opened.checkpoint.name,
        "step": opened.state.step,
        "set": list(overrides),
        "samples": source.samples,
        "rows": on_rank0(lambda: len(result.rows)),
        "scored": result.scored,
        "there": result.there,
        "unit": result.unit,
        "bad_samples": result.bad,
        "cut_texts": result.texts.cut,
        "control_tokens": result.texts.control,
        "changed": result.texts.words(),
        "scores": result.scores,
        "grouped": on_rank0(lambda: source.task.grouped(result.rows)),
        "baselines": on_rank0(lambda: _baselines(resolved, source, result)),
    }


def chosen_sources(sources: Sequence[SourceOptions], dirs: Sequence[str]) -> list[SourceOptions]:
    """The sources that read one of these directories, in the order of the recipe; all if none is named.

    Raises:
        BadInput: a directory that no source reads.
    """
    known = list(dict.fromkeys(source.dir for source in sources))
    if strange := [name for name in dirs if name not in known]:
        raise BadInput(f"--data {strange[0]}: the run was not trained on it. Known: {', '.join(known)}.")
    return [source for source in sources if not dirs or source.dir in dirs]


def named(split: str, sources: Sequence[SourceOptions], dirs: Sequence[str]) -> str:
    """SPLIT in names of files: `split`, and `-DATA` for each data set where only some of the run's are taken.

    So the evaluation of some leaves the files of the others. DATA is as much of the end of a directory as tells it
    from the run's other ones. Arguments and errors are those of `chosen_sources`.
    """
    known = {source.dir: Path(source.dir).parts for source in sources}
    chosen = list(dict.fromkeys(source.dir for source in chosen_sources(sources, dirs)))
    if len(chosen) == len(known):
        return split

    def shortest(parts: tuple[str, ...]) -> str:
        ends = (parts[-length:] for length in range(1, len(parts)))
        end = next((end for end in ends if sum(p[-len(end) :] == end for p in known.values()) == 1), parts)
        return "-".join(part.strip("/:") for part in end)

    return "-".join([split, *(shortest(known[directory]) for directory in chosen)])


def keep_others(run: Path, name: str, reports: list[dict[str, Any]]) -> None:
    """Rename the files of an earlier evaluation that was of another checkpoint or of other overrides than `reports`.

    evaluation-NAME.json becomes evaluation-NAME.1.json, or of the next number that is free, and predictions and result
    files likewise. An evaluation of the same is replaced.
    """
    path = run / f"evaluation-{name}.json"
    try:
        earlier = json.loads(path.read_text("utf-8"))
        what = [[report["checkpoint"], report.get("set", [])] for report in earlier]
    except (OSError, ValueError, KeyError, TypeError):  # none, or none of ours
        return
    if what == [[report["checkpoint"], report["set"]] for report in reports]:
        return
    number = next(n for n in itertools.count(1) if not (run / f"evaluation-{name}.{n}.json").exists())
    results = (run / file_name(form, name) for form in FORMS)
    # That of the scores comes last: whoever is killed in between finds the rest to rename once more.
    for file in (run / f"predictions-{name}.jsonl", *results, path):
        if file.exists():
            file.rename(file.with_name(f"{file.stem}.{number}{file.suffix}"))
    print(f"{path}: the earlier evaluation, of {what[0][0]}, stays as evaluation-{name}.{number}.json")


def _write(run: Path, name: str, reports: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(run / f"predictions-{name}.jsonl", "".join(lines))
    write_json(run / f"evaluation-{name}.json", masked_values(plain(reports)))


def _submit(path: Path, form: str, source: ResolvedSource, rows: list[dict[str, Any]]) -> None:
    """Write the result file of a data set, and say what stands in it."""
    text, missing = content(form, rows, records(source))
    write_atomic(path, text)
    without = f", {missing:,} items without a prediction have an empty one" if missing else ""
    print(f"submission: {path}{without}{not_listed(source.manifest.account.get(source.options.split, {}))}")


def _baselines(resolved: Resolved, source: ResolvedSource, result: Evaluation) -> dict[str, float]:
    """Scores without a model on the samples that were scored, from the training data of the same data set and task."""
    split = source.options.split
    train = next(s for s in resolved.train if on_split(s.options, split) == source.options)
    scored = {row["sample_id"] for row in result.rows} if result.bad else None
    return source.task.baselines(records(train, True), records(source, True, scored))
