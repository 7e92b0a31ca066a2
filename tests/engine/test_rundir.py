"""The run directory: new, continued, finished, or refused with the differing keys."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import yaml

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.engine import checkpoint_files, identities, rundir
from mmpeft_ds.engine.rundir import RunDir
from mmpeft_ds.errors import BadInput
from tests.helpers import ROOT
from tests.helpers.data import tiny_features
from tests.helpers.runs.run_directories import RECIPE, saved_after_5, started, write_events


def changed(**keys) -> dict:
    """RECIPE with `section__key=value`."""
    recipe = copy.deepcopy(RECIPE)
    for key, value in keys.items():
        section, _, name = key.partition("__")
        recipe[section] = {**recipe[section], name: value} if name else value
    return recipe


def test_a_new_run_writes_its_recipe(tmp_path):
    run = RunDir.open(tmp_path / "a", RECIPE)
    assert run.resume_from is None
    assert run.opening_words(0, 40, world_size=1, stage=3).endswith("begins, 40 steps, on 1 rank at ZeRO-3")
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["optim"]["betas"] == [0.9, 0.999]
    run.close()


def test_the_same_recipe_continues(tmp_path):
    started(tmp_path / "a")
    run = RunDir.open(tmp_path / "a", RECIPE)
    assert run.resume_from.name == "step-00000005" and run.differing == ()
    words = run.opening_words(5, 40, world_size=3, stage=1)
    assert words == f"{tmp_path / 'a'}: continues after step 5 of 40, on 3 ranks at ZeRO-1"
    run.close()


@pytest.mark.parametrize(
    ("total", "says"),
    [
        (40, "after step 5 of 40"),
        (5, "after all its 5 steps: nothing"),
        (1, "its 5 steps, and 1 are asked for: nothing"),
    ],
)
def test_a_run_that_has_made_its_steps_is_not_said_to_train(tmp_path, total, says):
    started(tmp_path / "a")
    run = RunDir.open(tmp_path / "a", RECIPE)
    assert says in run.opening_words(5, total, world_size=1, stage=3)
    run.close()
    with mock.patch.object(rundir, "_state", lambda newest: {"step": 5}):
        assert says in rundir.preview(tmp_path / "a", RECIPE, total)[-1]


@pytest.mark.parametrize(
    "change",
    [
        {"optim__epochs": 3},
        {"optim__max_steps": 7},
        {"engine__deepspeed": "ds_configs/zero1.json"},
        {"engine__eval_every": 2},
        {"engine__adapter_matmul": "bfloat16"},
        {"data__workers": 0},
        {"data__max_bad_fraction": 0.5},
        {"data__evaluation_batch": 2},
        {"monitor__every": 5},
        {"run_dir": "elsewhere"},
    ],
)
def test_length_zero_json_workers_and_logging_may_change(tmp_path, change):
    started(tmp_path / "a")
    run = RunDir.open(tmp_path / "a", changed(**change))
    assert run.resume_from is not None and len(run.differing) == 1
    assert run.opening_words(5, 40, 2, 3).endswith(f"; changed: {run.differing[0]}")
    run.close()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optim__lr": 0.1}, "optim.lr: 0.001 -> 0.1"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"data__global_batch": 4}, "data.global_batch: 8 -> 4"),
        ({"data__sources": [{"dir": "data/b", "weight": 1.0}]}, "data.sources.0.dir: data/a -> data/b"),
        ({"engine__dtype": "bfloat16"}, "engine.dtype: float32 -> bfloat16"),
        ({"engine__new": 1}, "engine.new: absent -> 1"),
    ],
)
def test_anything_else_is_refused_with_the_key_and_both_values(tmp_path, change, told):
    started(tmp_path / "a")
    with pytest.raises(BadInput) as refused:
        RunDir.open(
            tmp_path / "a", changed(**change, optim__epochs=9) if "optim__lr" not in change else changed(**change)
        )
    assert told in str(refused.value) and "optim.epochs" not in str(refused.value)
    RunDir.open(tmp_path / "a", RECIPE).close()  # a refused attempt leaves neither a lock nor another recipe
    assert yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())["seed"] == 0


def test_fresh_takes_a_new_directory_and_leaves_the_old_one(tmp_path):
    started(tmp_path / "a")
    before = sorted(p.name for p in (tmp_path / "a").rglob("*"))
    for expected in ("a-1", "a-2"):
        run = RunDir.open(tmp_path / "a", changed(seed=4), fresh=True)
        assert run.path == tmp_path / expected and run.resume_from is None
        run.close()
    assert sorted(p.name for p in (tmp_path / "a").rglob("*")) == before


def test_a_place_that_cannot_be_written_is_refused_and_check_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for start in (lambda path: RunDir.open(path, RECIPE), lambda path: rundir.preview(path, RECIPE, 10)):
        with pytest.raises(BadInput, match=r"file/a: .*file is a file"):
            start(tmp_path / "file" / "a")
        with pytest.raises(BadInput, match=r"run_dir /proc/run: /proc cannot be written .No such file"):
            start(Path("/proc/run"))  # where root has the permission
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "TemporaryFile", mock.Mock(side_effect=PermissionError(errno.EROFS, "read-only")))
            with pytest.raises(BadInput, match="cannot be written"):
                start(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_a_directory_with_other_things_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(BadInput, match="not a run's"):
        RunDir.open(tmp_path / "photos", RECIPE)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is a file"):
        RunDir.open(tmp_path / "file", RECIPE)


def test_an_adapter_directory_is_not_overwritten_by_a_run(tmp_path):
    for name in ("recipe.yaml", "adapter_config.json"):
        (tmp_path / name).touch()
    with pytest.raises(BadInput, match="is an adapter directory, which a run would overwrite"):
        RunDir.open(tmp_path, RECIPE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "recipe.yaml"]


def test_a_checkpoint_whose_file_became_a_pipe_gives_way_to_the_one_before(tmp_path):
    started(tmp_path / "a")
    (checkpoint_of,) = (tmp_path / "a" / "checkpoints").glob("step-*")
    shutil.copytree(checkpoint_of, checkpoint_of.with_name("step-00000009"))
    for name in ("state.json", checkpoint_files.CHECKSUMS):
        path = checkpoint_of.with_name("step-00000009") / name
        path.unlink()
        os.mkfifo(path)
        assert checkpoint_files.newest(checkpoint_of.parent) == checkpoint_of


def test_a_start_removes_what_a_killed_one_was_writing_and_nothing_else(tmp_path):
    started(tmp_path / "a")
    write_events(tmp_path / "a" / "tensorboard", range(1, 3), 1.0)
    torn = [".recipe.yaml.12.tmp", ".metrics.jsonl.12.tmp", "checkpoints/.latest.12.tmp", "tensorboard/.e.partial.0"]
    torn.append("checkpoints/step-00000005/.evaluated.json.12.tmp")
    foreign = [".scores.json.12.tmp", "notes.tmp"]
    before = {path for path in (tmp_path / "a").rglob("*")}
    for name in (*torn, *foreign):
        (tmp_path / "a" / name).touch()
    RunDir.open(tmp_path / "a", RECIPE).close()
    assert {path for path in (tmp_path / "a").rglob("*")} == before | {tmp_path / "a" / name for name in foreign}


def test_a_finished_run_says_so_unless_it_is_made_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "whole", lambda directory: directory)
    run = RunDir.open(tmp_path / "a", RECIPE)
    assert run.finished(10) is None
    run.finish(10, {"accuracy": 0.5}, "the table")
    assert run.finished(10)["table"] == "the table"
    assert run.finished(20) is None
    run.truncate(5)
    assert run.finished(10) is None
    run.close()


def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "whole", lambda directory: directory)
    run = RunDir.open(tmp_path / "a", RECIPE)
    run.finish(10, {"accuracy": 0.5}, "the table", patience=2)
    assert run.finished(10, patience=2)["table"] == "the table"
    assert run.finished(10, patience=1) is not None
    assert run.finished(10, patience=3) is None
    assert run.finished(10, patience=0) is None  # never stop early
    run.finish(10, {"accuracy": 0.5}, "the table")  # all steps are taken: patience has no say
    assert run.finished(10, patience=3) is not None
    run.close()


@pytest.mark.parametrize("content", ["[1]", '{"total_steps": "many", "table": ""}', '{"total_steps": 10}', "{", "3"])
def test_a_finished_json_of_another_form_is_as_good_as_none(tmp_path, content):
    run = RunDir.open(tmp_path / "a", RECIPE)
    (tmp_path / "a" / "finished.json").write_text(content)
    assert run.finished(10) is None
    run.close()


def test_a_finished_run_without_its_adapter_exports_it_again_or_says_that_it_cannot(tmp_path, caplog):
    run = RunDir.open(tmp_path / "a", RECIPE)
    run.finish(10, {}, "the table")
    with pytest.raises(BadInput, match="its adapter is not whole and there is no checkpoint"):
        run.finished(10)
    run.resume_from = tmp_path / "a" / "checkpoints" / "step-00000010"
    assert run.finished(10) is None and "exported again from checkpoint step-00000010" in caplog.text
    run.close()


MOVED = "data.sources.0.dir"


@pytest.mark.parametrize(
    "now, message",
    [
        ({MOVED: "same"}, None),
        ({}, r"data\.sources\.0\.dir: old -> new"),
        ({MOVED: "other"}, "names other data than this run was trained on"),
    ],
)
def test_the_same_data_at_another_path_continues_and_other_data_at_the_same_path_does_not(tmp_path, now, message):
    def recipe(place):
        return RECIPE | {"data": {"sources": [{"dir": place}]}}

    run = saved_after_5(tmp_path / "a", recipe("old"), {rundir.IDENTITIES: {MOVED: "same"}})
    if message is None:
        opened = RunDir.open(run, recipe("new"), identities=now)
        assert opened.differing == ("data.sources.0.dir: old -> new",) and opened.resume_from.name == "step-00000005"
        opened.close()
        return
    with pytest.raises(BadInput, match=message):
        RunDir.open(run, recipe("new"), identities=now)


def test_a_checkpoint_that_noted_no_data_goes_on_where_its_old_path_holds_the_same(tmp_path):
    manifest = tiny_features.write_features(tmp_path / "old", [tiny_features.sample(i) for i in range(8)])
    tiny_features.write_features(tmp_path / "other", [tiny_features.sample(i) for i in range(9)])
    shutil.copytree(tmp_path / "old", tmp_path / "new")

    def recipe(name):
        return RECIPE | {"data": {"sources": [{"dir": str(tmp_path / name), "split": "train"}]}}

    def opened(name):
        now = {MOVED: identities._of_data(Manifest.load(tmp_path / name), "train")}
        return RunDir.open(run, recipe(name), identities=now)

    assert manifest.name == "toy"
    run = saved_after_5(tmp_path / "a", recipe("old"), {})
    opened("new").close()
    with pytest.raises(BadInput, match="names other data than this run was trained on"):
        opened("other")
    (tmp_path / "old").rename(tmp_path / "away")
    with pytest.raises(BadInput, match=r"data\.sources\.0\.dir: .* What has only moved is known .*ln -s NEW OLD"):
        opened("new")
    (tmp_path / "old").symlink_to(tmp_path / "away")
    opened("new").close()


def test_a_run_from_before_an_option_with_another_value_than_its_default_says_what_changed(tmp_path):
    now = recipes.to_dict(recipes.filled(recipes.load(ROOT / "recipes" / "lora_llava15_instruct.yaml", [])))
    before = copy.deepcopy(now)
    del before["backbone"]["image_backend"]
    run = saved_after_5(tmp_path / "a", before, {})
    with contextlib.closing(RunDir.open(run, now)) as opened:
        assert opened.differing == ("backbone.image_backend: pil -> torchvision",)
    now["backbone"]["image_backend"] = "pil"
    with contextlib.closing(RunDir.open(run, now)) as opened:
        assert opened.differing == ()
