"""A file system without room, and directories that are gone, through real ranks: one line, exit code 2, and the same
command goes on when there is room again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT, launch
from tests.helpers.runs import tiny_vqa
from tests.helpers.small_disk import fill, mounted

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TRAIN = ROOT / "launchers" / "train.py"
EXACT = ("step", "loss", "grad_norm", "sample_keys_hash")
LIMIT = 400.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("full")
    tiny_vqa.prepare(path)
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    recipe["engine"] |= {"save_every": 2, "deepspeed": "ds_configs/zero2.json"}
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def small(tmp_path) -> Iterator[Path]:
    with mounted(tmp_path / "small") as place:
        yield place


def train(folder: Path, run: Path, *sets: str, ranks: int = 2) -> launch.Result:
    given = [f"run_dir={run}", *sets]
    words = [word for one in given for word in ("--set", one)]
    return launch.run_forked(TRAIN, "--recipe", str(folder / "recipe.yaml"), *words, ranks=ranks, timeout=LIMIT)


def curve(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in EXACT) for row in rows]


@pytest.fixture(scope="module")
def untouched(folder) -> Path:
    done = train(folder, folder / "untouched")
    assert done.code == 0, done.tail()
    return folder / "untouched"


def refused(done: launch.Result) -> str:
    """The one line of a command that could not write."""
    assert set(done.codes) == {2} and "Traceback" not in done.output, done.tail()
    (line,) = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert "cannot be written (No space left on device)" in line and "the same command continues" in line
    return line


@pytest.mark.parametrize(
    ("share", "background"), [(0.02, False), (0.3, True), (0.7, False), (0.7, True), (0.97, True)]
)
def test_a_run_that_finds_no_room_goes_on_where_it_was(folder, untouched, small, share, background):
    size = sum(p.stat().st_size for p in untouched.rglob("*") if p.is_file())
    run = small / "run"
    ballast = fill(small, int(share * size))
    line = refused(train(folder, run, f"engine.save_in_background={background}".lower()))
    print(line)
    assert not [p for p in run.rglob("*") if "partial" in p.name or p.name.endswith(".tmp")], "nothing half-written"
    ballast.unlink()
    done = train(folder, run)
    assert done.code == 0, done.tail()
    assert curve(run) == curve(untouched)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / "adapter" / name).read_bytes() == (untouched / "adapter" / name).read_bytes()


def test_checkpoints_written_in_the_background_are_those_of_the_foreground(folder, untouched):
    run = folder / "in the background"
    done = train(folder, run, "engine.save_in_background=true")
    assert done.code == 0, done.tail()
    assert curve(run) == curve(untouched)
    written, expected = (sorted((place / "checkpoints").iterdir()) for place in (run, untouched))
    assert [path.name for path in written] == [path.name for path in expected]
    for one, other in zip(written, expected, strict=True):
        if one.is_file():
            assert one.read_bytes() == other.read_bytes()
            continue
        for name in ("weights.safetensors", "optimizer.safetensors"):
            assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_finished_run_whose_adapter_is_gone_exports_it_again_with_its_loss(folder, untouched):
    run = folder / "exported again"
    shutil.copytree(untouched, run)
    shutil.rmtree(run / "adapter")
    done = train(folder, run)
    assert done.code == 0 and "exported again" in done.output, done.tail()
    weights = "adapter/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (untouched / weights).read_bytes() and curve(run) == curve(untouched)
    loss = json.loads((run / "finished.json").read_text())["metrics"]["train_loss"]
    assert loss == json.loads((untouched / "finished.json").read_text())["metrics"]["train_loss"] is not None


def test_data_and_base_at_another_place_continue_the_run_and_other_data_does_not(folder, untouched, tmp_path):
    run, there = tmp_path / "run", tmp_path / "moved"
    assert train(folder, run, "optim.max_steps=4").code == 0
    for part in ("data", "vision", "text"):
        shutil.copytree(folder / part, there / part)
    places = [f"data.{role}.0.dir={there / 'data'}" for role in ("sources", "validation")]
    places += [f"backbone.{tower}={there / tower}" for tower in ("vision", "text")]
    done = train(folder, run, *places)
    assert done.code == 0 and "continues after step 4" in done.output, done.tail()
    assert [row[0] for row in curve(run)] == [row[0] for row in curve(untouched)]
    shutil.rmtree(there / "data")
    tiny_vqa.write_data(there / "data", answer=int.__sub__)
    manifest = json.loads((there / "data" / "manifest.json").read_text())
    manifest["statistics"] = json.loads((folder / "data" / "manifest.json").read_text())["statistics"]
    (there / "data" / "manifest.json").write_text(json.dumps(manifest))
    done = train(folder, run, *places, "optim.epochs=3")
    assert set(done.codes) == {2} and "names other data than this run was trained on" in done.output, done.tail()
