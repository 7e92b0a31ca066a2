"""Answers of a trained adapter about new pictures: written as they come, continued where they stopped.

Every row of the file names its picture (`image`), the `text` that was asked, the `prediction`, and by `adapter` the
weights that gave it; a picture that cannot be read has a row with an `error` instead, and the others continue. A text
that was too long to be read whole has the number of its missing tokens beside it (`cut_tokens`), one with control
tokens, which are read as plain characters, has theirs (`control_tokens`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft_ds import adapter
from mmpeft_ds.adapter_files import WEIGHTS
from mmpeft_ds.data.batch import Sample
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import append, json_line, write_atomic, writing
from mmpeft_ds.progress import Progress
from mmpeft_ds.runs.inputs import FEATURES, device_of


@dataclass
class Answers:
    """Result of `predict`.

    Attributes:
        rows: one per picture and text, in the order in which they were asked.
        known: how many pictures an earlier call had answered; their rows come from the file.
    """

    rows: list[dict[str, Any]]
    known: int = 0

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Rows of the pictures that could not be read, one per picture."""
        return list({row["image"]: row for row in self.rows if "error" in row}.values())

    @property
    def cut(self) -> list[str]:
        """Texts that were too long, so that a part of them was not read."""
        return self._texts("cut_tokens")

    @property
    def control(self) -> list[str]:
        """Texts with control tokens of the tokenizer, which were read as plain characters."""
        return self._texts("control_tokens")

    def _texts(self, key: str) -> list[str]:
        return list(dict.fromkeys(row["text"] for row in self.rows if key in row))


def predict(
    directory: Path,
    pictures: Sequence[Path],
    texts: Sequence[str],
    *,
    out: Path | None = None,
    batch: int = 32,
    device: str = "auto",
    task: int = 0,
    frames: int = 8,
) -> Answers:
    """Ask every text about every picture or video; the vision tower runs once for each.

    Args:
        directory: adapter directory.
        texts: may be empty where the task needs none, such as captioning.
        out: file of JSON lines, written after every batch. Answers that it holds already are not asked again.
        task: which of the adapter's tasks.
        frames: read of each video.

    Raises:
        BadInput: no such adapter, task or device; a text is missing or empty; `out` holds other answers, or
            cannot be written.
    """
    tasks = adapter.tasks_of(directory)
    if not 0 <= task < len(tasks):
        raise BadInput(f"--task {task}: this adapter was trained on {len(tasks)} task(s), counted from 0.")
    texts = adapter.texts_for(tasks[task], texts)
    where = device_of(device)
    made_by = identity(directory, task)
    asked = [(str(picture), text) for picture in pictures for text in texts]
    rows = _usable(read_answers(out, made_by, asked) if out else [], asked, batch * len(texts))
    left = {p for p in pictures if any((str(p), text) not in rows for text in texts)}
    if left:
        if out:  # before the model is loaded, which takes long
            _start(out, rows.values())
        loaded = adapter.load(directory, where, pictures=pictures[0].suffix.lower() != FEATURES)
        loaded.frames = frames
        with Progress("predict", len(left), "pictures") as progress:
            # The batches are those of a call that starts again, so that its answers are these to the last digit.
            for start in range(0, len(pictures), batch):
                part = [picture for picture in pictures[start : start + batch] if picture in left]
                new = _ask(loaded, part, texts, task, made_by)
                rows |= {(row["image"], row["text"]): row for row in new}
                if out:
                    _append(out, new)
                progress.advance(len(part))
    answers = [rows[pair] for pair in asked]
    if out and out.read_bytes() != _lines(answers):  # pictures that an earlier call could not read stand last
        _start(out, answers)
    return Answers(answers, len(pictures) - len(left))


def _ask(
    loaded: adapter.Loaded, pictures: Sequence[Path], texts: list[str], task: int, made_by: str
) -> list[dict[str, Any]]:
    """The rows of one batch, in order."""
    samples, errors = [], {}
    for picture in pictures:
        try:
            samples.append(loaded.sample(str(picture), picture, texts, task))
        except BadInput as problem:
            errors[str(picture)] = str(problem)
    answers = dict(_answered(loaded, samples, task))
    rows = []
    for picture in map(str, pictures):
        answer = answers.get(picture, errors.get(picture))
        for i, text in enumerate(texts):
            if isinstance(answer, str):
                content = {"error": answer}
            else:
                kept = ("prediction", "probability", "cut_tokens", "control_tokens")
                content = {key: answer[i][key] for key in kept if key in answer[i]}
            rows.append({"image": picture, "text": text, **content, "adapter": made_by})
    return rows


def _answered(
    loaded: adapter.Loaded, samples: list[Sample], task: int
) -> Iterator[tuple[str, list[dict[str, Any]] | str]]:
    """Name of each sample, and its answers or why there are none. Samples that do not go together are asked alone."""
    try:
        rows = iter(loaded.answer(samples, task) if samples else ())
    except BadInput as problem:
        if len(samples) == 1:
            yield samples[0].sample_id, str(problem)
            return
        for sample in samples:
            yield from _answered(loaded, [sample], task)
        return
    for sample in samples:
        yield sample.sample_id, [next(rows) for _ in sample.texts]


def identity(directory: Path, task: int) -> str:
    """A short hash of the adapter's weights and the task that is asked."""
    digest = hashlib.sha256((directory / WEIGHTS).read_bytes())
    digest.update((directory / "recipe.yaml").read_bytes() + str(task).encode())
    return digest.hexdigest()[:12]


def _usable(
    written: list[dict[str, Any]], asked: list[tuple[str, str]], together: int
) -> dict[tuple[str, str], dict[str, Any]]:
    """(picture, text) -> row of the answers that need not be asked again.

    Errors are left out, so that they are tried again, and a last batch that was not written to its end: the answers of
    a batch may differ from those of a part of it in their last digit.

    Args:
        together: rows of a batch.
    """
    there = {(row["image"], row["text"]) for row in written}
    torn: set[tuple[str, str]] = set()
    if written:
        first = asked.index((written[-1]["image"], written[-1]["text"])) // together * together
        last = set(asked[first : first + together])
        torn = set() if last <= there else last
    pairs = (((row["image"], row["text"]), row) for row in written)
    return {pair: row for pair, row in pairs if "error" not in row and pair not in torn}


def read_answers(path: Path, made_by: str, asked: Collection[tuple[str, str]]) -> list[dict[str, Any]]:
    """The rows that a file holds already, errors as well.

    Args:
        made_by: `identity` of what is asked now.
        asked: pairs of picture and text that are asked now.

    Raises:
        BadInput: the file holds something else, or answers to something that is not asked now.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise BadInput(f"--out {path}: is no file. Choose another name.")
    known, rows = set(asked), []
    try:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line and number == len(lines):
                continue
            try:
                row = json.loads(line.decode())
            except ValueError:
                if number == len(lines):  # a killed process may have left half a line
                    continue
                raise
            if row["adapter"] != made_by:
                raise BadInput(f"--out {path}: holds answers of another adapter or task. Choose another file.")
            pair = row["image"], row["text"]
            if pair not in known:
                raise BadInput(
                    f"--out {path}: holds an answer about {pair[0]} (text {pair[1]!r}), which is not asked now. Name "
                    "the same --images and texts as before, and more if you like, or choose another file."
                )
            rows.append(row)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"--out {path}: exists and holds no answers of predict.py. Choose another file.") from e
    return rows


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(map(json_line, rows))


def _start(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file with these rows; a kill leaves the file of before or this one. Raises BadInput."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _lines(rows))


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add the rows of a batch in one write, so that a kill leaves all of them or none. Raises BadInput."""
    with writing(path), path.open("ab", buffering=0) as file:
        append(file, _lines(rows))
