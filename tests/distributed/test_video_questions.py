"""Questions about videos, from the publishers' files to scores and answers, by the launchers that a user starts.

MSRVTT-QA in small and conversations about nothing, pictures and videos train one adapter on 2 and 3 ranks."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep import prepare
from tests.helpers import ROOT, launch
from tests.helpers.data.films import film
from tests.helpers.data.layouts import LAYOUTS
from tests.helpers.data.mixed_media import sample
from tests.helpers.data.tiny_shards import write_shards
from tests.helpers.models import tiny_families, tiny_mllm

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
LAUNCHERS = ROOT / "launchers"
FAMILIES = ("qwen2_vl", "llava_onevision")
STEPS, FRAMES = 12, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """FOLDER/qa of the official files of MSRVTT-QA, FOLDER/mixed of conversations."""
    folder = tmp_path_factory.mktemp("video_questions")
    LAYOUTS["msrvtt"](folder / "msrvtt")
    words = ["--form", "qa", "--root", str(folder / "msrvtt"), "--frames", str(FRAMES), "--out", str(folder / "qa")]
    prepare.main(["msrvtt", *words, "--processes", "1"])
    draw = random.Random(3)
    write_shards(folder / "mixed", [sample(i, draw) for i in range(24)], per_shard=5, name="mixed")
    for family in FAMILIES:
        (tiny_mllm if family in tiny_mllm.FAMILIES else tiny_families).write(folder / family, family)
    return folder


def write(data: Path, family: str, name: str) -> Path:
    asked = {"dir": str(data / "qa"), "task": {"name": "answering", "vqa_measure": "exact", "max_new_tokens": 3}}
    raw = {
        "run_dir": str(data / name),
        "backbone": {"name": "mllm", "model": str(data / family), "max_text_length": 128},
        "method": {"name": "lora", "r": 2, "target_modules": r".*\.(q_proj|v_proj|qkv)"},
        "data": {
            "sources": [
                {**asked, "split": "train", "weight": 4.0},
                {"dir": str(data / "mixed"), "split": "train", "task": {"name": "instruction", "max_new_tokens": 3}},
            ],
            "validation": [{**asked, "split": "val"}],
            "global_batch": 6,
            "workers": 0,
        },
        "optim": {"lr": 0.01, "max_steps": STEPS, "warmup": 0.0, "schedule": "constant"},
        "engine": {"deepspeed": "ds_configs/zero3.json", "threads": 1, "stall": 60, "timeout": 200, "eval_every": 6},
    }
    path = data / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def launched(name: str, *words: object, ranks: int) -> None:
    result = launch.run(LAUNCHERS / name, *map(str, words), ranks=ranks, timeout=300)
    assert result.code == 0 and "waiting since" not in result.output, result.tail()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_questions_about_videos_are_trained_scored_and_answered(data, family):
    for ranks in (1, 2, 3):
        launched("train.py", "--recipe", write(data, family, f"{family}-{ranks}"), ranks=ranks)
    one, *others = (rows(data / f"{family}-{ranks}" / "metrics.jsonl") for ranks in (1, 2, 3))
    assert {row["source"] for row in one} == {0, 1} and not one[-1]["bad"]
    for found in others:
        assert [r["sample_keys_hash"] for r in found] == [r["sample_keys_hash"] for r in one]
        assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in one], abs=1e-4)
    run = data / f"{family}-3"
    launched("evaluate.py", "--run", run, "--split", "test", "--data", data / "qa", ranks=2)
    (report,) = json.loads((run / "evaluation-test-qa.json").read_text())
    assert (report["rows"], report["bad_samples"]) == (4, 0) and 0 <= report["scores"]["accuracy"] <= 1
    said = {row["sample_id"]: row["prediction"] for row in rows(run / "predictions-test-qa.jsonl")}
    assert len(said) == 2
    answered = ask(run, data / "msrvtt" / "videos" / "all")
    for name, text in said.items():  # as evaluated, from the files themselves; those of the test split come in order
        assert answered[f"video{9000 + int(name[-9:])}.mp4"] == text
    other = film(data / f"{family}.mp4", seconds=9, noise=True)
    assert ask(run, other).keys() == {other.name}


def ask(run: Path, videos: Path) -> dict[str, str]:
    """Name of each video -> what `predict.py` answers."""
    out = run / f"{videos.stem}.jsonl"
    command = ["--adapter", run / "adapter", "--videos", videos, "--frames", FRAMES, "--out", out]
    done = subprocess.run(
        [sys.executable, LAUNCHERS / "predict.py", *map(str, command), "--text", "what is it ?"],
        capture_output=True,
        text=True,
        env=launch.environment(),
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return {Path(row["image"]).name: row["prediction"] for row in rows(out)}
