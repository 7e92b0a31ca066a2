"""Evaluation in one process: every sample once, scores, and pictures for TensorBoard."""

from types import SimpleNamespace

import pytest
import torch

from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import streams
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.evaluator import evaluate
from tests.helpers.runs import tiny_adapters, tiny_classifier


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    from mmpeft_ds.engine.assembly.resolve import attach

    folder = tmp_path_factory.mktemp("evaluator")
    tiny_classifier.make_towers(folder)
    task = tiny_classifier.TinyTask()
    resolved = tiny_classifier.make_resolved(tiny_classifier.make_recipe(folder), task)
    return attach(resolved, resolved.backbone.build()), resolved.backbone, task


def steps_of(backbone, task, width: int) -> list[Step]:
    slots = [s for step in range(3) for s in tiny_classifier.global_slots(step, backbone)]
    batches = [slots[i : i + width] for i in range(0, len(slots), width)]
    return [Step(0, i, [tiny_classifier.pack_slots(batch, backbone, task)]) for i, batch in enumerate(batches)]


def test_batch_width_changes_neither_rows_nor_loss(parts):
    model, backbone, task = parts
    results = [evaluate(model, backbone, task, steps_of(backbone, task, width), "cpu") for width in (1, 5, 36)]
    for other in results[1:]:
        assert other.rows == results[0].rows
        assert other.scores["loss"] == pytest.approx(results[0].scores["loss"], rel=1e-5)


def test_the_mode_of_every_module_is_restored(parts):
    model, backbone, task = parts
    model.train()
    model.get_base_model().head.eval()
    before = {name: m.training for name, m in model.named_modules()}
    assert len(set(before.values())) == 2
    evaluate(model, backbone, task, steps_of(backbone, task, 12), "cpu")
    assert {name: m.training for name, m in model.named_modules()} == before


def test_pictures_are_kept_up_to_the_number_asked_for(parts):
    model, backbone, task = parts
    found = evaluate(model, backbone, task, steps_of(backbone, task, 12), "cpu", pictures=4).pictures
    assert len(found) == 4
    for image, rows in found:
        assert image.shape == (3, 8, 8) and image.min() >= 0 and image.max() <= 1
        assert len({row["sample_id"] for row in rows}) == 1


def test_bad_samples_are_absent_from_the_rows_and_counted(parts):
    model, backbone, task = parts
    result = evaluate(model, backbone, task, steps_of(backbone, task, 5), "cpu")
    assert result.bad == 3  # one in each of the three hand-made batches
    assert not {"t/0-3", "t/1-3", "t/2-3"} & {row["sample_id"] for row in result.rows}


def test_nothing_to_evaluate_gives_nan_and_no_rows(parts):
    _, backbone, _ = parts
    task = SimpleNamespace(score=lambda rows: {"accuracy": float(len(rows))}, weight=lambda b: 0.0, concludes=False)
    result = evaluate(torch.nn.Identity(), backbone, task, [], "cpu")
    assert result.rows == [] and result.scores["loss"] != result.scores["loss"]


def test_the_page_of_a_retrieval_run_on_stored_features_shows_what_was_found(tmp_path):
    resolved = resolve.resolve(tiny_adapters.recipe(tmp_path, "retrieval on stored features"))
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    stream = streams.make_stream(resolved, resolved.validation, ranks, train=False)
    model = resolve.attach(resolved, resolved.backbone.build())
    task = resolved.validation[0].task
    result = evaluate(model, resolved.backbone, task, stream.epoch(0), "cpu", pictures=3)
    stream.close()
    assert len(result.pictures) == 3
    for image, rows in result.pictures:
        (row,) = rows
        assert image is None and row["kind"] == "image_to_text" and row["prediction"] in tiny_adapters.CAPTIONS


def test_records_can_be_read_of_the_samples_that_were_scored_alone(tmp_path):
    (source,) = resolve.resolve(tiny_adapters.recipe(tmp_path, "retrieval on stored features")).validation
    everything = list(streams.records(source, True))
    some = {f"{source.manifest.name}/{source.options.split}-{number:09d}" for number in (1, 2)}
    assert len(everything) > 3 and list(streams.records(source, True, some)) == everything[1:3]
