"""Run directories that an earlier version wrote are still read: README.md beside this file says how they were made."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmpeft_ds import adapter
from mmpeft_ds.engine.assembly.forward import answer
from tests.helpers.runs import tiny_vqa

HERE = Path(__file__).resolve().parent
RUNS = ("composed", "features")
CONTINUE = """
import os, sys
from mmpeft_ds import recipe
from mmpeft_ds.engine import trainer
for name in sys.argv[1:]:
    os.chdir(name)
    assert trainer.run(recipe.load("recipe.yaml", ["optim.max_steps=6"])) == 0
"""


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Path:
    """The run directories, copied, each continued by three steps; `untouched` holds them as they were."""
    out = tmp_path_factory.mktemp("old")
    for name in RUNS:
        shutil.copytree(HERE / name, out / name)
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CONTINUE, *(str(out / name) for name in RUNS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def expected(name: str) -> dict:
    return json.loads((HERE / name / "expected.json").read_text())


def questions(name: str) -> tuple[list, list]:
    """As make.py asked them."""
    if name == "composed":
        return [tiny_vqa.png(i) for i in range(2000, 2004)], [tiny_vqa.QUESTIONS[: 1 + i % 3] for i in range(4)]
    drawn = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(3))
    return list(drawn), [""] * 5


@torch.no_grad()
def logits(loaded: adapter.Loaded, name: str) -> torch.Tensor:
    batch = loaded.batch(*questions(name))
    return answer(loaded.model, loaded.backbone, loaded.task, batch).logits


@pytest.mark.parametrize("name", RUNS)
def test_an_old_adapter_directory_gives_the_answers_that_it_gave(name, monkeypatch):
    monkeypatch.chdir(HERE / name)  # its recipe names the base model relative to there
    loaded = adapter.load("run/adapter")
    then = torch.tensor(expected(name)["logits"])
    assert loaded.labels == expected(name)["labels"]
    assert torch.allclose(logits(loaded, name), then, atol=1e-5)
    rows = loaded.predict(*questions(name))
    assert [row["prediction"] for row in rows] == expected(name)["predictions"]
    with loaded.model.disable_adapter():  # the numbers above say something about the adapter
        assert not torch.allclose(logits(loaded, name), then, atol=1e-2)


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_goes_on_from_its_checkpoint_as_the_old_version_did(copies, name):
    then = expected(name)
    rows = [json.loads(line) for line in (copies / name / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {str(r["step"]): r["loss"] for r in rows} == pytest.approx(then["losses"], rel=1e-5)
    assert {str(r["step"]): r["grad_norm"] for r in rows} == pytest.approx(then["gradient_norms"], rel=1e-4)
    checkpoints = copies / name / "run" / "checkpoints"
    newest = checkpoints / (checkpoints / "latest").read_text().strip()
    norms = {key: t.double().norm().item() for key, t in load_file(newest / "weights.safetensors").items()}
    assert norms == pytest.approx(then["weight_norms"], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_the_stored_checkpoint_is_one_of_the_old_version(name):
    """Else the tests above would compare this version with itself."""
    assert not (HERE / name / "run" / ".lock").exists()
    state = json.loads(next((HERE / name / "run").glob("checkpoints/step-00000003*/state.json")).read_text())
    assert state["format"] == 1 and state["state"]["step"] == 3
