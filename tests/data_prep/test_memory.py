"""What a process of prepare.py holds: no heavy package, and no more for many records than for few."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.helpers.data.miniatures import put, put_picture

LIMIT = 80  # MiB
# Prints the peak of the process in MiB, that of its largest child, and the heavy packages it has imported.
PROGRAM = """
import re, resource, sys
from data_prep import prepare
prepare.main(sys.argv[1:])
# Not getrusage of this process, which counts what the one that started it had.
own = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
peaks = [own // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024]
heavy = {"torch", "transformers", "webdataset", "peft"} & sys.modules.keys()
print("PEAKS", *peaks, *sorted(heavy))
"""


@pytest.fixture
def peaks(tmp_path):
    """Prepare COCO captions with so many records: (MiB of the process, MiB of its largest worker, heavy packages)."""

    def _peaks(records: int, *options: str) -> tuple[int, int, list[str]]:
        root = tmp_path / f"coco{records}"
        images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(records)]
        rows = [{"id": n, "image_id": n, "caption": f"text {n} " * 20} for n in range(records)]
        put(root / "annotations/captions_train2014.json", json.dumps({"images": images, "annotations": rows}))
        for number in range(12):
            put_picture(root / f"train2014/{number}.jpg", number)
        argv = ["coco-captions", "--form", "official", "--root", str(root), "--out", str(tmp_path / f"out{records}")]
        argv += ["--limit", "12", "--samples-per-shard", "3", *options]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        own, child, *heavy = done.stdout.splitlines()[-1].split()[1:]
        return int(own), int(child), heavy

    return _peaks


def test_a_process_that_makes_shards_is_small_and_imports_nothing_heavy(peaks):
    own, _, heavy = peaks(50, "--processes", "1", "--resize", "5")
    assert own < LIMIT and not heavy


def test_memory_is_flat_in_the_number_of_records(peaks):
    few, many = peaks(500, "--processes", "2"), peaks(20_000, "--processes", "2")
    # The large file has 6 MiB, which parsed at once take about 30.
    assert many[0] - few[0] < 15 and max(many[1], few[1]) < LIMIT and not many[2]


def test_a_worker_does_not_hold_the_lines_that_are_left(tmp_path):
    def own(lines: int) -> int:
        path = tmp_path / f"{lines}.jsonl"
        path.write_text("".join(f'{{"caption": "{n}"}}\n' for n in range(lines)))
        program = f"""
import re
from pathlib import Path
from data_prep.sources.jsonl import Jsonl, Options
source = Jsonl(Options(train=[Path({str(path)!r})]))
assert source.count("train") == {lines} and next(source.samples("train", 5)).record["captions"] == ["5"]
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return int(done.stdout) // 1024

    # The place of each 64th line is kept; of each one they would take 6 MiB, as plain numbers about 60.
    assert own(400_000) - own(1000) < 4
