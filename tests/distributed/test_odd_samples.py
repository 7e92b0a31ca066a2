"""Samples that fail only together, on real ranks: the run goes on, and names them."""

import json

import numpy as np
import pytest

from data_prep import prepare
from tests.helpers import ROOT, launch
from tests.helpers.models import tiny_clip_bart

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SAMPLES, ODD = 16, 5


@pytest.fixture
def folder(tmp_path):
    """Stored grids of nine places, one of four, and a sample with more images than the model tells apart."""
    tiny_clip_bart.write_bart(tmp_path / "bart")
    lines = []
    for i in range(SAMPLES):
        side = 2 if i == ODD else 3
        np.save(tmp_path / f"{i}.npy", tiny_clip_bart.grid(i, side).numpy())
        features = [f"{i}.npy"] * (4 if i == ODD + 1 else 1)
        asked = {"question": "what is it", "answer": ["red", "blue"][i % 2], "question_id": i}
        lines.append({"features": features, "questions": [asked]})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [str(tmp_path / "train.jsonl")]
    prepare.main(["jsonl", "--out", str(tmp_path / "data"), "--processes", "1", "--train", *files, "--val", *files,
                  "--features-are", "grid"])  # fmt: skip
    recipe = {
        "run_dir": str(tmp_path / "run"),
        "data": {
            "sources": [{"dir": str(tmp_path / "data"), "task": {"name": "answering", "max_new_tokens": 2}}],
            "validation": [
                {"dir": str(tmp_path / "data"), "split": "val", "task": {"name": "answering", "max_new_tokens": 2}}
            ],
            "global_batch": 8,
            "workers": 1,
            "max_bad_fraction": 0.2,
        },
        "backbone": {
            "name": "clip_bart",
            "text": str(tmp_path / "bart"),
            "feature_width": tiny_clip_bart.FEATURES,
            "grid": 0,
            "order_tokens": 9,
        },
        "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]},
        "optim": {"epochs": 2},
        "engine": {"deepspeed": str(ROOT / "ds_configs" / "zero2.json")},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    return tmp_path


def test_two_ranks_train_and_evaluate_past_samples_that_do_not_go_with_the_others(folder):
    result = launch.run(ROOT / "launchers" / "train.py", "--recipe", folder / "recipe.yaml", ranks=2, timeout=300.0)
    assert result.code == 0 and not result.killed, result.tail()
    assert f"bad sample jsonl/train-{ODD:09d}" in result.output and "cannot be packed" in result.output
    assert f"bad sample train-{ODD + 1:09d}" in result.output and "4 images" in result.output
    evaluate = ["--run", folder / "run", "--split", "val", "--submission", "vqa"]
    result = launch.run(ROOT / "launchers" / "evaluate.py", *evaluate, ranks=2, timeout=300.0)
    assert result.code == 0 and not result.killed, result.tail()
    (report,) = json.loads((folder / "run" / "evaluation-val.json").read_text())
    assert (report["scored"], report["bad_samples"]) == (SAMPLES - 2, 2)
    submitted = json.loads((folder / "run" / "submission-val-vqa.json").read_text())
    assert [item["question_id"] for item in submitted] == list(range(SAMPLES)), "the order of the split, bad ones too"
    assert not submitted[ODD]["answer"] and not submitted[ODD + 1]["answer"]
    assert "2 items without a prediction have an empty one" in result.output
