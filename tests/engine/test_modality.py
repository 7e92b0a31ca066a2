"""Batches that lack a modality get a slot of weight 0 that has it, and neither loss nor gradients change."""

import pytest
import torch

from mmpeft_ds.data.batch import Sample
from mmpeft_ds.engine.assembly import modality
from mmpeft_ds.engine.assembly.resolve import attach
from tests.helpers.runs import tiny_classifier


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modality")
    tiny_classifier.make_towers(folder)
    task = tiny_classifier.TinyTask()
    resolved = tiny_classifier.make_resolved(tiny_classifier.make_recipe(folder), task)
    return attach(resolved, resolved.backbone.build()).eval(), resolved.backbone, task


def text_only(backbone, task):
    return tiny_classifier.pack_slots(
        [Sample("a", 1.0, [], ["red is big ?"], [2]), Sample("b", 1.0, [], ["a"], [1])], backbone, task
    )


def test_a_batch_that_has_all_modalities_is_left_alone(parts):
    _, backbone, task = parts
    batch = text_only(backbone, task)
    assert modality.complete(batch, [0.0, 2.0], backbone, task) is batch


def test_the_added_slot_owns_what_is_missing_and_weighs_nothing(parts):
    _, backbone, task = parts
    batch = modality.complete(text_only(backbone, task), [1.0, 2.0], backbone, task)
    assert batch.modalities == {"image", "text"}
    assert batch.weight.tolist() == [1.0, 1.0, 0.0]
    assert batch.image_owner.tolist() == [2] and batch.text_owner.tolist() == [0, 1, 2]
    assert task.weight(batch) == 2.0 and batch.sample_id[2] == ""


def test_loss_and_gradients_do_not_change_and_the_tower_gets_a_gradient(parts):
    model, backbone, task = parts
    plain = text_only(backbone, task)
    results = []
    for batch in (plain, modality.complete(plain, [1.0, 1.0], backbone, task)):
        model.zero_grad()
        loss = task.loss(model(**backbone.inputs(batch)), batch)
        loss.backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-6, rtol=0)


def test_a_rank_with_nothing_but_padding_gets_a_slot_of_everything(parts):
    model, backbone, task = parts
    batch = modality.complete(tiny_classifier.pack_slots([], backbone, task), [1.0, 1.0], backbone, task)
    assert batch.modalities == {"image", "text"}
    assert task.loss(model(**backbone.inputs(batch)), batch).item() == 0.0


@pytest.mark.parametrize("slots", [[], [Sample()], [Sample("a", bad=("image", "shard", "a"))]])
def test_a_micro_step_that_is_empty_on_all_ranks_runs_and_weighs_nothing(parts, slots):
    """The last step of an epoch under accumulation, or nothing but bad samples."""
    model, backbone, task = parts
    batch = modality.complete(tiny_classifier.pack_slots(slots, backbone, task), [0.0, 0.0], backbone, task)
    loss = task.loss(model(**backbone.inputs(batch)), batch)
    loss.backward()
    assert loss.item() == 0.0 and task.weight(batch) == 0.0


def test_images_of_which_nobody_asks_anything_run(parts):
    model, backbone, task = parts
    picture = backbone.image_transform(False)(torch.zeros(3, 8, 8, dtype=torch.uint8), None)
    unasked = tiny_classifier.pack_slots([Sample("a", 1.0, [picture])], backbone, task)
    batch = modality.complete(unasked, [1.0, 0.0], backbone, task)
    assert task.loss(model(**backbone.inputs(batch)), batch).item() == 0.0


def test_a_dummy_row_wider_than_the_batch_is_cropped_and_a_narrower_one_padded():
    rows = {"ids": torch.ones(2, 3, dtype=torch.int64)}
    wide = modality._append(rows, {"ids": torch.full((1, 5), 7)})["ids"]
    narrow = modality._append(rows, {"ids": torch.full((1, 2), 7)})["ids"]
    assert wide[2].tolist() == [7, 7, 7] and narrow[2].tolist() == [7, 7, 0]
