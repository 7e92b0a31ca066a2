"""Runs that keep what frozen towers give: the same losses bit for bit, whoever wrote and whoever reads."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from data_prep.common import feature_moments
from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.engine import frozen_images, plan
from mmpeft_ds.engine.assembly import resolve
from tests.helpers import launch
from tests.helpers.data.mixed_media import sample
from tests.helpers.data.tiny_shards import write_shards
from tests.helpers.models import tiny_families, tiny_mllm
from tests.helpers.runs import tiny_vqa

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.train_recipes"
IMAGES, STEPS = 30, 5  # of the training split, and of an epoch


def write_recipe(folder: Path, name: str, stage: int, store: str = "", **sections) -> Path:
    """A recipe whose run directory is FOLDER/NAME; `store` is a directory of values."""
    engine = {"deepspeed": f"ds_configs/zero{stage}.json", **sections.pop("engine", {})}
    engine |= {"cache_frozen": {"dir": str(folder / store)}} if store else {}
    optim = {"epochs": 2, **sections.pop("optim", {})}
    made = tiny_vqa.recipe(folder, run_dir=str(folder / name), engine=engine, optim=optim, **sections)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipes.to_dict(made)))
    return path


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path, name: str) -> list[float]:
    return [row["loss"] for row in rows(folder, name)]


def computed(folder: Path, name: str) -> list[int]:
    """Images that the tower saw in each epoch."""
    counts = [row["images_computed"] for row in rows(folder, name)]
    return [sum(counts[first : first + STEPS]) for first in range(0, len(counts), STEPS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("frozen_cache")
    tiny_vqa.prepare(path)
    train(2, write_recipe(path, "plain3", 3), write_recipe(path, "kept3", 3, "store3"))
    return path


@pytest.fixture(scope="module")
def more(folder) -> Path:
    """Further runs, in the same folder."""
    train(
        2,
        write_recipe(folder, "plain1", 1),
        write_recipe(folder, "kept1", 1, "store1"),
        write_recipe(folder, "again1", 1, "store1", data={"workers": 1}),
        write_recipe(folder, "again3", 3, "store1", data={"workers": 1}),
    )
    train(1, write_recipe(folder, "one_plain", 1), write_recipe(folder, "one_kept", 1, "store3"))
    return folder


def train(ranks: int, *recipes_: Path) -> None:
    result = launch.run_forked(SCRIPT, *map(str, recipes_), ranks=ranks)
    assert result.code == 0, result.tail()


def test_at_zero_3_losses_are_the_same_to_the_bit_and_the_tower_sees_each_image_once(folder):
    assert losses(folder, "kept3") == losses(folder, "plain3")
    assert len(losses(folder, "kept3")) == 2 * STEPS
    assert computed(folder, "kept3") == [IMAGES, 0]


def test_evaluation_reads_and_fills_the_store_and_gives_the_same_scores(folder):
    scores = [json.loads((folder / name / "adapter" / "metrics.json").read_text()) for name in ("plain3", "kept3")]
    assert scores[0]["best"] == scores[1]["best"]
    (store,) = (folder / "store3").iterdir()
    assert len(list(store.glob("*.index"))) == len(list((folder / "data").glob("*.tar")))


@pytest.mark.slow
def test_at_zero_1_as_at_zero_3(more):
    assert losses(more, "kept1") == losses(more, "plain1")
    assert computed(more, "kept1") == [IMAGES, 0]


@pytest.mark.slow
def test_a_bfloat16_base_gives_the_same_losses_to_the_bit_which_are_not_those_of_float32(folder):
    half = {"dtype": "bfloat16"}
    recipes_ = {
        f"half_{name}{stage}": write_recipe(folder, f"half_{name}{stage}", stage, store, engine=dict(half))
        for stage in (1, 3)
        for name, store in (("plain", ""), ("kept", f"half_store{stage}"))
    }
    train(1, *recipes_.values(), write_recipe(folder, "full", 1))
    for stage in (1, 3):
        assert losses(folder, f"half_kept{stage}") == losses(folder, f"half_plain{stage}")
        assert computed(folder, f"half_kept{stage}") == [IMAGES, 0]
        assert losses(folder, f"half_kept{stage}") != pytest.approx(losses(folder, "full"), abs=1e-6)


def write_talks(folder: Path, name: str, model: Path, videos: str = "videos", store: str = "") -> Path:
    """A recipe that trains a multimodal language model on FOLDER/mixed."""
    source = {"dir": str(folder / "mixed"), "split": "train", "task": {"name": "instruction"}}
    kept = {"cache_frozen": {"dir": str(folder / store)}} if store else {}
    raw = {
        "run_dir": str(folder / name),
        "backbone": {"name": "mllm", "model": str(model), "max_text_length": 128, "videos": videos},
        "method": {"name": "lora", "r": 2, "target_modules": r".*language_model.*\.q_proj"},
        "data": {"sources": [source], "global_batch": 6, "workers": 0},
        "optim": {"lr": 0.01, "epochs": 2},
        "engine": {"deepspeed": "ds_configs/zero1.json", "threads": 1, **kept},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_samples_with_videos_train_as_without_a_store_and_pictures_of_others_are_kept(tmp_path, family):
    draw = random.Random(3)
    drawn = [sample(i, draw) for i in range(24)]
    write_shards(tmp_path / "mixed", drawn, per_shard=5, name="mixed")
    model = tmp_path / family
    (tiny_mllm if family in tiny_mllm.FAMILIES else tiny_families).write(model, family)
    train(1, write_talks(tmp_path, "plain", model), write_talks(tmp_path, "kept", model, store="store"))
    assert losses(tmp_path, "kept") == losses(tmp_path, "plain")
    with_videos = [s for s in drawn if "videos" in s.record]
    frames = sum(len(video["times"]) for s in with_videos for video in s.record["videos"])
    again = sum(len(s.images) for s in with_videos) - frames
    counts = [row["images_computed"] for row in rows(tmp_path, "kept")]
    assert sum(counts[4:]) == again < sum(counts[:4])


@pytest.mark.slow
def test_a_run_that_reads_frames_as_images_takes_no_record_of_one_that_reads_videos(tmp_path):
    draw = random.Random(3)
    drawn = [sample(i, draw) for i in range(24)]
    # of a picture and a video the first run stores the picture alone; frames can stand after pictures only
    readable = [s for s in drawn if "<video>\n<image>" not in s.record["conversations"][0]["value"]]
    assert any("<image>\n<video>" in s.record["conversations"][0]["value"] for s in readable)
    write_shards(tmp_path / "mixed", readable, per_shard=5, name="mixed")
    tiny_mllm.write(tmp_path / "model", "qwen2_vl")
    of_videos = write_talks(tmp_path, "of_videos", tmp_path / "model", "videos", "store")
    of_frames = write_talks(tmp_path, "of_frames", tmp_path / "model", "images", "store")
    train(1, of_videos, of_frames, write_talks(tmp_path, "plain", tmp_path / "model", "images"))
    assert losses(tmp_path, "of_frames") == losses(tmp_path, "plain")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_later_run_computes_nothing_at_whatever_stage_with_loader_processes(more, stage):
    assert losses(more, f"again{stage}") == losses(more, f"plain{stage}")
    assert computed(more, f"again{stage}") == [0, 0]


@pytest.mark.slow
def test_one_rank_reads_what_two_have_written(more):
    assert computed(more, "one_kept") == [0, 0]
    assert losses(more, "one_kept") == losses(more, "one_plain")


@pytest.mark.slow
def test_a_damaged_byte_and_values_of_other_weights_are_computed_anew(more):
    (store,) = (more / "store1").iterdir()
    shutil.copytree(more / "store1", more / "damaged")
    file = next((more / "damaged" / store.name).glob("values-*.bin"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    weights = load_file(more / "vision" / "model.safetensors")
    shutil.copytree(more / "vision", more / "other_vision")
    weights = {name: tensor * (1.5 if "encoder" in name else 1.0) for name, tensor in weights.items()}
    save_file(weights, more / "other_vision" / "model.safetensors", {"format": "pt"})
    other = {"vision": str(more / "other_vision"), "feature_norm": "none"}
    train(
        1,
        write_recipe(more, "damaged_kept", 1, "damaged"),
        write_recipe(more, "other_plain", 1, backbone=other),
        write_recipe(more, "other_kept", 1, "store1", backbone=other),
    )
    assert computed(more, "damaged_kept")[0] == 1 and computed(more, "damaged_kept")[1] == 0
    assert losses(more, "damaged_kept") == losses(more, "one_plain")
    assert computed(more, "other_kept") == [IMAGES, 0]
    assert losses(more, "other_kept") == losses(more, "other_plain")
    assert len(list((more / "store1").iterdir())) == 2


@pytest.mark.slow
def test_a_run_that_is_killed_in_its_first_epoch_goes_on_with_what_is_stored(more):
    recipe = write_recipe(more, "killed", 3, "store_killed", engine={"save_every": 1})
    with launch.Launch("launchers/train.py", "--recipe", str(recipe)) as running:
        assert running.wait_for("train: 1 of", 300)
        running.kill()
    stored = sum(f.stat().st_size for f in (more / "store_killed").rglob("values-*.bin"))
    train(2, recipe)
    assert losses(more, "killed") == losses(more, "plain3")
    assert 0 < sum(computed(more, "killed")) <= IMAGES and stored > 0
    counts = [row["images_computed"] for row in rows(more, "killed")]
    assert sum(counts[STEPS:]) == 0


def test_a_method_that_trains_the_vision_tower_is_refused_in_one_line_before_the_ranks_meet(folder):
    path = write_recipe(folder, "refused", 1, "store3", method={"tower": "image"})
    result = launch.run_forked("launchers/train.py", "--recipe", str(path), ranks=1)
    assert result.code == 2
    assert "engine.cache_frozen: routed_lora on vision_text_encoder leaves no frozen tower" in result.output
    assert "Traceback" not in result.output


def test_check_says_the_size_and_writes_nothing(folder):
    path = write_recipe(folder, "checked", 3, "store_checked")
    resolved = resolve.resolve(recipes.load(path))
    report = plan.make(resolved)
    kept = report["cache_frozen"]
    assert kept["images"] == IMAGES + 7 and not (folder / "store_checked").exists()
    line = next(remark for remark in report["remarks"] if "values of frozen towers" in remark)
    assert "for 37 images" in line and "GiB are free there" in line
    (store,) = (folder / "store3").iterdir()
    written = sum(f.stat().st_size for f in store.iterdir() if f.name != "key.json")
    assert kept["bytes"] == written
    assert "computed in every epoch" in frozen_images.words({**kept, "free": kept["bytes"] // 2})


def test_feature_statistics_are_taken_from_the_store_and_fill_it(folder, monkeypatch):
    recipe = recipes.load(folder / "kept3.yaml")
    section, manifest = recipes.components(recipe).backbone, Manifest.load(folder / "data")

    def backbone():
        return resolve.make_backbone(section, recipe.engine, tiny_vqa.LABELS)

    expected = feature_moments.measure(manifest, "train", backbone(), 64)
    taken = feature_moments.measure_kept(manifest, "train", recipe, backbone(), 7)
    recipe.engine.cache_frozen.dir = str(folder / "of_statistics")
    made = feature_moments.measure_kept(manifest, "train", recipe, backbone(), 7)
    for found in (taken, made):
        assert found["count"] == IMAGES and found["bad"] == 0
        assert found["mean"] == pytest.approx(expected["mean"], abs=1e-12)
        assert found["std"] == pytest.approx(expected["std"], abs=1e-12)
    names = [{f.name for f in (folder / store).iterdir()} for store in ("store3", "of_statistics")]
    assert names[0] == names[1]  # the same key, so training finds what the statistics have stored
    monkeypatch.setattr(feature_moments, "_pictures", None)  # everything is there: nothing is decoded
    assert feature_moments.measure_kept(manifest, "train", recipe, backbone(), 30)["mean"] == pytest.approx(
        made["mean"]
    )
