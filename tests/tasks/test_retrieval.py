"""Retrieval: two ranks train as one, padding is absent, evaluation ranks everything by features and by matching."""

import numpy as np
import peft
import pytest
import torch

from mmpeft_ds import AuroraConfig
from mmpeft_ds.backbones.blip import backbone as blip
from mmpeft_ds.backbones.clip import backbone as clip
from mmpeft_ds.data.batch import Sample, pack
from mmpeft_ds.distributed import collectives
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.tasks.retrieval.task import ENTRY, Options
from tests.helpers.forked_ranks import in_ranks
from tests.helpers.models import tiny_blip, tiny_clip

CAPTIONS = [
    ["is it red", "a red circle"],
    ["what color"],
    ["the big square", "is there a blue square ?"],
    ["it"],
    ["round"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_blip.write(tmp_path_factory.mktemp("retrieval"), "retrieval")


def image(seed):
    return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def samples(numbers, images=1, padding=0):
    task = ENTRY(Options(), None)
    found = []
    for n in numbers:
        texts, targets = task.read_all({"captions": CAPTIONS[n]}, torch.Generator())
        record = {"captions": CAPTIONS[n]}
        found.append(Sample(str(n), 1.0, [image(10 * n + i) for i in range(images)], texts, targets, record))
    dummy = Sample("", 0.0, [torch.zeros(3, 8, 8, dtype=torch.uint8)], ["a"], [0], {})
    return found + [dummy] * padding


def packed(backbone, given):
    task = ENTRY(Options(), None)
    return pack(given, backbone.collate_images, backbone.collate_texts, task.collate)


def build(folder, **options):
    settings = {"queue": 16, "momentum": 0.9, "context_enhancement": "official", **options}
    backbone = blip.ENTRY(blip.Options(model=folder, form="retrieval", **settings), None)
    backbone.check()
    backbone.dtype = torch.float64
    torch.manual_seed(0)
    config = AuroraConfig(r=2, modules_to_save=["vision_proj", "itm_head"])
    model = peft.get_peft_model(backbone.build().double(), config).eval()
    shake(model, 0)
    return backbone, model


def shake(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def train(folder, shares, rank, **options):
    """Gradients of two steps, this rank's part of the sum, and the queue afterwards."""
    backbone, model = build(folder, **options)
    task = ENTRY(Options(loss="contrast" if options.get("negatives") == "none" else "contrast_match"), None)
    found = {}
    for step, share in enumerate(shares):
        model.zero_grad()
        batch = packed(backbone, share[rank])
        task.loss(forward(model, backbone, batch), batch).backward()
        shake(model, step + 1)
        found |= {
            f"{step}.{n}": p.grad.numpy()
            for n, p in model.named_parameters()
            if p.requires_grad and p.grad is not None
        }
    queue = model.get_base_model().queue
    state = {"image": queue.image.numpy(), "ids": queue.ids.numpy(), "pointer": np.array(queue.pointer)}
    return found, state


SHARES = [
    [samples([0, 3], padding=1), samples([1, 2, 4])],
    [samples([4]), samples([2, 0], padding=2)],
]
WHOLE = [[samples([0, 3, 1, 2, 4])], [samples([4, 2, 0])]]


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.0, "queue": 0}, {"negatives": "none"}, {"context_enhancement": "all_pairs"}],
    ids=["paper", "in_batch", "contrast", "all_pairs"],
)
def test_two_uneven_ranks_with_padding_give_the_gradients_and_the_queue_of_one(folder, options):
    want, queue = train(folder, WHOLE, 0, **options)
    got = in_ranks(lambda rank: train(folder, SHARES, rank, **options))
    assert any(np.abs(g).max() > 1e-3 for g in want.values())
    for name, grad in want.items():
        np.testing.assert_allclose(got[0][0][name] + got[1][0][name], grad, atol=1e-11, rtol=1e-8, err_msg=name)
    for rank in range(2):
        for key, value in queue.items():
            np.testing.assert_allclose(got[rank][1][key], value, atol=1e-12, err_msg=key)


def test_negatives_of_each_rank_alone_are_another_loss(folder):
    want, _ = train(folder, WHOLE, 0)
    got = in_ranks(lambda rank: train(folder, SHARES, rank, negatives="local"))
    name = next(n for n in want if "itm_head" in n and "weight" in n)
    assert np.abs(got[0][0][name] + got[1][0][name] - want[name]).max() > 1e-6


def test_padding_enters_neither_queue_nor_loss(folder):
    backbone, model = build(folder)
    task, base = ENTRY(Options(), None), model.get_base_model()
    with_padding = packed(backbone, samples([0, 1], padding=3))
    assert task.weight(with_padding) == 3
    loss = task.loss(forward(model, backbone, with_padding), with_padding)
    assert base.queue.pointer == 3 and (base.queue.ids >= 0).sum() == 3
    backbone, model = build(folder)
    without = packed(backbone, samples([0, 1]))
    torch.testing.assert_close(task.loss(forward(model, backbone, without), without), loss, atol=1e-12, rtol=0)


def test_nothing_but_padding_is_survived(folder):
    backbone, model = build(folder)
    batch = packed(backbone, samples([], padding=2))
    loss = ENTRY(Options(), None).loss(forward(model, backbone, batch), batch)
    loss.backward()
    assert loss == 0 and model.get_base_model().queue.pointer == 0
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() and not g.any() for g in grads)


def test_evaluation_leaves_queue_teacher_and_draws_alone(folder):
    backbone, model = build(folder)
    batch = packed(backbone, samples([0, 1]))
    with torch.no_grad():
        out = forward(model, backbone, batch)
    base = model.get_base_model()
    assert base.steps == 0 and base.queue.pointer == 0 and not base.teacher.averages
    assert out.contrast_losses is None and out.matching_losses is None


def test_the_teacher_follows_what_trains_and_shares_the_factors(folder):
    backbone, model = build(folder, momentum=0.75)
    base, batch = model.get_base_model(), packed(backbone, samples([0, 1]))
    forward(model, backbone, batch)
    names = set(base.teacher.averages)
    trained = {n for n, p in base.named_parameters() if p.requires_grad}
    factors = {n for n in trained if "aurora_shared" in n}
    assert factors and names == {n for n in trained - factors if not n.startswith("itm_head")}
    name = next(n for n in names if n.endswith("mode"))
    before = base.teacher.averages[name].clone()
    online = base.get_parameter(name).detach().clone()
    shake(model, 5)
    moved = base.get_parameter(name).detach().clone()
    forward(model, backbone, batch)
    assert torch.equal(before, online)
    torch.testing.assert_close(base.teacher.averages[name], 0.75 * before + 0.25 * moved)
    assert torch.equal(base.get_parameter(name), moved), "the student has its own parameters back"


def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(folder):
    batches = [samples([0, 1]), samples([2, 3]), samples([4, 0])]
    task = ENTRY(Options(), None)

    def losses(model, backbone, chosen):
        found = []
        for given in chosen:
            batch = packed(backbone, given)
            found.append(task.loss(forward(model, backbone, batch), batch).item())
        return found

    backbone, model = build(folder, alpha_ramp=4)
    want = losses(model, backbone, batches)
    backbone, first = build(folder, alpha_ramp=4)
    losses(first, backbone, batches[:2])
    state = {k: v.clone() for k, v in first.get_base_model().training_state().items()}
    _, second = build(folder, alpha_ramp=4)
    fresh = losses(second, backbone, batches[2:])
    _, second = build(folder, alpha_ramp=4)
    second.get_base_model().load_training_state(state)
    assert losses(second, backbone, batches[2:]) == want[2:] != fresh


def test_a_video_is_the_mean_of_its_frames_and_frames_can_be_weighted(folder):
    plain, aware = (build(folder, frame_aware=f, momentum=0.0) for f in (False, True))
    task = ENTRY(Options(), None)
    found = []
    for backbone, model in (plain, aware):
        batch = packed(backbone, samples([0, 1, 2], images=3))
        out = forward(model, backbone, batch)
        task.loss(out, batch).backward()
        found.append(out)
    torch.testing.assert_close(found[0].image_features, found[1].image_features)
    assert (found[0].fused_positive - found[1].fused_positive).abs().max() > 1e-4
    uneven = packed(aware[0], [*samples([0], images=3), *samples([1], images=2)])
    with pytest.raises(BadInput, match="frame_aware"):
        forward(aware[1], aware[0], uneven)


# ------------------------------------------------------------------------------------------------------- evaluation


def evaluated(folder, batches, **options):
    backbone, model = build(folder)
    task = ENTRY(Options(**options), None)
    parts = []
    with torch.no_grad():
        for given in batches:
            batch = packed(backbone, given)
            parts.append(task.collect(forward(model, backbone, batch), batch))
    rows = task.conclude(model, parts, "cpu")
    return sorted(rows, key=lambda r: (r["kind"], r["sample_id"], r["text"]))


@torch.no_grad()
def by_hand(folder, match, weight=0.0):
    """Rank of every text's picture by scoring all pairs."""
    backbone, model = build(folder)
    batch = packed(backbone, samples(range(5)))
    out = forward(model, backbone, batch)
    scores = out.text_features @ out.image_features.T
    if match:
        rows = []
        for t in range(len(batch.text_owner)):
            texts = [batch.texts[k][t : t + 1].expand(5, -1) for k in ("input_ids", "attention_mask")]
            rows.append(model.get_base_model().match(*texts, out.image_tokens, out.image_mask))
        scores = torch.stack(rows) + weight * scores
    own = batch.text_owner
    right = scores[torch.arange(len(own)), own]
    return dict(zip(batch.raw_texts, (scores > right[:, None]).sum(1).add(1).tolist(), strict=True))


@pytest.mark.parametrize(
    ("options", "match"), [({"rerank": 0}, False), ({"rerank": 50, "similarity_weight": 3.0}, True)]
)
def test_ranks_are_those_of_scoring_all_pairs(folder, options, match):
    rows = evaluated(folder, [samples([0, 1], padding=1), samples([2, 3, 4])], **options)
    texts = {r["text"]: r["rank"] for r in rows if r["kind"] == "text_to_image"}
    assert texts == by_hand(folder, match, options.get("similarity_weight", 0.0))
    assert len([r for r in rows if r["kind"] == "image_to_text"]) == 5 and len(set(texts.values())) > 1


def test_only_the_first_of_a_list_are_ranked_anew(folder):
    batches = [samples(range(5))]
    plain = {r["text"]: r["rank"] for r in evaluated(folder, batches, rerank=0) if r["text"]}
    for row in evaluated(folder, batches, rerank=2):
        if row["text"] and plain[row["text"]] > 2:
            assert row["rank"] == 5, "after everything: its picture is not in the list"
        elif row["text"]:
            assert row["rank"] <= 2


@pytest.mark.parametrize("options", [{"rerank": 0}, {"rerank": 3}])
def test_two_ranks_evaluate_as_one(folder, options):
    want = evaluated(folder, [samples([0, 1]), samples([2, 3, 4])], **options)
    shares = [[samples([0, 1]), samples([], padding=1)], [samples([2]), samples([3, 4])]]
    got = in_ranks(lambda rank: evaluated(folder, shares[rank], **options))
    assert got[0] == want and got[1] == []


def test_the_loss_of_an_evaluation_does_not_depend_on_the_number_of_ranks(folder):
    @torch.no_grad()
    def loss(given):
        backbone, model = build(folder)
        batch = packed(backbone, given)
        return float(ENTRY(Options(), None).loss(forward(model, backbone, batch), batch))

    shares = [samples([0]), samples([1, 2, 3], padding=1)]
    want = loss(samples(range(4)))
    assert sum(in_ranks(lambda rank: loss(shares[rank]))) == pytest.approx(want, rel=1e-5)
    assert sum(map(loss, shares)) != pytest.approx(want, rel=1e-2), "each rank by itself is another loss"


def test_a_picture_that_several_samples_show_is_matched_as_one(folder):
    task = ENTRY(Options(), None)
    split = []
    for n, captions in enumerate(CAPTIONS):
        for k, caption in enumerate(captions):
            record = {"captions": [caption], "picture": str(n)}
            split.append(Sample(f"{n}.{k}", 1.0, [image(10 * n)], *task.read_all(record, torch.Generator()), record))
    for options in ({"rerank": 50}, {"rerank": 3}):
        want, got = (
            sorted((r["kind"], r["text"], r["rank"]) for r in evaluated(folder, batches, **options))
            for batches in ([samples(range(5))], [split[:3], split[3:]])
        )
        assert got == want


def test_scores_are_recalls_of_both_directions(folder):
    task = ENTRY(Options(), None)
    rows = [{"kind": "image_to_text", "rank": r} for r in (1, 2)] + [
        {"kind": "text_to_image", "rank": r} for r in (1, 7)
    ]
    scores = task.score(rows)
    assert (scores["txt_r1"], scores["txt_r5"], scores["img_r5"], scores["img_r10"]) == (50, 100, 50, 100)


# ------------------------------------------------------------------------------------------------------ other things


def test_clip_trains_by_contrast_over_all_ranks(tmp_path):
    backbone = clip.ENTRY(clip.Options(tiny_clip.write(tmp_path, "clip")), None)
    task = ENTRY(Options(loss="contrast"), None)

    def gradient(share):
        model = backbone.build().double().eval()
        weight = model.text_projection.weight.requires_grad_()
        batch = packed(backbone, share)
        task.loss(forward(model, backbone, batch), batch).backward()
        return weight.grad.numpy()

    shares = SHARES[0]
    want = gradient(WHOLE[0][0])
    got = in_ranks(lambda rank: gradient(shares[rank]))
    np.testing.assert_allclose(got[0] + got[1], want, atol=1e-10)
    assert np.abs(want).max() > 1e-6 and collectives.world_size() == 1


def test_clip_cannot_match(tmp_path):
    backbone = clip.ENTRY(clip.Options(tiny_clip.write(tmp_path, "clip")), None)
    model = backbone.build().eval()
    batch = packed(backbone, samples([0, 1]))
    with pytest.raises(BadInput, match="contrast_match"):
        ENTRY(Options(), None).loss(forward(model, backbone, batch), batch)


def test_a_visit_draws_captions_and_evaluation_reads_all():
    task, generator = ENTRY(Options(captions=1), None), torch.Generator().manual_seed(0)
    record = {"captions": ["a", "b", "c"]}
    drawn = {tuple(task.read(record, generator)[0]) for _ in range(40)}
    assert drawn == {("a",), ("b",), ("c",)}
    texts, ids = task.read_all(record, generator)
    assert texts == ["a", "b", "c"] and len(set(ids)) == 1 and task.read(record, generator)[1] == ids[:1]
    for bad in ({}, {"captions": []}, {"captions": "a"}):
        with pytest.raises(BadSample):
            task.read(bad, generator)


@pytest.mark.parametrize("options", [{"loss": "hinge"}, {"captions": -1}, {"rerank": -1}])
def test_bad_options_are_refused(options):
    with pytest.raises(BadInput, match=next(iter(options))):
        ENTRY(Options(**options), None)
