"""One model and three tasks, one per step: shares, order, resume, scores, and an adapter that knows them all."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from mmpeft_ds import adapter
from mmpeft_ds.data.order import Mix
from tests.helpers import ROOT, launch
from tests.helpers.runs import tiny_tasks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TRAIN = ROOT / "launchers" / "train.py"
OWN = [4, 2, 3]  # steps of an epoch of each source: 13, 8 and 10 samples in batches of 4
STEPS = 2 * sum(OWN)


def train(folder: Path, run: str, ranks: int, *sets: str) -> tuple[list[dict], str]:
    given = [f"run_dir={folder / run}", *sets]
    words = ["--recipe", str(folder / "recipe.yaml"), *(word for s in given for word in ("--set", s))]
    result = launch.run(TRAIN, *words, ranks=ranks, timeout=240)
    assert result.code == 0 and not result.killed, result.tail()
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    tiny_tasks.prepare(path)
    return path


@pytest.fixture(scope="module")
def whole(folder) -> tuple[list[dict], str]:
    """Two ranks under ZeRO-3 to the end."""
    return train(folder, "whole", 2, "engine.save_every=5", "engine.keep_last=9")


def test_steps_are_shared_out_by_weight_times_size_and_spread_evenly(whole):
    rows, _ = whole
    sources = [row["source"] for row in rows]
    assert len(rows) == STEPS
    mix = Mix(OWN, [1.0, 2.0, 1.0], seed=3)
    assert sources == [mix.at(epoch, step).source for epoch in range(2) for step in range(sum(OWN))]
    # weights 1, 2, 1 times 4, 2, 3 of own steps: shares 4, 4 and 3 of 11
    for epoch in (sources[: STEPS // 2], sources[STEPS // 2 :]):
        counts = Counter(epoch)
        assert [counts[i] for i in range(3)] == [3, 3, 3]
    assert all(len(set(sources[i : i + 5])) == 3 for i in range(STEPS - 5))


def test_the_loss_of_a_step_is_normalised_by_what_its_own_task_asks(whole):
    rows, _ = whole
    for row in rows:
        # vqa: one or two questions a sample; nlvr: one; captions are weighed by tokens, start and end included
        low, high = {0: (1, 8), 1: (4, 4), 2: (10, 20)}[row["source"]]
        assert low <= row["weight"] <= high and row["loss"] < 12
    assert all(row["samples"] == row["weight"] for row in rows if row["source"] != 2)


def test_every_validation_source_is_scored_under_its_name(whole):
    _, output = whole
    for step in (STEPS // 2, STEPS):
        said = re.findall(rf"step {step}: (\S+): (\w+) ", output)
        assert said == [("vqa-val", "accuracy"), ("nlvr-val", "accuracy"), ("coco-val", "cider")]


def test_a_run_continued_with_another_stage_and_rank_count_takes_the_same_tasks_and_gets_the_same_losses(
    folder, whole
):
    rows, _ = whole
    run = folder / "continued"
    shutil.copytree(folder / "whole", run)
    (run / "finished.json").unlink()  # back to where the middle of the first epoch was saved
    (run / "checkpoints" / "latest").write_text("step-00000005")
    found, output = train(folder, "continued", 1, "engine.deepspeed=ds_configs/zero0.json")
    assert f"continues after step 5 of {STEPS}, on 1 rank at ZeRO-0" in output and len(found) == STEPS
    for key in ("step", "epoch", "source", "weight", "sample_keys_hash"):
        assert [row[key] for row in found] == [row[key] for row in rows]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in rows], abs=2e-5)


def test_the_adapter_answers_each_of_its_tasks(folder, whole):
    loaded = adapter.load(folder / "whole" / "adapter")
    assert [type(task).__name__ for task in loaded.tasks] == ["Answering", "Answering", "Captioning"]
    grids = [tiny_tasks.tiny_clip_bart.grid(i) for i in range(3)]
    rows = loaded.predict(grids, ["what color is it"] * 3)
    assert [row["text"] for row in rows] == ["what color is it"] * 3
    judged = loaded.predict([grids[:2], grids[1:]], ["is it the same"] * 2, task=1)
    assert {row["prediction"] for row in judged} <= {"true", "false"}
    # the prompt of the task is part of what the model reads
    packed = [loaded.batch(grids[:1], ["what color is it"], task=i).texts["input_ids"] for i in (0, 1)]
    assert packed[0][0, 1] != packed[1][0, 1] and (packed[0][0, 2:] == packed[1][0, 2:]).all()
