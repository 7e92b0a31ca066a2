"""Stored features: whether their rows are a grid or regions is said at preparation, and regions are refused."""

import json

import numpy as np
import pytest
import torch

from data_prep import prepare
from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.engine.assembly.resolve import resolve
from mmpeft_ds.errors import BadInput
from tests.helpers.models import tiny_clip_bart

WIDTH = tiny_clip_bart.FEATURES


@pytest.fixture
def lines(jsonl, tmp_path):
    """A JSONL file about two arrays of that many rows."""

    def write(rows):
        for i in range(2):
            np.save(tmp_path / f"{rows}-{i}.npy", np.full((rows, WIDTH), i, np.float32))
        of_array = [{"features": f"{rows}-{i}.npy", "question": "what?", "answer": "red"} for i in range(2)]
        return jsonl(*of_array, name=f"{rows}.jsonl")

    return write


def prepared(out, path, *more):
    prepare.main(["jsonl", "--out", str(out), "--processes", "1", "--train", str(path), *more])
    return Manifest.load(out)


def resolved(tmp_path, data):
    tiny_clip_bart.make(tmp_path)
    sections = {
        "run_dir": str(tmp_path / "run"),
        "data": {"sources": [{"dir": str(data), "task": {"name": "answering"}}], "global_batch": 2},
        "backbone": {
            "name": "clip_bart",
            "text": str(tmp_path / "bart"),
            "feature_width": WIDTH,
            "grid": 0,
            "order_tokens": 100,
        },
        "method": {"name": "lora", "r": 2, "target_modules": ["q_proj"]},
        "optim": {"max_steps": 200},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(sections))
    return resolve(recipes.load(path))


@pytest.mark.parametrize("rows", [36, 100])
def test_rows_that_may_be_regions_must_be_said_to_be_a_grid(lines, tmp_path, rows):
    path = lines(rows)
    with pytest.raises(BadInput, match=rf"{rows} rows.*--features-are grid or --features-are regions"):
        prepared(tmp_path / "out", path)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepared(tmp_path / "out", path, "--features-are", "grid").features_are == "grid"
    assert resolved(tmp_path, tmp_path / "out").notes == []


@pytest.mark.parametrize(
    ("numbers", "says"), [((49, 36), "36 rows, which can be"), ((49, 57), "57 rows are no square")]
)
def test_every_array_is_looked_at(jsonl, tmp_path, numbers, says):
    """As detectors that give another number of regions for each picture."""
    for rows in numbers:
        np.save(tmp_path / f"{rows}.npy", np.zeros((rows, WIDTH), np.float32))
    path = jsonl(*({"features": f"{rows}.npy", "question": "what?", "answer": "red"} for rows in numbers))
    with pytest.raises(BadInput, match=says):
        prepared(tmp_path / "out", path)
    assert prepared(tmp_path / "out", path, "--features-are", "regions").features_are == "regions"


def test_rows_that_are_no_square_are_no_grid_for_a_backbone_either(lines, tmp_path):
    with pytest.raises(BadInput, match="50 rows are no square grid"):
        prepared(tmp_path / "out", lines(50), "--features-are", "grid")
    backbone = tiny_clip_bart.make(tmp_path, grid=0, order_tokens=100, max_images=2)
    assert backbone.check_stored("grid", 2 * 49 * WIDTH) == ""
    with pytest.raises(BadInput, match="51 rows, which are no square grid"):
        backbone.check_stored("grid", 51 * WIDTH)


def test_regions_are_refused_by_a_backbone_that_reads_grids(lines, tmp_path):
    """Their order would change the answer: the negative control shows that it does for rows of a grid."""
    prepared(tmp_path / "out", lines(36), "--features-are", "regions")
    with pytest.raises(BadInput, match=r"data.sources.0.dir.*out \(train\): stored features are regions"):
        resolved(tmp_path, tmp_path / "out")
    backbone = tiny_clip_bart.make(tmp_path, grid=0, order_tokens=36)
    model, rows = backbone.build().eval(), torch.randn(1, 36, WIDTH, generator=torch.Generator().manual_seed(0))
    words = torch.tensor([[0, 4, 2]])

    def logits(features):
        with torch.no_grad():
            return model(input_ids=words, image_features=features, decoder_input_ids=words).logits

    assert not torch.allclose(logits(rows), logits(rows.flip(1)), atol=1e-6)


def test_other_numbers_of_rows_are_taken_for_a_grid_with_a_word(lines, tmp_path, capsys):
    path = lines(49)
    assert prepared(tmp_path / "out", path).features_are == ""
    assert "49 rows are taken for a grid" in capsys.readouterr().err
    (note,) = resolved(tmp_path, tmp_path / "out").notes
    assert "taken for a square grid" in note
    prepared(tmp_path / "out", path, "--features-are", "grid")
    assert resolved(tmp_path, tmp_path / "out").notes == []


def test_a_manifest_of_before_is_completed_by_the_same_command(lines, tmp_path, capsys):
    path = lines(36)
    prepared(tmp_path / "out", path, "--features-are", "grid")
    file, shard = tmp_path / "out" / "manifest.json", tmp_path / "out" / "jsonl-train-000000.tar"
    old, before = json.loads(file.read_text()), shard.stat().st_mtime_ns
    del old["features_are"], old["source"]["options"]["features_are"]
    file.write_text(json.dumps(old))
    with pytest.raises(BadInput, match=r"does not say whether the 36 rows.*--features-are grid"):
        resolved(tmp_path, tmp_path / "out")
    prepared(tmp_path / "out", path, "--features-are", "grid")
    assert Manifest.load(tmp_path / "out").features_are == "grid" and shard.stat().st_mtime_ns == before
    assert resolved(tmp_path, tmp_path / "out").notes == []
