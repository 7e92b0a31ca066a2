"""Which pictures and captions are one in retrieval: a picture by its content, a caption by its row."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from data_prep import prepare
from mmpeft_ds.backbones.common.composed import DualEncoderOutput
from mmpeft_ds.data.batch import Sample, hash_id, pack
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.stream import Stream, StreamSource
from mmpeft_ds.errors import BadSample
from mmpeft_ds.tasks.retrieval import ranking
from mmpeft_ds.tasks.retrieval.task import ENTRY, Options
from tests.helpers.data.images import picture
from tests.helpers.forked_ranks import in_ranks

PICTURES, CAPTIONS, WIDTH = 12, 3, 16
OWN = [[f"caption {k} of picture {p}" for k in range(CAPTIONS)] for p in range(PICTURES)]
SHARED = [["a dog", f"caption of picture {p}"] for p in range(PICTURES)]


def features(*names):
    """A unit vector for each name, as good as random."""
    rows = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(hash_id(str(name)) >> 1)) for name in names]
    return normalize(torch.stack(rows), dim=1)


def outputs(batch, right):
    """Of a model that knows the right answers, or of one that knows nothing. Image p is uniformly of colour p."""
    images = features(*batch.images["colour"].tolist()) if batch.images else None
    owner = {caption: p for p in range(PICTURES) for caption in OWN[p]}
    texts = (
        features(*[owner[t] if right else t for t in batch.raw_texts]) if batch.raw_texts else torch.zeros(0, WIDTH)
    )
    return DualEncoderOutput(image_features=images, text_features=texts)


def colours(images):
    return {"colour": torch.stack([image[0, 0, 0] for image in images]) // 20}


def prepared(tmp_path, captions, one_line_a_caption, name="pairs", **more):
    for p in range(PICTURES):
        (tmp_path / f"p{p}.png").write_bytes(picture((20 * p, 0, 0)))
        (tmp_path / f"copy{p}.png").write_bytes(picture((20 * p, 0, 0)))
    lines = [
        {"image": f"{'copy' if k else 'p'}{p}.png", "captions": [c] if one_line_a_caption else captions[p], **more}
        for p in range(PICTURES)
        for k, c in enumerate(captions[p])
        if one_line_a_caption or k == 0
    ]
    out = tmp_path / name
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare.main(["jsonl", "--train", str(file), "--name", name, "--out", str(out), "--processes", "1"])
    return Manifest.load(out)


def evaluated(manifest, right, rank=0, ranks=1, batch=5, broken=None, noise=0.0, **options):
    """Rows of an evaluation as the engine makes it; `broken` is the feature of one picture, `noise` what rounding adds
    to each feature of a text."""
    task = ENTRY(Options(loss="contrast", rerank=0, **options), None)
    source = StreamSource(
        manifest,
        "train",
        task.read_all,
        lambda image, _: image,
        colours,
        lambda texts: {"n": torch.zeros(len(texts), 1)},
        task.collate,
        task.fields,
        identify=task.identifies_pictures,
    )
    stream = Stream([source], DataOptions(global_batch=batch, workers=0), rank=rank, world_size=ranks, train=False)
    parts = [task.collect(outputs(b, right), b) for step in stream.epoch(0) for b in step.micro]
    for number, part in enumerate(parts):
        generator = torch.Generator().manual_seed(10 * rank + number)
        part["text"] = part["text"] + noise * torch.randn(part["text"].shape, generator=generator)
    if broken is not None:
        parts[0]["image"][0] = broken
    return task, task.conclude(SimpleNamespace(), parts, "cpu")


def brute_force(captions):
    """(ranks of pictures that look for a caption, of captions that look for their picture), by scoring everything."""
    images = features(*range(PICTURES))
    texts = [(p, c) for p in range(PICTURES) for c in captions[p]]
    scores = features(*[c for _, c in texts]) @ images.T
    owner = torch.tensor([p for p, _ in texts])
    to_image = [int((scores[t] > scores[t, p]).sum()) + 1 for t, (p, _) in enumerate(texts)]
    to_text = []
    for p in range(PICTURES):
        best = scores[owner == p, p].max()
        to_text.append(int((scores[owner != p, p] > best).sum()) + 1)
    return sorted(to_text), sorted(to_image)


def ranks_of(rows):
    kinds = ("image_to_text", "text_to_image")
    return tuple(sorted(row["rank"] for row in rows if row["kind"] == kind) for kind in kinds)


@pytest.mark.parametrize("one_line_a_caption", [False, True])
def test_a_file_with_one_line_a_caption_scores_as_one_with_one_line_a_picture(one_line_a_caption, tmp_path):
    manifest = prepared(tmp_path, OWN, one_line_a_caption)
    task, rows = evaluated(manifest, right=True)
    scores = task.score(rows)
    assert scores["img_r1"] == scores["txt_r1"] == 100
    _, rows = evaluated(manifest, right=False)
    assert ranks_of(rows) == brute_force(OWN)
    assert len(rows) == PICTURES + PICTURES * CAPTIONS


@pytest.mark.parametrize("captions", [OWN, SHARED], ids=["own", "shared"])
def test_two_ranks_that_each_hold_a_part_of_a_picture_s_captions_evaluate_as_one(captions, tmp_path):
    manifest = prepared(tmp_path, captions, True)

    def key(row):
        return row["kind"], row["sample_id"], row["text"]

    def rows(rank, ranks):
        return sorted(evaluated(manifest, False, rank, ranks, batch=4)[1], key=key)

    want = rows(0, 1)
    assert any(row["rank"] > 3 for row in want)
    got = in_ranks(lambda rank: rows(rank, 2))
    assert got[0] == want and got[1] == []


@pytest.mark.parametrize("apart", [ranking.ROUNDING, -1.0], ids=["", "control"])
def test_rounding_does_not_part_equal_captions_so_ties_are_those_of_one_rank(tmp_path, monkeypatch, apart):
    monkeypatch.setattr(ranking, "ROUNDING", apart)
    manifest = prepared(tmp_path, SHARED, False)

    def found(rank=0, ranks=1, **more):
        rows = evaluated(manifest, False, rank, ranks, batch=4, **more)[1]
        return sorted((row["kind"], row["sample_id"], row["text"], row["rank"], row["prediction"]) for row in rows)

    alike = in_ranks(lambda rank: found(rank, 2, noise=1e-7))[0] == found()
    assert alike == (apart > 0)


def test_equal_captions_of_different_pictures_leave_the_pictures_apart(tmp_path):
    manifest = prepared(tmp_path, [["a dog"]] * PICTURES, False)
    _, rows = evaluated(manifest, right=False)
    to_text, to_image = ranks_of(rows)
    assert to_text == list(range(1, PICTURES + 1)), "the one right among equals is found as often as by chance"
    assert sorted(to_image) == list(range(1, PICTURES + 1)), "one text, so one list of pictures"
    manifest = prepared(tmp_path, SHARED, True, name="shared")
    _, rows = evaluated(manifest, right=False)
    assert ranks_of(rows)[1] == brute_force(SHARED)[1]
    unique = {row["text"]: row["rank"] for row in rows if row["text"] not in ("", "a dog")}
    assert len(unique) == PICTURES


def test_a_field_may_say_which_samples_show_the_same(tmp_path):
    manifest = prepared(tmp_path, OWN, True, video_id="v1")
    _, rows = evaluated(manifest, right=False, id_field="video_id")
    assert ranks_of(rows) == ([1], [1] * PICTURES * CAPTIONS), "all of them show one"
    task = ENTRY(Options(id_field="clip"), None)
    with pytest.raises(BadSample, match=r"no `clip`, which task\.id_field names"):
        task.read({"captions": ["x"]}, torch.Generator())


def test_preparation_tells_equal_pictures_and_shared_captions(tmp_path, capsys):
    prepared(tmp_path, SHARED, True)
    told = capsys.readouterr().out
    assert "train: 24 samples show 12 different pictures" in told
    assert "train: 12 of 24 captions belong to more than one picture" in told
    assert "so `img_r1` stays below 100" in told
    prepared(tmp_path, OWN, False, name="plain")
    told = capsys.readouterr().out
    assert "different pictures" not in told and "more than one picture" not in told


def samples_of(*names):
    """Pairs of one picture and one caption each, for training."""
    task, found = ENTRY(Options(loss="contrast"), None), []
    for number, (shown, caption) in enumerate(names):
        record = {"captions": [caption], "picture": shown, "source_name": f"line {number}"}
        texts, targets = task.read(record, torch.Generator())
        found.append(Sample(f"d/{number}", 1.0, [torch.zeros(1)], texts, targets, record))
    return task, pack(found, lambda x: {"n": torch.stack(x)}, lambda x: {"n": torch.zeros(len(x), 1)}, task.collate)


def test_a_picture_twice_in_a_batch_is_no_negative_of_itself_and_equal_captions_are():
    task, batch = samples_of(("a", "one"), ("a", "two"), ("b", "one"))
    image, text = features("a", "a", "b").requires_grad_(), features("one", "two", "one").requires_grad_()
    loss = task.loss(DualEncoderOutput(image_features=image, text_features=text), batch)
    grads = torch.autograd.grad(loss, [image, text])
    share = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    image, text = (x.detach().clone().requires_grad_() for x in (image, text))
    logits = normalize(image, dim=1) @ text.T / 0.07
    want = (cross_entropy(logits, share, reduction="sum") + cross_entropy(logits.T, share, reduction="sum")) / 2
    torch.testing.assert_close(loss, want)
    for grad, other in zip(grads, torch.autograd.grad(want, [image, text]), strict=True):
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_feature_that_is_no_number_ranks_last_and_leaves_no_score(broken, tmp_path):
    manifest = prepared(tmp_path, OWN, False)
    task, rows = evaluated(manifest, True)
    assert task.score(rows)["r_mean"] == 100
    task, rows = evaluated(manifest, True, broken=broken)
    assert min(ranks_of(rows)[1]) == PICTURES, "every caption was compared with the broken picture"
    assert all(math.isnan(value) for value in task.score(rows).values())
