#!/usr/bin/env python
"""Search a folder of new pictures with a trained retrieval adapter: a ranking and a contact sheet.

    python launchers/search.py --adapter runs/own/adapter --images photos --text "a dog on a beach" --out results
    python launchers/search.py --adapter DIR --images photos --texts queries.txt --top 20 --out results
    python launchers/search.py --adapter DIR --images photo.jpg --captions captions.txt --out results

The first two give the best pictures of each text, the last the best captions of each picture. Writes
OUT/results.jsonl and OUT/results.png, and keeps the features of the pictures in OUT/index.safetensors, so that the
next search reads only pictures that are new. Adapters that were trained on stored features read pictures too.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import adapter_files, console  # noqa: E402
from mmpeft_ds.errors import BadInput, counted  # noqa: E402
from mmpeft_ds.runs import inputs  # noqa: E402

LISTED_ERRORS = 20  # pictures that could not be read, beside the first
LISTED = 5  # hits of a query that are printed; all of them are in OUT/results.jsonl


def main() -> int:
    """Read the pictures, rank, write, print the first hits."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter directory: RUN/adapter")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="image files or directories of them")
    parser.add_argument("--text", action="append", default=[], help="what to look for; repeatable")
    parser.add_argument("--texts", type=Path, help="file with one text a line to look for")
    parser.add_argument("--captions", type=Path, help="the other way: file with one caption per line to choose from")
    parser.add_argument("--top", type=int, default=12, help="hits of each query (default: 12)")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results, made if needed")
    parser.add_argument("--batch", type=int, default=32, help="images at a time (default: 32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    args = parser.parse_args()
    if min(args.batch, args.top) < 1:
        raise BadInput("--batch, --top: must be 1 or more.")
    images = inputs.find_pictures(args.images)
    texts = inputs.read_texts(args.text, args.texts)
    captions = inputs.read_texts([], args.captions, "--captions")
    if bool(texts) == bool(captions) or not all(map(str.strip, texts)):
        raise BadInput('nothing to look for: give --text "a dog on a beach" or --texts FILE, or else --captions FILE.')
    adapter_files.whole(args.adapter)  # reported before torch is imported
    with console.quick_imports():
        from mmpeft_ds.runs import search

    result = search.search(
        args.adapter, images, texts or captions, out=args.out, top=args.top, batch=args.batch, device=args.device,
        of_pictures=bool(captions),
    )  # fmt: skip
    show(result.hits, "image" if captions else "text")
    print(f"{counted(len(result.hits), 'hit')}: {args.out / search.RESULTS}, contact sheet: {args.out / search.SHEET}")
    if result.cut:
        cut, first = counted(len(result.cut), "text"), result.cut[0][:60]
        print(f"note: the end of {cut} was too long to be read. The first: {first!r}")
    if result.errors:
        first, *others = result.errors.values()
        for problem in others[:LISTED_ERRORS]:
            print(f"left out: {problem}")
        raise BadInput(f"{len(result.errors):,} of {len(images):,} images were left out. The first: {first}")
    return 0


def show(hits: list[dict], query: str) -> None:
    """The first hits of each query as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(query, "rank", "score", "text" if query == "image" else "image")
    listed = [hit for hit in hits if hit["rank"] <= LISTED]
    for hit, name in zip(listed, inputs.short_names([hit["image"] for hit in listed]), strict=True):
        asked, answer = (name, hit["text"]) if query == "image" else (hit["text"], name)
        table.add_row(Text(asked if hit["rank"] == 1 else ""), str(hit["rank"]), f"{hit['score']:.3f}", Text(answer))
    Console().print(table)


if __name__ == "__main__":
    console.run(main)
