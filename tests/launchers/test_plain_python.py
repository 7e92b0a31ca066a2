"""Train, evaluate and predict without any launcher in front: plain `python`, one rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, launch
from tests.helpers.runs import tiny_vqa

TRAIN, EVALUATE, PREDICT = (ROOT / "launchers" / f"{name}.py" for name in ("train", "evaluate", "predict"))


def python(script: Path, *args: str) -> launch.Result:
    """`python script args` in a process of its own, as a user types it: no rank, and no search path but its own."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")
    environment = {k: v for k, v in launch.environment().items() if k not in hidden}
    command = [sys.executable, str(script), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return launch.Result(done.returncode, done.stdout + done.stderr)


@pytest.mark.distributed
def test_train_then_evaluate_then_predict(tmp_path):
    tiny_vqa.prepare(tmp_path)
    run = tmp_path / "run"
    limit = ("--set", "data.sources.0.task.max_questions=1")  # of training; evaluation asks all questions
    trained = python(TRAIN, "--recipe", str(tmp_path / "recipe.yaml"), "--set", "optim.max_steps=3", *limit)
    assert trained.code == 0, trained.tail()

    assert "best accuracy" in trained.output and "majority" in trained.output, "scores stand beside a baseline"

    evaluated = launch.run_forked(EVALUATE, "--run", str(run), ranks=0)  # val, since there is no test split
    assert evaluated.code == 0, evaluated.tail()
    (report,) = json.loads((run / "evaluation-val.json").read_text())
    rows = [json.loads(line) for line in (run / "predictions-val.jsonl").read_text().splitlines()]
    # 7 samples with 1 to 3 questions, each once
    asked = [len(tiny_vqa.sample(1000 + i).record["questions"]) for i in range(7)]
    assert report["samples"] == 7 and len(rows) == report["rows"] == sum(asked)
    assert report["scored"] == report["there"] == len(rows) and report["unit"] == "questions"
    counted = f"{len(rows)} of {len(rows)} questions"
    assert counted in " ".join(evaluated.output.split()) and counted in " ".join(trained.output.split())
    right = sum(row["prediction"] in row["answers"] for row in rows)
    assert report["scores"]["accuracy"] == pytest.approx(right / len(rows))
    assert "majority" in report["baselines"] and "majority" in evaluated.output and "this run" in evaluated.output
    logged = json.loads((run / "finished.json").read_text())["metrics"]["best"]
    assert report["scores"]["accuracy"] == pytest.approx(logged), "what training saw is what evaluation sees"

    picture = tmp_path / "new.png"
    picture.write_bytes(tiny_vqa.png(5))
    asked = ["--text", "is it red ?", "--text", "what is it ?", "--out", str(tmp_path / "answers.jsonl")]
    predicted = launch.run_forked(
        PREDICT, "--adapter", str(run / "adapter"), "--images", str(picture), *asked, ranks=0
    )
    assert predicted.code == 0, predicted.tail()
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [a["text"] for a in answers] == ["is it red ?", "what is it ?"]
    assert all(a["image"] == str(picture) and a["prediction"] in tiny_vqa.LABELS for a in answers)


@pytest.mark.distributed
def test_a_run_that_does_not_improve_stops_early_and_is_finished(tmp_path):
    tiny_vqa.prepare(tmp_path)
    sets = ["optim.lr=1e-12", "engine.patience=2", "engine.eval_every=1"]
    words = [word for s in sets for word in ("--set", s)]
    trained = launch.run_forked(TRAIN, "--recipe", str(tmp_path / "recipe.yaml"), *words, ranks=0)
    assert trained.code == 0, trained.tail()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]  # of ten: the first evaluation is the best so far, two do not improve on it
    final = json.loads((tmp_path / "run" / "finished.json").read_text())["metrics"]
    assert final["best_step"] == 1 and (tmp_path / "run" / "adapter").is_dir()
    words[3] = "engine.patience=4"  # more of it: the same run goes on from where it stopped
    again = launch.run_forked(TRAIN, "--recipe", str(tmp_path / "recipe.yaml"), *words, ranks=0)
    assert again.code == 0, again.tail()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
