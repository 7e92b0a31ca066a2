#!/usr/bin/env python
"""Ask a trained adapter about new images.

    python launchers/predict.py --adapter runs/quickstart/adapter --images photos --text "is there a circle?"
    python launchers/predict.py --adapter DIR --images a.png b.png --texts questions.txt --out answers.jsonl

Every text is asked of every image; the image tower runs once an image.
"""

import json
import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".npy"}
LISTED = 50  # answers printed where no file was asked for


def main() -> int:
    """Load, predict with a progress bar, print a table and write JSON lines."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter directory: RUN/adapter")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="image files or directories of them")
    parser.add_argument("--text", action="append", default=[], help="what to ask; repeatable")
    parser.add_argument("--texts", type=Path, help="file with one text a line")
    parser.add_argument("--task", type=int, default=0, help="of several tasks, which (data.sources' order, from 0)")
    parser.add_argument("--out", type=Path, help="write one JSON object an answer")
    parser.add_argument("--batch", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    args = parser.parse_args()
    if args.batch < 1:
        raise BadInput(f"--batch: must be 1 or more, got {args.batch}.")
    images, texts = find_images(args.images), find_texts(args.text, args.texts)
    import torch
    from tqdm import tqdm

    from mmpeft_ds import adapter

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    loaded = adapter.load(args.adapter, device)
    rows = []
    for start in tqdm(range(0, len(images), args.batch), desc="predict", unit="batch", disable=None):
        part = images[start : start + args.batch]
        for row in loaded.predict(part, [texts] * len(part), args.batch, args.task):
            rows.append({"image": row["sample_id"], **{k: row[k] for k in ("text", "prediction") if k in row}})
    show(rows[:LISTED], len(rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        print(f"{len(rows):,} answers: {args.out}")
    return 0


def find_images(given: list[Path]) -> list[Path]:
    """Files as given, directories with everything below them that looks like an image."""
    found = []
    for path in given:
        if not path.exists():
            raise BadInput(f"--images {path}: no such file or directory. Give image files or a folder of them.")
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS) if path.is_dir() else [path]
        if not inside:
            raise BadInput(f"--images {path}: no image in it. Known endings: {', '.join(sorted(EXTENSIONS))}.")
        found += inside
    return found


def find_texts(given: list[str], file: Path | None) -> list[str]:
    """Texts of the command line and of the file."""
    texts = list(given)
    if file is not None:
        try:
            texts += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as e:
            raise BadInput(f"--texts {file}: cannot be read as UTF-8 text. Give a file with one text a line.") from e
    if not texts:
        raise BadInput('--text: nothing to ask. Add --text "is there a circle?" or --texts FILE.')
    return texts


def show(rows: list[dict], total: int) -> None:
    """The first answers as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("image", "text", "answer", title=f"{len(rows)} of {total:,} answers", title_justify="left")
    for row in rows:
        table.add_row(row["image"], row["text"], str(row["prediction"]))
    Console().print(table)


if __name__ == "__main__":
    console.run(main)
