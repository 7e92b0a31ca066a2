"""Making feature shards: what is stored, which bytes, going on after an interruption, what is refused."""

from __future__ import annotations

import filecmp
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.verify import verify
from mmpeft_ds.data.decode import decode
from mmpeft_ds.data.feature_shards import class_texts, read_features
from mmpeft_ds.data.identity import content_id
from mmpeft_ds.data.manifest import FILE, Manifest
from mmpeft_ds.data.shards import ShardReader, members
from mmpeft_ds.data.views import RandomView, crop_box
from mmpeft_ds.data.writer import PARTS
from mmpeft_ds.errors import BadInput
from mmpeft_ds.precompute import features
from mmpeft_ds.precompute.features import FeatureOptions, Maker
from tests.helpers.data.tiny_pictures import make, pictured, recipe, start, write_pixels, write_towers

COUNT = {"train": 12, "test": 7}


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> dict:
    return write_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Manifest:
    samples = {split: [pictured(i) for i in range(n)] for split, n in COUNT.items()}
    return write_pixels(tmp_path_factory.mktemp("source") / "pixels", samples)


@pytest.fixture(scope="module")
def made(source, towers, tmp_path_factory) -> Path:
    """Features with two passes, half precision, thumbnails."""
    out = tmp_path_factory.mktemp("made") / "features"
    make(source, towers, out, views=2, thumbnails=16)
    return out


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same_files(one: Path, other: Path) -> bool:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def test_row_0_is_what_the_towers_give_without_augmentation(source, made, towers):
    maker, _ = start(source, towers, made.parent / "not written", views=0)
    maker.build()
    backbone, transform = maker.backbone, maker.backbone.image_transform(False)
    stored = read_features(Manifest.load(made), "test")
    for i, key in enumerate(stored.key):
        image = transform(decode(pictured(i).images[0][1]), None)
        with torch.no_grad():
            pixels = backbone.inputs(batch_of(backbone, image))
            alone = maker.model(**pixels, unit=False).image_features
            texts = backbone.embed_texts(maker.model, pictured(i).record["captions"])
        torch.testing.assert_close(stored.image[i, :1], alone, rtol=2e-3, atol=2e-3)  # half precision
        torch.testing.assert_close(stored.text[stored.text_owner == i], texts, rtol=2e-3, atol=2e-3)
        assert key == f"test-{i:09d}"
        assert not torch.allclose(stored.image[i, 0], stored.image[i, 1], atol=2e-3)
        assert not torch.equal(stored.image[i, 1], stored.image[i, 2])


def batch_of(backbone, image):
    from mmpeft_ds.data.batch import Sample, pack

    return pack([Sample("x", 1.0, [image])], backbone.collate_images, backbone.collate_texts, lambda _: {})


def test_records_thumbnails_and_where_they_came_from_are_kept(made):
    manifest = Manifest.load(made)
    reader = ShardReader(manifest, "train")
    for i, piece in enumerate(reader.read([(0, 0), (0, 1), (1, 0)])):
        key, parts = members(piece)
        number = [0, 1, 5][i]
        record = json.loads(parts["json"])
        assert record["source_id"] == f"shapes/train-{number:09d}" == f"shapes/{key}"
        assert record["source_name"] == f"source {number}"
        assert record["picture"] == content_id([data for _, data in pictured(number).images])
        assert record["captions"] == pictured(number).record["captions"]
        assert max(Image.open(io.BytesIO(parts["jpg"])).size) == 16
    reader.close()
    assert verify(str(made)) == []


def test_class_texts_are_the_templates_of_the_names_in_words(made, towers, source):
    maker, _ = start(source, towers, made.parent / "not written")
    maker.build()
    found = class_texts(Manifest.load(made))
    with torch.no_grad():
        for part, text in (("positive", "a photo of a big shape 2."), ("negative", "a photo of no big shape 2.")):
            torch.testing.assert_close(found[part][2], maker.backbone.embed_texts(maker.model, [text]))


def test_a_rerun_and_any_order_of_shards_give_the_same_bytes(source, towers, made, tmp_path):
    maker, plan = start(source, towers, tmp_path / "again", views=2, thumbnails=16)
    maker.build()
    for job in reversed(plan.todo):
        maker.write(job)
    features._finish(maker, plan, 1.0)
    assert same_files(made, tmp_path / "again")
    make(source, towers, tmp_path / "seed", views=2, thumbnails=16, seed=1)
    assert not same_files(made, tmp_path / "seed")


def test_an_interrupted_run_goes_on_and_a_finished_one_is_left_alone(source, towers, made, tmp_path):
    out = tmp_path / "features"
    maker, plan = start(source, towers, out, views=2, thumbnails=16)
    maker.build()
    maker.write(plan.todo[0])
    maker.write(plan.todo[3])
    (out / PARTS / "shapes-train-000001.tar.1.tmp").write_bytes(b"half a shard")
    damaged = out / "shapes-test-000000.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = (out / "shapes-train-000000.tar").stat().st_mtime_ns
    _, again = start(source, towers, out, views=2, thumbnails=16)
    assert again.todo == [job for job in plan.jobs if job is not plan.jobs[0]]
    make(source, towers, out, views=2, thumbnails=16)
    assert (out / "shapes-train-000000.tar").stat().st_mtime_ns == before
    assert same_files(made, out)
    assert start(source, towers, out, views=2, thumbnails=16)[1].done


def test_a_run_that_is_told_to_stop_leaves_no_half_shard(source, towers, tmp_path):
    class Stop:
        def requested(self):
            return True

    maker, plan = start(source, towers, tmp_path / "out")
    maker.build()
    maker.stop = Stop()
    assert maker.write(plan.todo[0]) is None
    assert not list((tmp_path / "out").rglob("*.tar*"))


def test_bad_samples_are_left_out_counted_and_leave_no_gap_in_the_keys(towers, tmp_path, caplog):
    samples = [pictured(i) for i in range(12)]
    samples[1].images = [("jpg", b"no picture")]
    samples[7].record["captions"] = "no list"
    for sample in samples[5:7]:
        sample.images = [("jpg", b"no picture")]
    source = write_pixels(tmp_path / "pixels", {"train": samples, "test": samples[:2]})
    manifest = make(source, towers, tmp_path / "out", thumbnails=8)
    assert verify(str(tmp_path / "out")) == []
    assert manifest.samples("train") == 8
    told = manifest.source["left_out"]["train"]
    assert told["count"] == 4
    assert told["samples"] == [
        ["train-000000001", "image"],
        ["train-000000005", "image"],
        ["train-000000006", "image"],
        ["train-000000007", "type"],
    ]
    stored = read_features(manifest, "train")
    assert stored.key == [f"train-{i:09d}" for i in range(8)]
    good = write_pixels(tmp_path / "good", {"train": [s for i, s in enumerate(samples) if i not in (1, 5, 6, 7)]})
    other = read_features(make(good, towers, tmp_path / "other"), "train")
    torch.testing.assert_close(stored.image, other.image, rtol=2e-3, atol=2e-3)
    assert torch.equal(stored.label, other.label)


def test_a_shard_or_a_split_without_a_good_sample(towers, tmp_path, caplog):
    samples = [pictured(i) for i in range(12)]
    for sample in samples[5:10]:
        sample.images = [("jpg", b"no picture")]
    source = write_pixels(tmp_path / "pixels", {"train": samples})
    manifest = make(source, towers, tmp_path / "out")
    assert [s.samples for s in manifest.shards("train")] == [5, 2]
    assert verify(str(tmp_path / "out")) == []
    for sample in samples:
        sample.images = [("jpg", b"no picture")]
    source = write_pixels(tmp_path / "worse", {"train": samples})
    with pytest.raises(BadInput, match="no readable sample"):
        make(source, towers, tmp_path / "none")
    assert not (tmp_path / "none" / FILE).exists()


def test_several_images_and_none(towers, tmp_path):
    samples = [pictured(i) for i in range(3)]
    samples[0].images = [*pictured(0).images, *pictured(5).images]
    samples[1].images = []
    manifest = make(write_pixels(tmp_path / "pixels", {"train": samples}), towers, tmp_path / "out", views=1)
    pieces = ShardReader(manifest, "train").read([(0, i) for i in range(3)])
    arrays = [{n: data for n, data in members(piece)[1].items() if n.endswith("npy")} for piece in pieces]
    shapes = [{n: np.load(io.BytesIO(data)).shape for n, data in found.items()} for found in arrays]
    assert shapes[0] == {"npy": (2, 2, 16), "text.npy": (1, 16)}
    assert shapes[1] == {"text.npy": (2, 16)}
    assert shapes[2] == {"npy": (2, 16), "text.npy": (1, 16)}


def test_other_towers_options_and_sources_are_refused(source, towers, made, tmp_path):
    for change, told in (
        ({"views": 3}, "views 2, now 3"),
        ({"dtype": "float32"}, "dtype float16, now float32"),
        ({"templates": ("a drawing of a {}.",)}, "templates"),
    ):
        with pytest.raises(BadInput, match=told):
            start(source, towers, made, **{"views": 2, "thumbnails": 16, **change})
    with pytest.raises(BadInput, match="towers .*, now"):
        start(source, {**towers, "vision_layers": 2}, made, views=2, thumbnails=16)
    fewer = write_pixels(tmp_path / "fewer", {"train": [pictured(0)], "test": [pictured(1)]})
    with pytest.raises(BadInput, match="source"):
        start(fewer, towers, made, views=2, thumbnails=16)
    with pytest.raises(BadInput, match="pixels"):
        start(source, towers, Path(fewer.dir))
    with pytest.raises(BadInput, match="holds features already"):
        start(Manifest.load(made), towers, tmp_path / "out")


def test_overwrite_replaces_features_and_nothing_else(source, towers, tmp_path):
    out = tmp_path / "out"
    make(source, towers, out, splits=("test",))
    (out / "notes.txt").write_text("mine")
    manifest = make(source, towers, out, splits=("test",), views=1, overwrite=True)
    assert manifest.towers["views"] == 1
    assert (out / "notes.txt").exists()
    with pytest.raises(BadInput, match="pixels"):
        start(source, towers, Path(source.dir), overwrite=True)


def test_bad_options_are_told_in_a_line(source, towers, tmp_path):
    good = {"data": source.dir, "out": tmp_path}
    for bad in (
        {"views": -1},
        {"view_scale": (0.5, 0.2)},
        {"templates": ("a photo",)},
        {"templates": ("{} and {}",)},
        {"templates": ()},
        {"name": "My Set"},
        {"out": "memory://features"},
    ):
        with pytest.raises(BadInput):
            features.check_options(FeatureOptions(**{**good, **bad}))
    with pytest.raises(BadInput, match="gives no features"):
        vqa = {"name": "vision_text_encoder", "vision": towers["vision"], "text": towers["text"], "image_size": 8}
        Maker(recipe(vqa), source, FeatureOptions(**good), torch.device("cpu"), None)


def test_features_that_half_precision_cannot_hold_are_refused(source, towers, tmp_path):
    maker, plan = start(source, towers, tmp_path / "out")
    maker.build()
    embed = maker.backbone.embed
    maker.backbone.embed = lambda model, batch: tuple(x * 1e6 for x in embed(model, batch))
    with pytest.raises(BadInput, match="--dtype float32"):
        maker.write(plan.todo[0])


def test_views_stay_inside_the_picture_and_cover_what_they_should():
    generator = torch.Generator().manual_seed(0)
    boxes = [crop_box(40, 100, (0.08, 1.0), generator) for _ in range(500)]
    assert all(t >= 0 and le >= 0 and t + h <= 40 and le + w <= 100 and h > 0 and w > 0 for t, le, h, w in boxes)
    shares = [h * w / 4000 for _, _, h, w in boxes]
    assert 0.06 < min(shares) < 0.15
    assert max(shares) > 0.4
    assert crop_box(10, 1000, (1.0, 1.0), generator) == (0, 493, 10, 13)  # nothing fits: the central one
    view = RandomView((0.5, 1.0), (8, 8))
    image = torch.arange(3 * 20 * 30, dtype=torch.int64).remainder(251).to(torch.uint8).view(3, 20, 30)
    one, two = (view(image, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert one.shape == (3, 8, 8)
    assert torch.equal(one, two)
    assert not torch.equal(one, view(image, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_sample_that_cannot_be_packed_with_the_others_is_left_out_and_named(source, towers, tmp_path, batch):
    """The transform gives one picture another size; it is fine alone."""
    maker, plan = start(source, towers, tmp_path / "features", batch=batch)
    maker.build()
    transform = maker.transform
    odd = decode(pictured(5).images[0][1])

    def uneven(image, generator):
        made = transform(image, generator)
        return torch.nn.functional.pad(made, (0, 8)) if torch.equal(image, odd) else made

    maker.transform = uneven
    for job in plan.todo:
        maker.write(job)
    features._finish(maker, plan, 1.0)
    manifest = Manifest.load(tmp_path / "features")
    # alone in its batch it is an ordinary sample
    assert manifest.samples("train") == COUNT["train"] - (batch > 1)
    if batch > 1:
        assert manifest.source["left_out"]["train"]["samples"] == [["train-000000005", "collate"]]
