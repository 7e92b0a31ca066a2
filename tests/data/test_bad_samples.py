"""Bad samples: slots without weight that name what is wrong, refusals that stop the stream, and the budget."""

import io
import json

import numpy as np
import pytest

from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.stream import Stream
from mmpeft_ds.errors import BadInput
from tests.helpers.data.images import encoded
from tests.helpers.data.streamed import decoding_threads, ids, run
from tests.helpers.data.tiny_shards import RawSample, one_image, source, write_shards

N = 45


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("bad") / "toy", [one_image(i) for i in range(N)])


def _pickled_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def spoilt(name: str) -> RawSample:
    good = one_image(99)
    record, images = dict(good.record), list(good.images)
    if name == "text as image":
        images = [("jpg", b"this is a text file")]
    elif name == "truncated image":
        images = [("jpg", images[0][1][:400])]
    elif name == "too many pixels":
        images = [("png", encoded(1, "PNG"))]
    elif name == "missing field":
        del record["answers"]
    elif name == "wrong type":
        record["texts"] = 3
    elif name == "text without target":
        record["texts"] = ["a", "b"]
    return RawSample(name, images, record)


KINDS = {
    "text as image": "image",
    "truncated image": "image",
    "too many pixels": "pixels",
    "missing field": "field",
    "wrong type": "type",
    "text without target": "type",
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_becomes_a_slot_without_weight_and_nothing_else_changes(tmp_path, name, workers):
    clean = [one_image(i) for i in range(10)]
    max_pixels = 2399 if name == "too many pixels" else 2400
    samples = clean[:4] + [spoilt(name)] + clean[5:]
    if name == "too many pixels":
        small = encoded(1, "PNG")
        samples = [RawSample(s.name, [], s.record) for s in clean]
        samples[4] = RawSample(name, [("png", small)], clean[4].record)
    manifest = write_shards(tmp_path / "bad", samples)
    stream = Stream(
        [source(manifest)], DataOptions(global_batch=4, workers=workers, max_pixels=max_pixels), train=False
    )
    stream.wait_for_workers()
    batches = [batch for step in stream.epoch(0) for batch in step.micro]
    stream.close()
    assert [b for batch in batches for b in batch.bad] == [(KINDS[name], "toy-train-000000.tar", "train-000000004")]
    good = sorted(s for b in batches for s, w in zip(b.sample_id, b.weight.tolist(), strict=True) if w)
    assert good == [f"toy/train-{i:09d}" for i in range(10) if i != 4]
    for batch in batches:
        slot = batch.sample_id.index("toy/train-000000004") if "toy/train-000000004" in batch.sample_id else None
        assert slot not in batch.text_owner.tolist() + batch.image_owner.tolist()


def test_damaged_json_tar_and_pickled_arrays_are_bad(tmp_path):
    samples = [one_image(i) for i in range(3)]
    samples.append(RawSample("array", [], {"texts": [], "answers": []}, np.zeros(20)))
    manifest = write_shards(tmp_path / "bad", samples)
    file = tmp_path / "bad" / manifest.shards("train")[0].file
    data = file.read_bytes()
    text = json.dumps({"answers": [0]})[:-1].encode()
    assert data.count(text) == 0  # the record is written more tightly than this
    data = data.replace(b'{"answers":[0]', b'["answers",[0]', 1)
    array = data.index(b"\x93NUMPY")
    pickled = _pickled_array()[:120]
    data = data[:array] + pickled + data[array + len(pickled) :]
    file.write_bytes(data)
    begin = int(manifest.offsets("train", 1 - 1)[2][0])
    file.write_bytes(data[:begin] + b"\1" * 600 + data[begin + 600 :])
    stream = Stream([source(manifest)], DataOptions(global_batch=4, workers=0), train=False)
    (step,) = stream.epoch(0)
    assert sorted(kind for kind, _, _ in step.micro[0].bad) == ["json", "npy", "tar"]
    assert step.micro[0].weight.tolist() == [0, 1, 0, 0]


def test_what_is_wrong_with_a_picture_is_said_of_its_sample_where_threads_decode(tmp_path):
    samples = [one_image(i) for i in range(10)]
    samples[4] = spoilt("truncated image")
    manifest = write_shards(tmp_path / "bad", samples)
    with decoding_threads(3):
        steps = list(Stream([source(manifest)], DataOptions(workers=0), train=False).epoch(0))
    batches = [batch for step in steps for batch in step.micro]
    assert [bad for batch in batches for bad in batch.bad] == [("image", "toy-train-000000.tar", "train-000000004")]
    assert sum(batch.weight.sum() for batch in batches) == 9


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, RecursionError])
def test_whatever_a_transform_raises_is_of_the_sample_and_says_where(toy, caplog, error):
    def broken(image, generator):
        raise error("odd")

    assert run(toy, sources=[source(toy, image_transform=broken)]) == {}
    assert f"{error.__name__}: odd (test_bad_samples.py:" in caplog.text
    assert "bad sample train-000000000" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_stops_with_one_line(tmp_path, workers):
    manifest = write_shards(tmp_path / "gone", [one_image(i) for i in range(10)])
    file = tmp_path / "gone" / manifest.shards("train")[1].file
    file.unlink()
    with pytest.raises(BadInput, match=file.name) as caught:
        run(manifest, workers=workers)
    assert "\n" not in str(caught.value)


def test_the_largest_image_that_is_allowed_passes(toy):
    assert len(ids(run(toy, max_pixels=2400))) == N
    assert ids(run(toy, max_pixels=2399)) == []


def budget_of(pattern: str, fraction=0.001, row=100, size=0) -> BadBudget:
    """`g` good, `b` bad, `.` padding."""
    from mmpeft_ds.data.batch import Sample, pack

    budget = BadBudget(fraction, row, size)
    samples = {
        "g": Sample("d/k", 1.0),
        "b": Sample("d/x", 0.0, bad=("image", "s.tar", "x")),
        ".": Sample(),
    }
    budget.feed(pack([samples[c] for c in pattern], None, None, None))
    return budget


def test_budget_allows_a_share_rounded_up_and_stops_beyond():
    assert budget_of("gggb", size=500).problem() is None
    line = budget_of("ggbb", size=500).problem()
    assert "2 bad of 4" in line and "s.tar x (image)" in line and "\n" not in line
    assert budget_of("b" * 5 + "g", fraction=0.01, size=500).problem() is None
    assert budget_of("b" * 6 + "g", fraction=0.01, size=500).problem() is not None
    assert budget_of("g").problem() is None and budget_of("").problem() is None
    assert budget_of("gb", fraction=0.0).problem() is not None


def test_bad_samples_in_a_row_stop_and_padding_does_not_break_the_row():
    assert budget_of("gb.b.b", fraction=1.0, row=3).problem() is not None
    assert budget_of("bb.gb", fraction=1.0, row=3).problem() is None


def test_budgets_of_ranks_merge_by_plain_data():
    parts = [budget_of(p, fraction=1.0, row=4) for p in ("gbb", "bb.", "g")]
    states = json.loads(json.dumps([p.state() for p in parts]))
    total = parts[0].merged(states)
    assert (total.seen, total.bad, total.in_a_row, total.counts) == (6, 4, 4, {"image": 4})
    assert total.problem() is not None
    assert all(p.problem() is None for p in parts)
