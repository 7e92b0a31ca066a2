"""Answers of a trained adapter about new pictures: written as they come, continued where they stopped.

Every row of the file names its picture (`image`), the `text` that was asked, the `prediction`, and by `adapter` the
weights that gave it; a picture that cannot be read has a row with an `error` instead, and the others go on. A text
that was too long to be read whole has the number of its missing tokens beside it (`cut_tokens`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft_ds import adapter
from mmpeft_ds.adapter_files import WEIGHTS
from mmpeft_ds.errors import BadInput
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
        return list(dict.fromkeys(row["text"] for row in self.rows if "cut_tokens" in row))


def predict(
    directory: Path,
    pictures: Sequence[Path],
    texts: Sequence[str],
    *,
    out: Path | None = None,
    batch: int = 32,
    device: str = "auto",
    task: int = 0,
) -> Answers:
    """Ask every text about every picture; the vision tower runs once per picture.

    Args:
        directory: adapter directory.
        texts: may be empty where the task needs none, such as captioning.
        out: file of JSON lines, written after every batch. Answers that it holds already are not asked again.
        task: which of the adapter's tasks.

    Raises:
        BadInput: no such adapter, task or device; a text is missing; `out` holds answers of something else.
    """
    tasks = adapter.tasks_of(directory)
    if not 0 <= task < len(tasks):
        raise BadInput(f"--task {task}: this adapter was trained on {len(tasks)} task(s), counted from 0.")
    texts = adapter.texts_for(tasks[task], texts)
    where = device_of(device)
    made_by = identity(directory, task)
    rows = read_answers(out, made_by) if out else {}
    left = [p for p in pictures if any((str(p), text) not in rows for text in texts)]
    repeated = len(pictures) - len(left)
    if left:
        loaded = adapter.load(directory, where, pictures=left[0].suffix.lower() != FEATURES)
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            _write(out, "w", rows.values())  # without errors, and without half a line
        with Progress("predict", len(left), "pictures") as progress:
            for start in range(0, len(left), batch):
                part = left[start : start + batch]
                new = _ask(loaded, part, texts, task, made_by)
                rows |= {(row["image"], row["text"]): row for row in new}
                if out:
                    _write(out, "a", new)
                progress.advance(len(part))
    return Answers([rows[str(picture), text] for picture in pictures for text in texts], repeated)


def _ask(
    loaded: adapter.Loaded, pictures: Sequence[Path], texts: list[str], task: int, made_by: str
) -> list[dict[str, Any]]:
    """The rows of one batch, in order."""
    samples, errors = [], {}
    for picture in pictures:
        try:
            samples.append(loaded.sample(str(picture), picture, texts, task))
        except BadInput as problem:
            errors[picture] = str(problem)
    answers = iter(loaded.answer(samples, task) if samples else ())
    rows = []
    for picture in pictures:
        for text in texts:
            if picture in errors:
                said = {"error": errors[picture]}
            else:
                answer = next(answers)
                said = {key: answer[key] for key in ("prediction", "probability", "cut_tokens") if key in answer}
            rows.append({"image": str(picture), "text": text, **said, "adapter": made_by})
    return rows


def identity(directory: Path, task: int) -> str:
    """A short hash of the adapter's weights and the task that is asked."""
    digest = hashlib.sha256((directory / WEIGHTS).read_bytes())
    digest.update((directory / "recipe.yaml").read_bytes() + str(task).encode())
    return digest.hexdigest()[:12]


def read_answers(path: Path, made_by: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(picture, text) -> row of the answers that a file holds already; errors are left out, so that they are tried
    again. Raises BadInput if the file holds something else."""
    if not path.exists():
        return {}
    rows = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                if number == len(lines):  # a killed process may have left half a line
                    continue
                raise
            if row["adapter"] != made_by:
                raise BadInput(f"--out {path}: holds answers of another adapter or task. Choose another file.")
            if "error" not in row:
                rows[row["image"], row["text"]] = row
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"--out {path}: exists and holds no answers of predict.py. Choose another file.") from e
    return rows


def _write(path: Path, mode: str, rows: Iterable[dict[str, Any]]) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
