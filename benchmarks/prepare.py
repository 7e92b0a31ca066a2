#!/usr/bin/env python
"""Pictures per second of prepare.py beside a plain script that writes the same samples with webdataset.ShardWriter.

    python benchmarks/prepare.py        both picture sizes, three rounds; writes docs/benchmarks/prepare.*
    python benchmarks/prepare.py --pictures 200 --rounds 1 --records 1000 --out runs

Both read COCO's official caption file and the pictures of its folder. Commands run in turn and medians are printed: of
the whole command from start to exit, and of CPU seconds (user and system, workers too), which depend less on what else
runs. The second table is peak memory against records that are read, and against samples that are written.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402

SIZES = {"640 x 480": (480, 640), "160 x 120": (120, 160)}
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
# Peak MiB of the process and of its largest worker; what the process that starts it holds does not count.
MEMORY = """
import re, resource, sys
from data_prep import prepare
prepare.main(sys.argv[1:])
own = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
print("PEAKS", own // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


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
    """The annotation file: five captions a picture."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    with open(root / "annotations/captions_train2014.json", "w") as file:
        images = ",".join(json.dumps({"id": n, "file_name": f"{n}.jpg"}) for n in range(pictures))
        file.write(f'{{"images": [{images}], "annotations": [')
        for number in range(5 * pictures):
            row = {"image_id": number // 5, "id": number, "caption": f"A picture of something, in words {number}."}
            file.write(("," if number else "") + json.dumps(row))
        file.write("]}")


def timed(command: list[str], out: Path) -> tuple[float, float]:
    """(seconds, CPU seconds of the process and its workers) of a command that makes the directory `out`."""
    shutil.rmtree(out, ignore_errors=True)
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(said)
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime


def ours(root: Path, out: Path, workers: int, side: int) -> list[str]:
    """The command of prepare.py."""
    options = ["--form", "official", "--splits", "train", "--processes", str(workers), "--resize", str(side)]
    return ["data_prep/prepare.py", "coco-captions", "--root", str(root), "--out", str(out), *options]


def measure_speed(folder: Path, pictures: int, rounds: int) -> list[dict]:
    """Rows of the first table."""
    rows = []
    for title, size in SIZES.items():
        root, out = folder / title.replace(" ", ""), folder / "out"
        mean = make_pictures(root, pictures, size)
        commands = {("plain script, with its imports", 1, side): ["-c", PLAIN, root, out, side] for side in (0, SIDE)}
        commands |= {("prepare.py", n, side): ours(root, out, n, side) for side in (0, SIDE) for n in (1, 2)}
        commands["imports of the plain script", 1, 0] = ["-c", "import json, webdataset, PIL.Image"]
        runs = {key: [] for key in commands}
        for _ in range(rounds):
            for key, command in commands.items():
                runs[key].append(timed([sys.executable, *map(str, command)], out))
        for (what, workers, side), found in runs.items():
            wall, cpu = (statistics.median(values) for values in zip(*found, strict=True))
            row = {"size": title, "kib": round(mean / 1024), "what": what, "workers": workers, "side": side}
            rows.append(row | {"seconds": wall, "cpu": cpu, "pictures": pictures})
            print(rows[-1], file=sys.stderr, flush=True)
        shutil.rmtree(root)
    return rows


def measure_memory(folder: Path, counts: list[int]) -> list[dict]:
    """Rows of the second table."""
    rows = []
    for count in counts:
        root, lines = folder / "records", folder / "lines.jsonl"
        make_pictures(root, 100, SIZES["160 x 120"])
        write_captions(root, max(count // 5, 100))
        read = ours(root, folder / "a", 2, 0)[1:] + ["--limit", "100", "--samples-per-shard", "25"]
        with open(lines, "w") as file:
            for number in range(count):
                file.write(json.dumps({"captions": [f"text {number} {k}" for k in range(5)]}) + "\n")
        written = ["jsonl", "--train", str(lines), "--out", str(folder / "b"), "--processes", "2"]
        for what, command in (("records read", read), ("samples written", written)):
            begin = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", MEMORY, *command], cwd=ROOT, capture_output=True, text=True, check=True
            )
            own, worker = map(int, re.search(r"PEAKS (\d+) (\d+)", done.stdout).groups())
            rows.append({"what": what, "count": count, "main": own, "worker": worker})
            print(rows[-1], f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        for path in (root, folder / "a", folder / "b"):
            shutil.rmtree(path)
    return rows


def table(speed: list[dict], memory: list[dict]) -> str:
    """The page's tables."""
    lines = ["# Preparation", "", f"{_page.machine()}. Medians of rounds in which all commands ran in turn.", ""]
    lines += [
        f"`python benchmarks/prepare.py` repeats it. COCO captions, five each; bytes copied, or resized to {SIDE}.",
        "",
        "| pictures | resized | | workers | pictures/s | CPU s | pictures/CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in speed:
        rates = [f"{row['pictures'] / row[key]:,.0f}" for key in ("seconds", "cpu")]
        if row["what"].startswith("imports"):
            rates = [f"({row['seconds']:.1f} s)", ""]
        lines.append(
            f"| {row['size']}, {row['kib']} KiB | {row['side'] or 'no'} | {row['what']} | {row['workers']} "
            f"| {rates[0]} | {row['cpu']:.2f} | {rates[1]} |"
        )
    lines += ["", "| | number | main process, MiB | largest worker, MiB |", "|---|---|---|---|"]
    lines += [f"| {row['what']} | {row['count']:,} | {row['main']} | {row['worker']} |" for row in memory]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=4000, help="of each size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--records", type=int, nargs="*", default=[1000, 100_000, 1_000_000], help="of the second table"
    )
    parser.add_argument("--out", type=Path, default=_page.FOLDER, help="folder of the page and the JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        speed = measure_speed(Path(folder), args.pictures, args.rounds)
        memory = measure_memory(Path(folder), args.records)
    result = {"machine": _page.machine(), "speed": speed, "memory": memory}
    _page.write("prepare", table(speed, memory), result, args.out)


if __name__ == "__main__":
    main()
