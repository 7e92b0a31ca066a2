#!/usr/bin/env python
"""Ask a trained adapter about new images.

    python launchers/predict.py --adapter runs/quickstart/adapter --images photos --text "is there a circle?"
    python launchers/predict.py --adapter DIR --images a.png b.png --texts questions.txt --out answers.jsonl
    python launchers/predict.py --adapter DIR --images photos          # captions and classes need no text
    python launchers/predict.py --adapter DIR --videos clips --frames 8 --text "what happens?"

Every text is asked of every image or video; the image tower runs once for each. One that cannot be read gets a row
with its error, the others continue, and the exit code is 2. With --out answers are written after every batch, and the
same command continues without asking again what it has. To search a folder by texts: launchers/search.py.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import adapter_files, console  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402
from mmpeft_ds.runs import inputs  # noqa: E402

LISTED = 50  # answers printed; all of them are in --out


def main() -> int:
    """Load, predict with a progress bar, print a table and write JSON lines."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter directory: RUN/adapter")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="image files or directories of them")
    parser.add_argument("--videos", type=Path, nargs="+", default=[], help="video files or directories of them")
    parser.add_argument("--frames", type=int, default=8, help="frames read of each video (default: 8)")
    parser.add_argument("--text", action="append", default=[], help="what to ask; repeatable")
    parser.add_argument("--texts", type=Path, help="file with one text a line")
    parser.add_argument("--task", type=int, default=0, help="of several tasks, which (data.sources' order, from 0)")
    parser.add_argument("--out", type=Path, help="write one JSON object per answer")
    parser.add_argument("--batch", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    args = parser.parse_args()
    if args.batch < 1:
        raise BadInput(f"--batch: must be 1 or more, got {args.batch}.")
    if not 1 <= args.frames <= 1024:
        raise BadInput(f"--frames: {args.frames}. Use a number from 1 to 1024, as many as the training data has.")
    if not args.images and not args.videos:
        raise BadInput("--images or --videos: name the files to ask about, or folders of them.")
    images = [*inputs.find_pictures(args.images), *inputs.find_videos(args.videos)]
    texts = inputs.read_texts(args.text, args.texts)
    adapter_files.whole(args.adapter)  # reported before torch is imported
    with console.quick_imports():
        from mmpeft_ds.runs import predict

    how = {"out": args.out, "batch": args.batch, "device": args.device, "task": args.task, "frames": args.frames}
    answers = predict.predict(args.adapter, images, texts, **how)
    show(answers.rows)
    if args.out:
        known = f" ({answers.known:,} images had theirs already)" if answers.known else ""
        print(f"{counted(answers.rows)}: {args.out}{known}")
    if cut := answers.cut:
        print(f"note: {len(cut):,} texts are too long to be read whole (cut_tokens). The first: {cut[0][:60]!r}")
    if control := answers.control:
        print(
            f"note: texts whose control tokens are read as characters: {len(control):,}, the first {control[0][:60]!r}"
        )
    if failed := answers.failed:
        raise BadInput(f"{len(failed):,} of {len(images):,} images have no answer. The first: {failed[0]['error']}")
    return 0


def counted(rows: list[dict]) -> str:
    """Numbers of rows with an answer and with an error, as text."""
    failed = sum("error" in row for row in rows)
    answers = f"{len(rows) - failed:,} answer{'' if len(rows) - failed == 1 else 's'}"
    return f"{answers}, {failed:,} without" if failed else answers


def show(rows: list[dict]) -> None:
    """The first answers as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    listed = rows[:LISTED]
    asked = any(row["text"] for row in listed)
    title = f"{len(listed):,} of {counted(rows)}" if len(rows) > len(listed) else counted(rows)
    table = Table("image", *(["text"] if asked else []), "answer", title=console.one_line(title), title_justify="left")
    for row, name in zip(listed, inputs.short_names([row["image"] for row in listed]), strict=True):
        said = row.get("prediction", "cannot be read")
        answer = f"{said:.3f}" if isinstance(said, float) else str(said)
        table.add_row(*map(Text, (name, *([row["text"]] if asked else []), answer)))
    Console().print(table)


if __name__ == "__main__":
    console.run(main)
