"""Train, evaluate and predict without any launcher in front: plain `python`, one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.runs import tiny_vqa


def call(*command: str | Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"TORCH_EXTENSIONS_DIR": str(ROOT / ".cache" / "torch_extensions"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )


@pytest.mark.distributed
def test_train_then_evaluate_then_predict(tmp_path):
    tiny_vqa.prepare(tmp_path)
    run = tmp_path / "run"
    trained = call("launchers/train.py", "--recipe", tmp_path / "recipe.yaml", "--set", "optim.max_steps=3")
    assert trained.returncode == 0, trained.stderr[-3000:]

    evaluated = call("launchers/evaluate.py", "--run", run, "--split", "val")
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    (report,) = json.loads((run / "evaluation-val.json").read_text())
    rows = [json.loads(line) for line in (run / "predictions-val.jsonl").read_text().splitlines()]
    # 7 samples with 1 to 3 questions, each once
    asked = [len(tiny_vqa.sample(1000 + i).record["questions"]) for i in range(7)]
    assert report["samples"] == 7 and len(rows) == report["rows"] == sum(asked)
    right = sum(row["prediction"] in row["answers"] for row in rows)
    assert report["scores"]["accuracy"] == pytest.approx(right / len(rows))
    assert "majority" in report["baselines"] and "majority" in evaluated.stdout and "this run" in evaluated.stdout
    logged = json.loads((run / "finished.json").read_text())["metrics"]["best"]
    assert report["scores"]["accuracy"] == pytest.approx(logged), "what training saw is what evaluation sees"

    picture = tmp_path / "new.png"
    picture.write_bytes(tiny_vqa.png(5))
    predicted = call(
        "launchers/predict.py", "--adapter", run / "adapter", "--images", picture, "--text", "is it red ?",
        "--text", "what is it ?", "--out", tmp_path / "answers.jsonl",
    )  # fmt: skip
    assert predicted.returncode == 0, predicted.stderr[-3000:]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [a["text"] for a in answers] == ["is it red ?", "what is it ?"]
    assert all(a["image"] == str(picture) and a["prediction"] in tiny_vqa.LABELS for a in answers)


@pytest.mark.distributed
def test_a_run_that_does_not_improve_stops_early_and_is_finished(tmp_path):
    tiny_vqa.prepare(tmp_path)
    sets = ["optim.lr=1e-12", "engine.patience=2", "engine.eval_every=1"]
    words = [word for s in sets for word in ("--set", s)]
    trained = call("launchers/train.py", "--recipe", tmp_path / "recipe.yaml", *words)
    assert trained.returncode == 0, trained.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]  # of ten: the first evaluation is the best so far, two do not improve on it
    final = json.loads((tmp_path / "run" / "finished.json").read_text())["metrics"]
    assert final["best_step"] == 1 and (tmp_path / "run" / "adapter").is_dir()
    words[3] = "engine.patience=4"  # more of it: the same run goes on from where it stopped
    again = call("launchers/train.py", "--recipe", tmp_path / "recipe.yaml", *words)
    assert again.returncode == 0, again.stderr[-3000:]
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
