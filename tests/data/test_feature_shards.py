"""Feature shards: what is stored comes back, and features of different towers never mix."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpeft_ds.data import writer
from mmpeft_ds.data.feature_shards import (
    check_same_towers,
    class_name_in_words,
    class_texts,
    negated,
    read_features,
)
from mmpeft_ds.data.manifest import FILE, Manifest
from mmpeft_ds.errors import BadInput
from tests.helpers.data import tiny_features
from tests.helpers.data.tiny_shards import one_image, write_shards


@pytest.fixture
def manifest(tmp_path):
    return tiny_features.write_features(tmp_path / "features", [tiny_features.sample(i) for i in range(11)])


def test_features_come_back_as_they_were_stored(manifest):
    found = read_features(manifest, "train")
    assert found.key == [f"train-{i:09d}" for i in range(11)]
    assert found.image.dtype == torch.float32
    assert found.image.numpy().tolist() == [tiny_features.image_features(i).tolist() for i in range(11)]
    assert found.label.tolist() == [i % tiny_features.CLASSES for i in range(11)]
    texts = [row for i in range(11) for row in tiny_features.text_features(i)]
    assert found.text.numpy().tolist() == np.stack(texts).tolist()
    assert found.text_owner.tolist() == [i for i in range(11) for _ in tiny_features.text_features(i)]
    assert found.first_text.numpy().tolist() == [tiny_features.text_features(i)[0].tolist() for i in range(11)]
    assert found.bad == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 13])
def test_shares_of_all_ranks_make_the_whole_split(manifest, world_size):
    whole = read_features(manifest, "train")
    shares = [read_features(manifest, "train", rank=rank, world_size=world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat([s.image for s in shares]), whole.image)
    assert torch.equal(torch.cat([s.text for s in shares]), whole.text)
    assert [key for s in shares for key in s.key] == whole.key
    sizes = [len(s.key) for s in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_subset_gives_its_samples_in_the_order_of_the_split(manifest, tmp_path):
    keys = ["train-000000009", "train-000000002", "train-000000004"]
    path = tmp_path / "subset.json"
    path.write_text(json.dumps({"dataset": "toy", "split": "train", "shots": 1, "seed": 0, "keys": keys}))
    found = read_features(manifest, "train", subset=str(path))
    assert found.key == sorted(keys)
    assert found.label.tolist() == [2, 1, 0]


def test_half_precision_is_read_as_float32(tmp_path):
    manifest = tiny_features.write_features(tmp_path / "half", [tiny_features.sample(i, np.float16) for i in range(3)])
    found = read_features(manifest, "train")
    assert found.image.dtype == found.text.dtype == torch.float32
    assert torch.equal(found.image[1], torch.from_numpy(tiny_features.image_features(1, np.float16)).float())


def test_a_sample_with_features_of_another_shape_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        writer, "_checked", lambda *_: {}
    )  # ours refuses to write what another program may have written
    samples = [tiny_features.sample(i) for i in range(5)]
    samples[3].features = samples[3].features[:, :2]
    found = read_features(tiny_features.write_features(tmp_path / "bad", samples), "train")
    assert found.key == [f"train-{i:09d}" for i in (0, 1, 2, 4)]
    assert found.bad == [("features", "toy-train-000000.tar", "train-000000003")]
    assert found.first_text[3].tolist() == tiny_features.text_features(4)[0].tolist()


def test_a_split_without_captions_has_no_texts(tmp_path):
    samples = [tiny_features.sample(i) for i in range(3)]
    samples[1].arrays = {}
    found = read_features(tiny_features.write_features(tmp_path / "one", samples), "train")
    assert found.first_text is None
    for sample in samples:
        sample.arrays = {}
    found = read_features(tiny_features.write_features(tmp_path / "none", samples), "train")
    assert found.text.shape == (0, tiny_features.TEXT_WIDTH)


def test_class_texts_come_back_and_are_checked(manifest):
    found = class_texts(manifest)
    assert found["positive"].shape == (tiny_features.CLASSES, 2, tiny_features.TEXT_WIDTH)
    assert not torch.equal(found["positive"], found["negative"])
    file = Path(manifest.path(manifest.towers["classes"]["file"]))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadInput, match="sha256"):
        class_texts(manifest)


def test_pixels_are_refused_where_features_are_asked_for(tmp_path):
    pixels = write_shards(tmp_path / "pixels", [one_image(0)])
    for ask in (class_texts, lambda m: read_features(m, "train")):
        with pytest.raises(BadInput, match=r"launchers/features\.py"):
            ask(pixels)


def test_features_of_other_towers_are_refused(manifest, tmp_path):
    samples = [tiny_features.sample(0)]
    same = tiny_features.write_features(tmp_path / "same", samples, name="same", views=0)
    pixels = write_shards(tmp_path / "pixels", [one_image(0)])
    check_same_towers([manifest, same])
    check_same_towers([pixels, pixels])
    for other in (
        tiny_features.write_features(tmp_path / "other", samples, name="other", key="f" * 16),
        tiny_features.write_features(tmp_path / "half", samples, name="half", compute="bfloat16"),
        pixels,
    ):
        with pytest.raises(BadInput, match=r"launchers/features\.py|other towers"):
            check_same_towers([manifest, same, other])


def test_manifests_without_towers_are_read_as_before(manifest, tmp_path):
    raw = json.loads((tmp_path / "features" / FILE).read_text())
    assert raw["towers"]["image_width"] == tiny_features.WIDTH
    del raw["towers"]
    (tmp_path / "features" / FILE).write_text(json.dumps(raw))
    assert Manifest.load(tmp_path / "features").towers == {}


def test_a_template_is_negated_before_its_class():
    assert negated("a photo of a {}.") == "a photo of no {}."
    assert negated("A picture of the {}, a drawing") == "A picture of no {}, a drawing"
    assert negated("{}") == "no {}"
    assert negated("itap of my {}.") == "itap of my no {}."
    assert class_name_in_words("food_type of a_dish") == "food type of a dish"
