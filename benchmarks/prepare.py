#!/usr/bin/env python
"""Pictures per second of prepare.py beside a plain script that writes the same samples with webdataset.ShardWriter.

    python benchmarks/prepare.py        three sizes of pictures, three rounds; writes docs/benchmarks/prepare.*
    python benchmarks/prepare.py --pictures 200 --rounds 1 --records 1000 --out runs
    ... --img2dataset VENV/bin/python --energon VENV/bin/python     interpreters that have these packages, as peers

All read COCO's official caption file and the pictures of its folder. Commands run in turn and medians are printed: of
the whole command, of CPU seconds (user and system, workers too), which depend less on what else runs, and of both less
those of the same command for a few pictures, which are what a large data set costs. img2dataset fetches the pictures
by file: addresses, energon makes its index of the plain script's shards. The last table is peak memory against records
that are read, and against samples that are written, by VmHWM of the processes as another one sees it. `--pictures 0`
or `--records` without a number leaves that table as it was measured before.
"""

import argparse
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402

SIZES = {"640 x 480": (480, 640), "320 x 240": (240, 320), "160 x 120": (120, 160)}
SIDE = 96
PLAIN = """
import io, json, sys
from pathlib import Path
import webdataset
from PIL import Image

root, out, side = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
out.mkdir()
read = json.loads((root / "annotations/captions_train2014.json").read_text())
captions = {}
for row in read["annotations"]:
    captions.setdefault(row["image_id"], []).append(row)

def picture(path):
    data = path.read_bytes()
    if not side:
        return data
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(image.size)
    buffer = io.BytesIO()
    image.resize([round(n * scale) for n in image.size], Image.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()

with webdataset.ShardWriter(str(out / "coco-train-%06d.tar"), maxcount=1000, verbose=0, mtime=0) as writer:
    for number, image in enumerate(read["images"]):
        name = f"train2014/{image['file_name']}"
        rows = captions[image["id"]]
        record = {"captions": [row["caption"] for row in rows], "caption_ids": [row["id"] for row in rows]}
        record |= {"image_id": image["id"], "source_name": name}
        writer.write({"__key__": f"train-{number:09d}", "jpg": picture(root / name), "json": record})
"""
IMG2DATASET = """
import json, sys
from pathlib import Path
from img2dataset import download

root, out = Path(sys.argv[1]), sys.argv[2]
read = json.loads((root / "annotations/captions_train2014.json").read_text())
first = {row["image_id"]: row["caption"] for row in reversed(read["annotations"])}
listed = root / "list.jsonl"
with open(listed, "w") as file:
    for image in read["images"]:
        url = (root / "train2014" / image["file_name"]).as_uri()
        file.write(json.dumps({"url": url, "caption": first[image["id"]]}) + "\\n")
download(
    url_list=str(listed), input_format="jsonl", url_col="url", caption_col="caption", output_format="webdataset",
    output_folder=out, processes_count=1, thread_count=8, resize_mode="no", disable_all_reencoding=True,
    number_sample_per_shard=1000,
)
"""
ENERGON = ["--non-interactive", "--no-progress", "--split-ratio", "1,0,0", "--num-workers", "1", "--sample-type"]
ENERGON += ["CaptioningSample", "--field-map", '{"image": "jpg", "caption": "json[captions][0]"}']
FEW = 20  # pictures of the commands that are subtracted


def make_pictures(root: Path, count: int, size: tuple[int, int]) -> float:
    """COCO's layout with noisy pictures, no two of equal bytes, and five captions each; mean size in bytes."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    encoded = []
    for _ in range(20):
        coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(size[::-1])
        noisy = np.asarray(coarse) + random.normal(0, 14, (*size, 3))
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=87)
        encoded.append(buffer.getvalue())
    (root / "train2014").mkdir(parents=True)
    for number in range(count):
        data = encoded[number % len(encoded)]
        comment = b"\xff\xfe\x00\x0a%08d" % number
        (root / f"train2014/{number}.jpg").write_bytes(data[:2] + comment + data[2:])
    write_captions(root, count)
    return statistics.mean(map(len, encoded))


def write_captions(root: Path, pictures: int) -> None:
    """The annotation file: five captions per picture."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    with open(root / "annotations/captions_train2014.json", "w") as file:
        images = ",".join(json.dumps({"id": n, "file_name": f"{n}.jpg"}) for n in range(pictures))
        file.write(f'{{"images": [{images}], "annotations": [')
        for number in range(5 * pictures):
            row = {"image_id": number // 5, "id": number, "caption": f"A picture of something, in words {number}."}
            file.write(("," if number else "") + json.dumps(row))
        file.write("]}")


def timed(command: list, out: Path, keep: bool = False) -> tuple[float, float]:
    """(seconds, CPU seconds of the process and its workers) of a command that makes the directory `out`."""
    if not keep:
        shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(said)
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime


def ours(root: Path, out: Path, workers: int, side: int) -> list[str]:
    """The command of prepare.py."""
    options = ["--form", "official", "--splits", "train", "--processes", str(workers), "--resize", str(side)]
    script = [sys.executable, "data_prep/prepare.py", "coco-captions"]
    return [*script, "--root", str(root), "--out", str(out), *options]


def commands_of(root: Path, out: Path, side: int, args: argparse.Namespace) -> dict[tuple, list]:
    """(name, workers) -> command: the plain script, the peers that are there, prepare.py."""
    commands: dict[tuple, list] = {("plain script", 1): [sys.executable, "-c", PLAIN, root, out, side]}
    if args.energon and not side:
        energon = Path(args.energon).with_name("energon")
        commands["energon prepare, of those shards", 1] = [energon, "prepare", out, *ENERGON]
    if args.img2dataset and not side:
        commands["img2dataset", 1] = [args.img2dataset, "-c", IMG2DATASET, root, out]
    return commands | {("prepare.py", workers): ours(root, out, workers, side) for workers in (1, 2)}


def measure_speed(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Rows of the first table."""
    large, *_, small = SIZES
    # The start does not depend on the pictures' size.
    cases = [(small, FEW, 0), *((size, args.pictures, 0) for size in SIZES)]
    cases += [(small, FEW, SIDE), (large, args.pictures // 4, SIDE)]
    roots, kib = {}, {}
    for size, count, _ in cases:
        root = roots[size, count] = folder / f"{size.split()[0]}-{count}"
        if not root.exists():
            kib[size] = round(make_pictures(root, count, SIZES[size]) / 1024)
    runs: dict[tuple, list[tuple[float, float]]] = {}
    for number in range(args.rounds):
        for case in cases:
            for key, command in commands_of(roots[case[:2]], folder / "out", case[2], args).items():
                found = timed(command, folder / "out", keep=key[0].startswith("energon"))
                runs.setdefault((*case, *key), []).append(found)
        print(f"round {number + 1} of {args.rounds} is done", file=sys.stderr, flush=True)
    rows = []
    for (size, count, side, what, workers), found in runs.items():
        if count == FEW:
            continue
        row = {"size": size, "kib": kib[size], "what": what, "workers": workers, "side": side}
        row |= {"pictures": count, "few": FEW}
        for i, unit in enumerate(("wall", "cpu")):
            row[unit] = statistics.median(run[i] for run in found)
            row[f"{unit}_few"] = statistics.median(run[i] for run in runs[small, FEW, side, what, workers])
        rows.append(row)
    return rows


def processes(number: int) -> list[int]:
    """A process and all that it has started."""
    try:
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    except OSError:  # it has ended
        children = []
    return [number, *(n for child in children for n in processes(int(child)))]


def peaks(command: list[str]) -> tuple[float, float]:
    """Peak MiB of a command's process, and of its largest worker."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: dict[int, int] = {}
    while process.poll() is None:
        for number in processes(process.pid):
            try:
                status = Path(f"/proc/{number}/status").read_text()
            except OSError:
                continue
            if peak := re.search(r"VmHWM:\s*(\d+)", status):
                found[number] = int(peak[1])
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    own = found.pop(process.pid)
    return own / 1024, max(found.values(), default=0) / 1024


def measure_memory(folder: Path, counts: list[int]) -> list[dict]:
    """Rows of the second table."""
    rows = []
    for count in counts:
        root, lines = folder / "records", folder / "lines.jsonl"
        make_pictures(root, 100, SIZES["160 x 120"])
        write_captions(root, max(count // 5, 100))
        read = ours(root, folder / "a", 2, 0) + ["--limit", "100", "--samples-per-shard", "25"]
        with open(lines, "w") as file:
            for number in range(count):
                file.write(json.dumps({"captions": [f"text {number} {k}" for k in range(5)]}) + "\n")
        written = [*read[:2], "jsonl", "--train", str(lines), "--out", str(folder / "b"), "--processes", "2"]
        for what, command in (("records read", read), ("samples written", written)):
            begin = time.perf_counter()
            own, worker = peaks(command)
            rows.append({"what": what, "count": count, "main": own, "worker": worker})
            print(rows[-1], f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        for path in (root, folder / "a", folder / "b"):
            shutil.rmtree(path)
    return rows


def rate(row: dict, unit: str, rest: bool) -> float:
    """Pictures per second (of CPU), of the whole command or of the pictures after the few."""
    if not rest:
        return row["pictures"] / row[unit]
    return (row["pictures"] - row["few"]) / max(row[unit] - row[f"{unit}_few"], 1e-9)


def table(result: dict) -> str:
    """The page's tables."""
    speed, memory = result["speed"], result["memory"]
    lines = [
        "# Preparation",
        "",
        f"{speed['machine']}; load average {speed['load']}. Medians of {speed['rounds']} rounds in which all commands "
        "ran in turn.",
        "",
        f"`python benchmarks/prepare.py` repeats it. COCO captions, five each; bytes copied, or resized to {SIDE}. In "
        "brackets: times the plain script, a worker (of wall time).",
        "",
        "| | | | | whole command | | without its start | |",
        "|---|---|---|---|---|---|---|---|",
        "| pictures | resized | | workers | pictures/s | pictures/CPU s | pictures/s | pictures/CPU s |",
    ]
    plain = {(row["size"], row["side"]): row for row in speed["rows"] if row["what"] == "plain script"}
    for row in speed["rows"]:
        base, cells = plain[row["size"], row["side"]], []
        for rest in (False, True):
            for unit in ("wall", "cpu"):
                value = rate(row, unit, rest)
                times = value / rate(base, unit, rest) / (row["workers"] if unit == "wall" else 1)
                cells.append(f"{value:,.0f}" + ("" if row is base else f" ({times:.2f})"))
        lines.append(
            f"| {row['pictures']:,} of {row['size']}, {row['kib']} KiB | {row['side'] or 'no'} | {row['what']} "
            f"| {row['workers']} | {' | '.join(cells)} |"
        )
    lines += ["", f"Peak memory (VmHWM), load average {memory['load']}:", ""]
    lines += ["| | number | main process, MiB | largest worker, MiB |", "|---|---|---|---|"]
    for row in memory["rows"]:
        worker = f"{row['worker']:.0f}" if row["worker"] else "no worker"
        lines.append(f"| {row['what']} | {row['count']:,} | {row['main']:.0f} | {worker} |")
    return "\n".join(lines) + "\n"


def measured(measure: Callable[..., list[dict]], *arguments: object, **told: object) -> dict:
    """Rows of a table with the machine and its load before and after."""
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), *arguments)
    load = f"{before:.0f} before and {os.getloadavg()[0]:.0f} after"
    return {"machine": _page.machine(), "load": load, **told, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=4000, help="of each size; a quarter of them where resized")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--records", type=int, nargs="*", default=[1000, 100_000, 1_000_000], help="of the second table"
    )
    parser.add_argument("--img2dataset", default="", help="Python interpreter that has img2dataset")
    parser.add_argument("--energon", default="", help="Python interpreter that has megatron-energon")
    parser.add_argument("--out", type=Path, default=_page.FOLDER, help="folder of the page and the JSON")
    args = parser.parse_args()
    before = args.out / "prepare.json"
    result = json.loads(before.read_text()) if before.exists() else {}
    if args.pictures:
        result["speed"] = measured(measure_speed, args, rounds=args.rounds)
    if args.records:
        result["memory"] = measured(measure_memory, args.records)
    result = {
        name: result.get(name) or {"machine": "", "load": "", "rounds": 0, "rows": []} for name in ("speed", "memory")
    }
    _page.write("prepare", table(result), result, args.out)


if __name__ == "__main__":
    main()
