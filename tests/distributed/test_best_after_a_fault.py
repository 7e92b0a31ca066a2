"""The best checkpoint of a run whose disk was full once: what its state calls the best is what `best` names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mmpeft_ds.engine import checkpoint_files
from tests.helpers import launch
from tests.helpers.runs import endless

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.passing_fault"
# Steps between saves and between evaluations, the best of which is saved too. The first best is that of step 2.
CASES = {
    "with": {"save_every": 2, "save_in_background": True},
    "between": {"save_every": 4},
    "between-behind": {"save_every": 4, "save_in_background": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    plain, paths = endless.prepare(folder, eval_every=2, keep_last=9), []
    for name, engine in CASES.items():
        raw = yaml.safe_load(plain.read_text())
        raw["run_dir"] = str(folder / name)
        raw["optim"]["max_steps"] = 6
        raw["engine"] |= engine
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(raw))
    result = launch.run_forked(SCRIPT, *map(str, paths), ranks=2, timeout=200)
    assert result.code == 0, result.tail()
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_state_and_the_pointer_name_the_same_step_though_the_first_save_of_the_best_failed(runs, name):
    first, second = json.loads((runs / f"{name}.ends").read_text())
    assert "No space left on device" in first and second == "0"
    for start in (1, 2):
        folder = runs / f"{name}.{start}"
        latest = folder / (folder / "latest").read_text().strip()
        step = int(latest.name.removeprefix("step-"))
        state = checkpoint_files.evaluated(latest, step) or checkpoint_files.read_json(latest, "state")["state"]
        pointer = folder / "best"
        named = int(pointer.read_text().strip().removeprefix("step-")) if pointer.is_file() else None
        assert (state["best_step"] if state["best"] is not None else None) == named
