"""Mean and deviation of image features over a whole split, for any batch size, kept in the manifest."""

import types

import pytest
import torch

from data_prep import feature_stats, prepare
from data_prep.common import feature_moments
from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.errors import BadInput
from tests.helpers.data.images import picture


class Tower:
    """Three features of an image: its first pixel's red, the square of that, and a constant."""

    wants_statistics = True
    built = 0

    def statistics_key(self):
        return "tower-1"

    def build_vision(self):
        Tower.built += 1

        def vision(images):
            red = images["pixels"][:, 0, 0, 0].float()
            return torch.stack([red, red**2, torch.ones_like(red)], 1)

        return vision

    def image_transform(self, train):
        return lambda image, generator: image

    def collate_images(self, images):
        return {"pixels": torch.stack(images)}


@pytest.fixture
def tower(monkeypatch):
    sections = {"backbone": {"name": "features"}, "method": {"name": "lora"}}
    for_all = recipes.from_dict({"run_dir": "r", **sections})
    data = for_all.data
    monkeypatch.setattr(recipes, "load", lambda path, overrides: for_all)
    monkeypatch.setattr(resolve, "make_backbone", lambda section, engine, labels: Tower())
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    Tower.built = 0
    return data


@pytest.fixture
def shards(jsonl, tmp_path):
    lines = [{"image": f"{i % 6}.png", "caption": "x"} for i in range(11)]
    lines.append({"image": ["4.png", "5.png"], "caption": "two"})
    lines.append({"caption": "none"})
    out = tmp_path / "out"
    prepare.main(["jsonl", "--out", str(out), "--train", str(jsonl(*lines)), "--samples-per-shard", "5"])
    return out


def expected(reds):
    rows = torch.tensor([[r, r**2, 1.0] for r in reds], dtype=torch.float64)
    return rows.mean(0), rows.std(0, correction=0)


REDS = [40.0 * (i % 6) for i in range(11)] + [160.0, 200.0]


@pytest.mark.parametrize("batch", ["1", "4", "64"])
def test_mean_and_deviation_are_those_of_all_images(shards, tower, batch):
    feature_stats.main([str(shards), "--recipe", "r.yaml", "--batch", batch])
    found = Manifest.load(shards).statistics["tower-1"]
    mean, std = expected(REDS)
    assert found["count"] == 13 and found["bad"] == 0 and found["split"] == "train"
    torch.testing.assert_close(torch.tensor(found["mean"], dtype=torch.float64), mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.tensor(found["std"], dtype=torch.float64), std, rtol=1e-12, atol=1e-12)


def test_what_is_there_is_not_computed_again(shards, tower, capsys):
    feature_stats.main([str(shards), "--recipe", "r.yaml"])
    feature_stats.main([str(shards), "--recipe", "r.yaml"])
    assert Tower.built == 1
    assert "are there already, over 13 images" in capsys.readouterr().out


def test_an_unreadable_image_is_left_out_and_counted(shards, tower):
    shard = shards / "jsonl-train-000000.tar"
    data = bytearray(shard.read_bytes())
    begin = data.index(b"\x89PNG")
    data[begin : begin + 8] = b"no image"
    shard.write_bytes(data)
    feature_stats.main([str(shards), "--recipe", "r.yaml"])
    found = Manifest.load(shards).statistics["tower-1"]
    mean, _ = expected(REDS[1:])
    assert (found["count"], found["bad"]) == (12, 1)
    torch.testing.assert_close(torch.tensor(found["mean"], dtype=torch.float64), mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch", ["2", "64"])
def test_an_image_that_cannot_be_packed_with_the_others_is_left_out_and_named(tower, jsonl, tmp_path, caplog, batch):
    (tmp_path / "large.png").write_bytes(picture((240, 0, 0), size=(9, 9)))
    lines = [{"image": "large.png" if i == 1 else f"{i % 6}.png", "caption": "x"} for i in range(7)]
    prepare.main(["jsonl", "--out", str(tmp_path / "out"), "--train", str(jsonl(*lines))])
    feature_stats.main([str(tmp_path / "out"), "--recipe", "r.yaml", "--batch", batch])
    found = Manifest.load(tmp_path / "out").statistics["tower-1"]
    mean, _ = expected([0.0, 80.0, 120.0, 160.0, 200.0, 0.0])
    assert (found["count"], found["bad"]) == (6, 1) and "bad sample train-000000001" in caplog.text
    torch.testing.assert_close(torch.tensor(found["mean"], dtype=torch.float64), mean, rtol=1e-12, atol=0)


def test_an_image_that_training_would_refuse_does_not_count(shards, tower, jsonl):
    tower.max_pixels = 1
    with pytest.raises(BadInput, match="no readable image"):
        feature_stats.main([str(shards), "--recipe", "r.yaml"])


def test_moments_do_not_cancel_far_from_zero():
    torch.manual_seed(0)
    rows = torch.randn(1000, 3, dtype=torch.float64) + 1e7
    moments = feature_moments.Moments()
    for part in rows.split(7):
        moments.add(part)
    torch.testing.assert_close(moments.std, rows.std(0, correction=0), rtol=1e-9, atol=0)


def test_no_images_no_split_and_no_wish_are_said(shards, tower, jsonl, tmp_path, monkeypatch, capsys):
    with pytest.raises(BadInput, match="no split 'dev'"):
        feature_stats.main([str(shards), "--recipe", "r.yaml", "--split", "dev"])
    text = tmp_path / "text"
    prepare.main(["jsonl", "--out", str(text), "--train", str(jsonl({"caption": "words"}, name="t.jsonl"))])
    with pytest.raises(BadInput, match="has no images"):
        feature_stats.main([str(text), "--recipe", "r.yaml"])
    plain = types.SimpleNamespace(wants_statistics=False)
    monkeypatch.setattr(resolve, "make_backbone", lambda section, engine, labels: plain)
    feature_stats.main([str(shards), "--recipe", "r.yaml"])
    assert "nothing to do" in capsys.readouterr().out
    assert Manifest.load(shards).statistics == {}
