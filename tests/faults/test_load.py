"""Much of everything, on small models: 200 checkpoints in a row, 1,000 shards, eight ranks. Memory and the number of
files and descriptors do not grow with it."""

from __future__ import annotations

import json
import statistics
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.helpers import ROOT, launch, rank_server
from tests.helpers.data import tiny_features
from tests.helpers.runs import endless

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.alone]
TRAIN = ROOT / "launchers" / "train.py"
GROWTH = 24.0  # MiB that a rank may add over 180 steps, which is less than a page of each batch


class Descriptors(threading.Thread):
    """Counts what rank 0 has open, now and then, until `end`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.counts: list[int] = []
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            try:
                self.counts.append(rank_server.ranks()[0].num_fds())
            except (IndexError, psutil.Error):
                continue


def train(recipe: Path, ranks: int, **changes: dict) -> tuple[launch.Result, list[dict], list[int]]:
    raw = yaml.safe_load(recipe.read_text())
    for section, change in changes.items():
        raw[section] |= change
    recipe.write_text(yaml.safe_dump(raw))
    open_files = Descriptors()
    began = time.monotonic()
    result = launch.run_forked(TRAIN, "--recipe", str(recipe), ranks=ranks, timeout=1500)
    open_files.ended.set()
    open_files.join()
    assert result.code == 0, result.tail()
    rows = [json.loads(line) for line in (recipe.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[min(19, len(rows) // 4)], rows[-1]
    growth = [b - a for a, b in zip(first["rss_mib"], last["rss_mib"], strict=True)]
    some = open_files.counts[len(open_files.counts) // 2 :]
    print(
        f"{ranks} ranks, {len(rows)} steps in {time.monotonic() - began:.0f} s with the start; from step "
        f"{first['step']} on memory grew by {max(growth):.1f} MiB at most, {statistics.mean(growth):.1f} on average, "
        f"to {max(last['rss_mib']):.0f}; rank 0 had {min(some)} to {max(some)} descriptors in the second half"
    )
    assert max(growth) < GROWTH
    return result, rows, open_files.counts


def test_two_hundred_checkpoints_in_a_row_leave_as_many_files_as_ten(tmp_path):
    recipe = endless.prepare(tmp_path, save_every=1, keep_last=3)
    _, rows, counts = train(recipe, 2, optim={"max_steps": 200}, engine={"eval_every": 200})
    run = tmp_path / "run"
    kept = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    files = [path for path in run.rglob("*") if path.is_file()]
    print(f"checkpoints {kept}; {len(files)} files of {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
    assert len(rows) == 200 and kept == [f"step-{step:08d}" for step in (198, 199, 200)]
    assert len(files) < 60
    assert counts[-2] <= counts[len(counts) // 2] + 2


def test_a_thousand_shards_are_read_to_their_end(tmp_path):
    recipe = endless.prepare(tmp_path)
    samples = [tiny_features.sample(i) for i in range(2000)]
    tiny_features.write_features(tmp_path / "many", samples, per_shard=2)
    source = {"dir": str(tmp_path / "many"), "task": {"name": "classification", "text": "captions"}}
    data = {"sources": [source], "validation": [source], "global_batch": 40, "workers": 1}
    _, rows, counts = train(
        recipe, 2, data=data, optim={"max_steps": 100}, engine={"eval_every": 100, "save_every": 50}
    )
    assert len({row["sample_keys_hash"] for row in rows}) == 100
    assert max(counts) < 400, "not every shard keeps a descriptor"


def test_eight_ranks_share_two_cores(tmp_path):
    recipe = endless.prepare(tmp_path)
    _, rows, _ = train(recipe, 8, optim={"max_steps": 100}, engine={"eval_every": 100, "save_every": 20})
    assert [row["step"] for row in rows] == list(range(1, 101))
