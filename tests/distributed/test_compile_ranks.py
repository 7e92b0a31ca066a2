"""`engine.compile` in a run: the losses of the uncompiled run, and exit code 2 where it cannot work."""

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT, launch
from tests.helpers.runs import tiny_vqa

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def recipe(folder: Path, name: str, **changes) -> Path:
    """Writes FOLDER/NAME.yaml, whose run directory is FOLDER/NAME."""
    raw = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"run_dir": str(folder / name)}
    raw["method"] = {"name": "routed_lora", "r": 2, "alpha": 4, "route": "mul"}
    raw["engine"] |= {"deepspeed": "ds_configs/zero1.json", "dtype": "float32"}
    raw["optim"] = {"lr": 0.01, "max_steps": 2}
    for key, value in changes.items():
        section, _, option = key.partition("__")
        raw[section][option] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_compiled_run_on_two_ranks_gives_the_losses_of_an_uncompiled_one(tmp_path):
    tiny_vqa.prepare(tmp_path)
    paths = recipe(tmp_path, "eager"), recipe(tmp_path, "compiled", engine__compile=True)
    result = launch.run_forked("tests.helpers.rank_scripts.train_recipes", *map(str, paths), ranks=2)
    assert result.code == 0, result.tail()
    eager, compiled = (
        [json.loads(line) for line in (path.with_suffix("") / "metrics.jsonl").read_text().splitlines()]
        for path in paths
    )
    assert len(eager) == 2
    assert [r["loss"] for r in compiled] == pytest.approx([r["loss"] for r in eager], abs=1e-6)
    assert [r["grad_norm"] for r in compiled] == pytest.approx([r["grad_norm"] for r in eager], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        ({"engine__deepspeed": "ds_configs/zero3.json"}, 2, "ZeRO stage 3"),
        ({"data__pack": 512}, 0, "packed texts begin"),
        ({"method__name": "lora"}, 2, "no arithmetic of its own"),
    ],
)
def test_what_cannot_be_compiled_ends_with_code_2(tmp_path, changes, ranks, words):
    tiny_vqa.prepare(tmp_path)
    path = recipe(tmp_path, "refused", engine__compile=True, **changes)
    if changes.get("method__name"):
        raw = yaml.safe_load(path.read_text()) | {"method": {"name": "lora", "r": 2}}
        path.write_text(yaml.safe_dump(raw))
    check = [] if ranks else ["--check"]
    result = launch.run_forked(ROOT / "launchers" / "train.py", "--recipe", str(path), *check, ranks=ranks)
    assert set(result.codes) == {2}, result.tail()
    lines = [line for line in result.output.splitlines() if "error: " in line]
    assert len(lines) == 1 and "engine.compile" in lines[0] and words in lines[0], result.tail()
    assert "Traceback" not in result.output, result.tail()
