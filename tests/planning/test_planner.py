"""What a plan recommends, and where it says that things break."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, DynamicCache

from mmpeft_ds.backbones.common import text_attention
from mmpeft_ds.data.order import micro_slots
from mmpeft_ds.engine import plan as check
from mmpeft_ds.errors import BadInput
from mmpeft_ds.planning import cache, configs, microbatch, planner, report
from mmpeft_ds.planning.cluster import cluster
from tests.helpers.models import tiny_mllm
from tests.helpers.rank_scripts import planned

GIB = 2**30


@pytest.fixture(scope="module")
def resolved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    tiny_mllm.write(folder / "llava", "llava")
    return planned.resolved_of(folder, {"name": "own", "zero": {"stage": 3}})


@pytest.fixture(scope="module")
def make(resolved):
    """A plan for a cluster; counts are made once."""
    once = planner.Planner(resolved, microbatch.Filling(words=planned.WORDS))

    def of(machine, **changes):
        mine = dataclasses.replace(resolved.recipe.data, **changes)
        recipe = dataclasses.replace(resolved.recipe, data=mine)
        once.resolved = dataclasses.replace(resolved, recipe=recipe)
        found = configs.of(recipe, resolved.ds_config)
        return planner.make(once.resolved, found, machine, once.filling, once)

    return of


def test_the_fastest_that_fits_is_recommended(make):
    plan = make(cluster(2, 2, 16.0))
    assert plan.recommended is not None and not plan.recommended.refused
    fitting = [c for c in plan.choices if report.fits(c, plan.cluster) and not c.refused]
    assert plan.recommended.seconds.apart <= 1.01 * min(c.seconds.apart for c in fitting)


def test_where_nothing_fits_nothing_is_recommended(make, tmp_path):
    plan = make(cluster(1, 2, 1.01))
    assert plan.recommended is None and any("nothing fits" in line for line in report.verdict(plan))
    with pytest.raises(BadInput, match="none was written"):
        configs.write(str(tmp_path / "ds.json"), plan.recommended)
    assert not list(tmp_path.iterdir())


def test_ranks_without_samples_are_counted(make):
    plan = make(cluster(8, 8, 80.0), global_batch=16)
    assert plan.idle == 48 and any("48 compute on padding" in line for line in report.verdict(plan))
    assert plan.limits["samples run out"] == 17
    assert make(cluster(2, 8, 80.0), global_batch=16).idle == 0


@pytest.mark.parametrize(
    ("slots", "ranks", "accumulation"), [(16, 4, 1), (16, 4, 2), (17, 4, 1), (3, 8, 1), (24, 5, 3)]
)
def test_samples_of_a_micro_step_are_those_that_the_stream_hands_out(slots, ranks, accumulation):
    widths = {len(m) for r in range(ranks) for m in micro_slots(slots, r, ranks, accumulation)}
    assert widths == {planner.micro_samples(slots, ranks, accumulation)}


def test_packed_rows_hold_as_many_tokens_as_the_recipe_allows_and_no_more_than_there_are(make):
    """16 samples of 56 tokens each: the row of a rank, and how many of them a step takes."""
    length = make(cluster(1, 4, 80.0), pack=1).micro.row  # a sample with more has a row to itself
    assert make(cluster(1, 4, 80.0), pack=1).steps == 4
    for pack, ranks, row, steps in ((2 * length, 4, 2 * length, 2), (100 * length, 4, 4 * length, 1),
                                    (100 * length, 32, length, 1)):  # fmt: skip
        plan = make(cluster(1, ranks, 80.0), pack=pack)
        assert (plan.micro, plan.steps) == (microbatch.Size(row // length, row), steps)
        assert plan.idle == max(0, ranks - 16)


def test_a_row_of_texts_costs_what_they_cost_without_padding(resolved):
    """Texts of one length have no padding, so that rows and a row of theirs are as much work."""
    backbone = copy.copy(resolved.backbone)
    backbone.attention = text_attention.NAME
    mine = planner.Planner(dataclasses.replace(resolved, backbone=backbone), microbatch.Filling(words=planned.WORDS))
    four = mine.counts(microbatch.Size(4, 4 * mine.longest))[False]
    padded = planner.Planner(resolved, mine.filling).counts(microbatch.Size(4))[False]
    assert sum(four.flops.values()) == pytest.approx(sum(padded.flops.values()), rel=0.02)
    assert four.peak == pytest.approx(padded.peak, rel=0.1)
    two = mine.counts(microbatch.Size(2, 2 * mine.longest))[False]
    assert 1.8 < sum(four.flops.values()) / sum(two.flops.values()) < 2.2


def test_copies_inside_nodes_are_for_several_nodes(make):
    one, two = make(cluster(1, 4, 80.0)), make(cluster(2, 2, 80.0))
    assert not [c for c in one.choices if c.parts.get("hpZ copy")]
    names = {c.name for c in two.choices if c.parts.get("hpZ copy")}
    assert names == {"zero3_nodes", "zero3_nodes+qwZ"}
    assert all(c.refused == c.name.endswith("+qwZ") for c in two.choices)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_check_says_what_a_plan_says_and_counts_gradients_as_if_all_were_there_beside_the_activations(
    make, resolved, stage
):
    plan = make(cluster(2, 2, 80.0))
    chosen = next(c for c in plan.choices if c.name == f"zero{stage}")
    sizes = check.Sizes(plan.tensors, 1, moments=2)
    held = check.zero_bytes(sizes, {"zero_optimization": chosen.zero}, resolved.recipe, 4)
    gradients = chosen.parts.pop("gradients") + chosen.parts.pop("gradient buffers")
    steady = sum(size for part, size in chosen.parts.items() if part not in ("activations", "buffers"))
    assert gradients <= held - steady
    trained = sum(t.numel for t in plan.tensors if t.trained)
    assert held - steady >= 4 * trained / (4 if stage == 2 else 1)


@pytest.mark.parametrize("section", [{"name": "p_adapter"}, {"name": "lora", "r": 4}])
def test_adapters_that_use_autocast_are_counted(resolved, section):
    recipe = dataclasses.replace(resolved.recipe, method=section)
    recipe.engine = dataclasses.replace(recipe.engine, dtype="bfloat16", adapter_matmul="bfloat16")
    task = resolved.train[0].task
    half = planned.tiny_classifier.make_resolved(recipe, task)
    found = planner.Planner(half, microbatch.Filling(words=planned.WORDS)).counts(microbatch.Size(1))
    assert all(count.flops["bfloat16"] > 0 for count in found.values())


@pytest.mark.parametrize(
    "head", [{"tau": 0.5}, {"graph": "knn", "tau": -1.0}, {"variant": "v2"}, {"exchange": "ring"}, {"graph": "none"}]
)
def test_graphs_over_ranks_are_counted_with_what_they_send(tmp_path, head):
    made = planned.resolved_of(tmp_path, {"name": "head", "zero": {"stage": 1}, "head": {"r": 8, **head}})
    once = planner.Planner(made, microbatch.Filling(neighbours=3))
    alone, two, four = (once.counts(microbatch.Size(8), ranks)[False] for ranks in (1, 2, 4))
    assert not alone.sent and two.sent
    for kind, size in two.sent.items():  # rings: a share for each further rank, and of pairs a bit for each of more
        assert size < four.sent[kind]
    assert min(alone.peak, two.peak, four.peak) > 0


def test_a_slower_network_or_a_smaller_link_never_makes_a_step_faster(make):
    fast, slow = make(cluster(2, 2, 80.0)), make(cluster(2, 2, 80.0, nic=0.001))
    for a, b in zip(fast.choices, slow.choices, strict=True):
        assert b.seconds.apart > a.seconds.apart
    assert slow.limits["waiting for the network takes longer than computing"] == 4


def test_keys_and_values_of_an_evaluation_are_those_of_all_samples_of_a_batch(resolved, monkeypatch):
    task = SimpleNamespace(generation={"num_beams": 3, "max_new_tokens": 5}, couples_samples=False)
    asked = dataclasses.replace(resolved, validation=[SimpleNamespace(task=task)])
    model = AutoModelForImageTextToText.from_pretrained(resolved.backbone.options.model)
    config, limit = model.config.text_config, resolved.backbone.options.max_text_length

    def kept(length):
        cached = DynamicCache()
        model.get_decoder()(torch.zeros(1, length, dtype=torch.int64), past_key_values=cached, use_cache=True)
        assert len(cached.layers) == config.num_hidden_layers
        return 3 * sum(layer.keys.nbytes + layer.values.nbytes for layer in cached.layers)

    one = kept(limit + 5)
    assert cache.of(asked, model, microbatch.Filling(images=0)) == one
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    assert cache.of(asked, model, microbatch.Filling(images=2)) == kept(limit + 5 + 2 * (patches - 1)) > one

    def samples(ranks, **changes):
        data = dataclasses.replace(resolved.recipe.data, **changes)
        recipe = dataclasses.replace(resolved.recipe, data=data)
        return cache.samples(dataclasses.replace(asked, recipe=recipe), ranks)

    assert samples(2, global_batch=64) == samples(8, global_batch=64) == 16
    assert samples(2, global_batch=64, evaluation_batch=3) == 3 and samples(2, global_batch=5) == 5
    task.couples_samples = True
    assert samples(4, global_batch=64) == 16 and samples(8, global_batch=63) == 8
    monkeypatch.setattr(cache, "of", lambda *given: one)
    monkeypatch.setattr(cache, "samples", lambda found, ranks: 100 + ranks)
    planned_ = planner.make(resolved, {"own": {"stage": 1}}, cluster(1, 4, 16.0), microbatch.Filling(words=3))
    assert {choice.cache for choice in planned_.choices} == {104 * one}


def test_the_numbers_are_json_and_the_parts_add_up(make):
    plan = make(cluster(2, 2, 80.0))
    numbers = json.loads(json.dumps(report.as_dict(plan)))
    for choice in numbers["choices"]:
        assert sum(choice["bytes"].values()) + GIB == choice["total_bytes"]
    kept, recomputed = numbers["counts"]["kept"], numbers["counts"]["recomputed"]
    assert recomputed["peak"] < kept["peak"] and recomputed["flops"]["float32"] > kept["flops"]["float32"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(nodes=0), "--nodes"),
        (dict(gpus=-1), "--gpus-per-node"),
        (dict(hbm=0.0), "--hbm"),
        (dict(hbm=float("nan")), "--hbm"),
        (dict(hbm=0.5), "CUDA context"),
        (dict(link=0.0), "--link"),
        (dict(nic=-3.0), "--nic"),
        (dict(card="h1000"), "Known: a100-40"),
    ],
)
def test_machines_that_cannot_be_are_refused(changes, word):
    with pytest.raises(BadInput, match=word):
        cluster(**{"nodes": 1, "gpus": 8, "hbm": 80.0} | changes)
