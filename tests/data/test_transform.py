"""What an image transform or a collate function refuses is a bad sample, with its name; strips never reach them."""

import pytest
import torch

from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.stream import Stream, StreamSource
from mmpeft_ds.data.transform import apply
from mmpeft_ds.errors import BadSample
from tests.helpers.data import tiny_shards


def test_a_strip_is_refused_before_any_transform_sees_it():
    seen = []
    transform = lambda image, generator: seen.append(image.shape)  # noqa: E731
    for height, width in ((1, 300), (300, 1), (2, 401)):
        with pytest.raises(BadSample, match="aspect: .*more than 200 times"):
            apply(transform, torch.zeros(3, height, width, dtype=torch.uint8), None)
    apply(transform, torch.zeros(3, 1, 200, dtype=torch.uint8), None)
    assert seen == [(3, 1, 200)]


@pytest.mark.parametrize("error", [ValueError, TypeError, ZeroDivisionError, IndexError, OSError])
def test_whatever_a_transform_refuses_is_a_bad_sample(error):
    def transform(image, generator):
        raise error("too\nodd")

    with pytest.raises(BadSample, match=f"image: refused by the image transform: {error.__name__}: too odd"):
        apply(transform, torch.zeros(3, 4, 4, dtype=torch.uint8), None)


def test_a_bad_sample_keeps_its_own_kind():
    def transform(image, generator):
        raise BadSample("features", "none")

    with pytest.raises(BadSample, match="features: none"):
        apply(transform, torch.zeros(3, 4, 4, dtype=torch.uint8), None)


def test_the_one_bad_sample_that_is_allowed_is_allowed_in_every_epoch():
    budget = BadBudget(0.001, 100, num_samples=12)
    for epoch in range(1, 4):
        budget.seen, budget.bad = 12 * epoch, epoch
        assert budget.problem() is None
    budget.bad += 1
    assert "4 bad of 36" in budget.problem()
    assert BadBudget(0.0, 100, 12).merged([{**budget.state(), "bad": 1}]).problem() is not None, "0 allows none"


def collate(images):
    if any(int(image.sum()) == BROKEN for image in images):
        raise ValueError("one of them is odd")
    return {"pixels": torch.stack([image.sum() for image in images])}


BROKEN = -1


def test_a_sample_that_cannot_be_packed_is_bad_and_the_others_go_on(tmp_path, monkeypatch):
    manifest = tiny_shards.write_shards(tmp_path / "set", [tiny_shards.one_image(i) for i in range(12)])
    options = DataOptions(global_batch=6, workers=0)
    functions = lambda texts: {"n": torch.zeros(len(texts), 1)}, lambda targets: {"t": torch.zeros(len(targets))}  # noqa: E731

    def batches():
        source = StreamSource(manifest, "train", lambda r, g: (["x"], [0]), lambda i, g: i, collate, *functions)
        stream = Stream([source], options, train=False)
        return [b for step in stream.epoch(0) for b in step.micro]

    good = batches()
    assert all(b.weight.sum() == 6 for b in good)
    monkeypatch.setitem(globals(), "BROKEN", int(good[0].images["pixels"][2]))
    first, second = batches()
    assert first.weight.tolist() == [1, 1, 0, 1, 1, 1] and second.weight.sum() == 6
    ((kind, shard, key),) = first.bad
    assert kind == "collate" and shard.endswith(".tar") and first.sample_id[2].endswith(key)


@pytest.mark.parametrize("longest", [3, 0])
def test_a_text_that_the_backbone_cannot_read_is_bad_under_its_own_kind_also_where_all_are(tmp_path, longest):
    manifest = tiny_shards.write_shards(tmp_path / "set", [tiny_shards.one_image(i) for i in range(6)])

    def read(record, generator):
        read.number += 1
        return ["x" * read.number], [0]

    def collate_texts(texts):
        if any(len(text) > longest for text in texts):
            raise BadSample("length", "no room")
        return {"n": torch.zeros(len(texts), 1)}

    read.number = 0
    functions = lambda images: {"pixels": torch.stack(images)}, collate_texts, lambda t: {"t": torch.zeros(len(t))}  # noqa: E731
    source = StreamSource(manifest, "train", read, lambda i, g: i.float().mean(), *functions)
    stream = Stream([source], DataOptions(global_batch=6, workers=0), train=False)
    (batch,) = (b for step in stream.epoch(0) for b in step.micro)
    assert batch.weight.tolist() == [1.0] * longest + [0.0] * (6 - longest)
    assert [kind for kind, _, _ in batch.bad] == ["length"] * (6 - longest)
