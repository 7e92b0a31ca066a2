"""Monitoring of a run: metrics.jsonl, TensorBoard, and progress on the console. Rank 0 only.

RUN/metrics.jsonl     one object per optimizer step, flushed at once; floats keep every bit (repr)
RUN/tensorboard/      the same curves, evaluations, a page of predictions, the recipe as text
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds import contact_sheet
from mmpeft_ds.files import append, is_removed, naming, write_atomic
from mmpeft_ds.progress import Progress
from mmpeft_ds.recipe.options import MonitorOptions

# The page of predictions; letters large enough to be read where TensorBoard shows it at half its size.
PAGE = contact_sheet.Layout(tile=224, columns=4, font=18, lines=8)
# Keys of metrics.jsonl that go to TensorBoard, and their tags there.
SCALARS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "ewc_penalty": "train/ewc_penalty",
    "skipped_total": "train/skipped_steps",
    "epoch": "train/epoch",
    "samples_per_second": "speed/samples_per_second",
    "step_seconds": "speed/step_seconds",
    "data_wait_share": "speed/data_wait_share",
    "padding": "speed/padding",
    "cost_imbalance": "speed/cost_imbalance",
    "micro_steps": "speed/micro_steps",
    "forward_seconds": "speed/forward_seconds",
    "backward_seconds": "speed/backward_seconds",
    "slowest_rank": "speed/slowest_rank",
    "slowest_excess": "speed/slowest_rank_excess_seconds",
}

# Numbers of each rank's memory. Of more than FEW_RANKS ranks, the single ones are recorded every RANKS_EVERY steps.
MEMORY = ("rss_mib", "peak_rss_mib", "device_mib")
FEW_RANKS, RANKS_EVERY = 8, 100


class Observer:
    """Receives what a run reports. This one shows nothing: it is that of every rank but 0."""

    def step(self, row: dict[str, Any]) -> None:
        """An optimizer step is done; `row` is its line of metrics.jsonl."""

    def evaluation(self, split: str, step: int, evaluation: Any) -> None:
        """A split is evaluated after `step`; `evaluation` is an `evaluator.Evaluation`."""

    def say(self, line: str) -> None:
        """Print a line."""

    def flush(self) -> Callable[[], None]:
        """Hand everything so far to the operating system; what is returned waits, once and in any thread, until it is
        on disk."""
        return lambda: None

    def close(self) -> None:
        """The run is over."""


class Monitor(Observer):
    """Shows and records what a run reports, on rank 0.

    Args:
        directory: run directory; metrics.jsonl there is already cut to `start`.
        total: optimizer steps of the run.
        start: steps done before this process; TensorBoard drops what it has loaded of a killed run beyond it.
        recipe: as YAML text.
        name: of the run among those that train beside it in this process, which lines on the console begin with.
        keep: called before files are written; raises if the directory is not this run's any more.
    """

    def __init__(
        self,
        directory: Path,
        options: MonitorOptions,
        total: int,
        start: int,
        recipe: str,
        name: str = "",
        keep: Callable[[], object] = str,
    ):
        self.options, self.total, self.name, self.keep = options, total, name, keep
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics = (directory / "metrics.jsonl").open("a+b", buffering=0)
        self.board = None
        if options.tensorboard:
            from mmpeft_ds.engine.board import Board

            # The files are cut already; a TensorBoard that has been open since before still holds the old points.
            self.board = Board(directory / "tensorboard", start + 1 if start else 0)
            if start == 0:
                self.board.add("text", "recipe", f"```yaml\n{recipe}\n```", 0)
                self.board.write()
        self.progress = Progress(f"train {name}".rstrip(), total, "steps", done=start, first_and_last=True)
        self.progress.__enter__()  # until `close`

    def step(self, row: dict[str, Any]) -> None:
        self._see_to_files()
        append(self.metrics, (json.dumps({k: plain(v) for k, v in thinned(row).items()}) + "\n").encode())
        self.progress.advance(
            row["step"] - self.progress.done,
            note=f"loss {row['loss']:.4f}, {row['samples_per_second']:.0f} samples/s",
            details=f"epoch {row['epoch']}, lr {row['lr']:.2e}",
        )
        if self.board is not None:
            self._draw(row)
            self.board.write()

    def _draw(self, row: dict[str, Any]) -> None:
        """Add the points of a step to TensorBoard."""
        step = row["step"]
        for name, value in row.get("graph", {}).items():  # of the steps in which it was measured
            self.board.add("scalar", f"graph/{name}", value, step)
        if step % self.options.every:
            return
        for key, tag in SCALARS.items():
            if key in row:
                self.board.add("scalar", tag, row[key], step)
        if "source_name" in row:  # the losses of several tasks are not comparable, so each has its own curve
            self.board.add("scalar", f"train/loss/{row['source_name']}", row["loss"], step)
        for name, norm in row["grad_norms"].items():
            self.board.add("scalar", f"grad_norm/{name}", norm, step)
        for key, tag in (("rss_mib", "memory_mib"), ("device_mib", "device_memory_mib")):
            for name, value in per_rank(row.get(key, []), step).items():
                self.board.add("scalar", f"{tag}/{name}", value, step)
        for kind, count in row["bad"].items():
            self.board.add("scalar", f"bad_samples/{kind}", count, step)
        for kind, count in row.get("cut_texts", {}).items():
            self.board.add("scalar", f"cut_texts/{kind}", count, step)
        if row.get("control_tokens"):
            self.board.add("scalar", "control_tokens/texts", row["control_tokens"], step)

    def evaluation(self, split: str, step: int, evaluation: Any) -> None:
        # events.py knows these tags, to remove the points of an evaluation that is made again
        shown = ", ".join(f"{k} {v:.4f}" for k, v in evaluation.scores.items())
        self.say(f"step {step}: {split}: {shown} ({evaluation.counted})")
        if self.board is None:
            return
        for name, value in evaluation.scores.items():
            self.board.add("scalar", f"eval/{split}/{name}", value, step)
        for kind, count in evaluation.texts.cut.items():
            self.board.add("scalar", f"cut_texts/{split}/{kind}", count, step)
        if evaluation.texts.control:
            self.board.add("scalar", f"control_tokens/{split}/texts", evaluation.texts.control, step)
        if evaluation.pictures:
            self.board.add("image", f"predictions/{split}", page(evaluation.pictures), step)
        if evaluation.graph is not None:
            self.board.add("image", f"graph/{split}", evaluation.graph, step)
        self.board.write()

    def say(self, line: str) -> None:
        between = ":\n" if "\n" in line else ": "
        self.progress.say(self.name + between + line if self.name else line)

    def flush(self) -> Callable[[], None]:
        self._see_to_files()
        # A file object, which closes its descriptor where a save ends before it waits.
        path, again = Path(self.metrics.name), os.fdopen(os.dup(self.metrics.fileno()), "rb", buffering=0)

        def wait() -> None:
            with again, naming(path):
                os.fsync(again)

        return wait

    def _see_to_files(self) -> None:
        """See that the directory is still this run's, and write its files again if somebody has removed them."""
        self.keep()
        if self.board is not None and self.board.restore():
            self.say(f"note: {self.board.path} was removed or replaced; it is written again, with its points")
        path = Path(self.metrics.name)
        with naming(path):
            if not is_removed(self.metrics, path):
                return
            self.metrics.seek(0)
            write_atomic(path, self.metrics.read())
        self.metrics.close()
        self.metrics = path.open("a+b", buffering=0)
        self.say(f"note: {path} was removed or replaced; it is written again, with the lines of all steps")

    def close(self) -> None:
        self.progress.close()
        with contextlib.suppress(OSError):  # failures to write have been reported where they occurred
            self.metrics.close()
        if self.board is not None:
            self.board.close()


def per_rank(values: list[float], step: int) -> dict[str, float]:
    """Curves of a number that every rank has: of a few ranks each one, of many the highest, whose it is, and the mean.

    A curve a rank would make rank 0 write longer than the others compute: 270 ms per step at 512 ranks. Every
    `RANKS_EVERY` steps each rank is shown.
    """
    ranks = {f"rank_{rank}": value for rank, value in enumerate(values)}
    if len(values) <= FEW_RANKS:
        return ranks
    highest = max(range(len(values)), key=values.__getitem__)
    summary = {"highest": values[highest], "rank_of_highest": highest, "mean": sum(values) / len(values)}
    return summary | (ranks if step % RANKS_EVERY == 0 else {})


def thinned(row: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl; with many ranks, memory as in `per_rank`."""
    if len(row["rss_mib"]) <= FEW_RANKS or row["step"] % RANKS_EVERY == 0:
        return row
    return row | {key: per_rank(row[key], row["step"]) for key in MEMORY if key in row}


def page(pictures: list[tuple[Tensor | None, list[dict[str, Any]]]]) -> Tensor:
    """Images with their texts, predictions and answers drawn below, as one picture (3, H, W) in [0, 1].

    Args:
        pictures: image (3, H, W) in [0, 1], or None where there is none to show, and its rows.
    """
    import numpy as np

    sheet = contact_sheet.draw([("", [_tile(image, rows) for image, rows in pictures])], PAGE)
    return torch.from_numpy(np.asarray(sheet).copy()).permute(2, 0, 1).float() / 255


def _tile(image: Tensor | None, rows: list[dict[str, Any]]) -> contact_sheet.Tile:
    from PIL import Image

    drawn = []
    if image is not None:
        drawn = [Image.fromarray((image.clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).numpy())]
    lines: list[str | tuple[str, str]] = [] if drawn or not rows else [rows[0]["sample_id"]]
    for row in rows[:3]:
        if row.get("text"):
            lines.append(_short(row["text"]))
        lines.append(_result(row))
    return contact_sheet.Tile(drawn, lines)


def _result(row: dict[str, Any]) -> tuple[str, str]:
    """A prediction, and the colour that shows whether it is right; a caption is neither right nor wrong."""
    answers = [str(a) for a in row.get("answers", [row["answer"]] if "answer" in row else [])]
    answer = max(answers, key=answers.count, default="")
    prediction = row["prediction"]
    words = f"-> {prediction:.3f}" if isinstance(prediction, float) else f"-> {_short(prediction)}"
    if "references" in row:
        own = row["references"][:1]
        return words + (f" (given: {_short(own[0])})" if own else ""), "darkblue"
    if "rank" in row:  # retrieval: where the right one stands
        right, more = row["rank"] == 1, f" (right one: rank {row['rank']})" if row["rank"] > 1 else ""
    else:
        right, more = not answers or str(prediction) in answers, f" (answer: {_short(answer)})" if answer else ""
    return words + more, "darkgreen" if right else "firebrick"


def _short(text: Any, limit: int = 80) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def plain(value: Any) -> Any:
    """`value` for JSON, which has neither NaN nor infinity: they become the strings `nan`, `inf`, `-inf`."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value
