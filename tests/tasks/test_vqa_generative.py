"""Questions with weighted answers: the loss of the papers, ranking and writing through a tiny BLIP."""

import math

import pytest
import torch

from mmpeft_ds.backbones.blip import backbone as blip
from mmpeft_ds.data.batch import PackedBatch, Sample, pack
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.engine.assembly.forward import answer, forward
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.tasks.vqa_generative.task import ENTRY, Options
from tests.helpers.models import tiny_blip

RECORD = {
    "questions": [
        {"question": "What COLOR is it ?", "answers": ["red"] * 6 + ["blue"] * 3 + ["a square"]},
        {"question": "is it round ?", "answers": ["it is"]},
        {"question": "what ?", "answers": []},
    ]
}
LABELS = ["red", "blue", "it is"]


def read(task, everything=False):
    return (task.read_all if everything else task.read)(RECORD, torch.Generator().manual_seed(0))


def test_each_distinct_answer_is_a_text_weighted_by_its_share():
    texts, targets = read(ENTRY(Options(), LABELS))
    assert [(t.prompt, t.target) for t in texts] == [
        ("what color is it ?", "red"),
        ("what color is it ?", "blue"),
        ("what color is it ?", "a square"),
        ("is it round ?", "it is"),
    ]
    assert [t["weight"] for t in targets] == [0.6, 0.3, 0.1, 1.0] and [t["first"] for t in targets] == [1, 0, 0, 1]
    texts, targets = read(ENTRY(Options(listed_only=True, answer_weight=0.05, prompt="q: {} a:", clean=False), LABELS))
    assert [t.prompt for t in texts][0] == "q: What COLOR is it ? a:" and len(texts) == 3
    assert [t["weight"] for t in targets] == [0.05] * 3


def test_an_empty_answer_is_no_text():
    asked = {
        "questions": [{"question": "what ?", "answers": ["", "  ", "red"]}, {"question": "why ?", "answers": [" "]}]
    }
    task = ENTRY(Options(), LABELS)
    assert [text.target for text in task.read(asked, torch.Generator())[0]] == ["red"]
    texts, targets = task.read_all(asked, None)
    assert [text.target for text in texts] == ["red", ""] and [t["weight"] for t in targets] == [1.0, 0.0]


def batch_of(task, texts, targets, weight=1.0):
    samples = [Sample("a", weight, [], texts, targets, RECORD)]
    return pack(samples, lambda x: {}, lambda x: {"input_ids": torch.zeros(len(x), 1)}, task.collate)


def test_the_loss_is_the_weighted_sum_of_summed_token_losses_and_counts_questions():
    task = ENTRY(Options(), LABELS)
    batch = batch_of(task, *read(task))
    torch.manual_seed(0)
    logits, labels = (
        torch.randn(4, 3, 7, requires_grad=True),
        torch.tensor([[1, 2, -100], [3, 4, 5], [6, -100, -100], [1, 1, 2]]),
    )
    loss = task.loss(GenerationOutput(logits, labels), batch)
    each = [-sum(logits[i].log_softmax(1)[s, t] for s, t in enumerate(row) if t >= 0) for i, row in enumerate(labels)]
    torch.testing.assert_close(loss, 0.6 * each[0] + 0.3 * each[1] + 0.1 * each[2] + each[3])
    assert task.weight(batch) == 2
    smooth = ENTRY(Options(smoothing=0.1), LABELS).loss(GenerationOutput(logits, labels), batch)
    assert (smooth - loss).abs() > 1e-3
    absent = batch_of(task, *read(task), weight=0.0)
    assert task.weight(absent) == 0
    infinite = torch.full_like(logits, torch.inf)
    assert task.loss(GenerationOutput(infinite, labels), absent) == 0


def test_a_question_of_less_weight_counts_in_the_loss_by_it_and_among_the_questions_as_one():
    task = ENTRY(Options(clean=False), LABELS)
    questions = [{"question": "vqa?", "answers": ["red", "red", "blue"]}]
    questions.append({"question": "vg?", "answers": ["a man."], "weight": 0.2, "dataset": "vg"})
    batch = batch_of(task, *task.read({"questions": questions}, torch.Generator()))
    logits, labels = torch.zeros(3, 2, 8), torch.tensor([[1, 2], [3, -100], [4, 5]])  # ln 8 for each token
    loss = task.loss(GenerationOutput(logits, labels), batch)
    # ALBEF: an answer's tokens together, times its weight, divided by the number of questions.
    each = math.log(8)
    torch.testing.assert_close(loss / task.weight(batch), torch.tensor((2 / 3 * 2 + 1 / 3 * 1 + 0.2 * 2) * each / 2))
    del questions[1]["weight"]
    whole = batch_of(task, *task.read({"questions": questions}, torch.Generator()))
    torch.testing.assert_close(task.loss(GenerationOutput(logits, labels), whole) - loss, torch.tensor(0.8 * 2 * each))
    _, targets = task.read_all({"questions": [questions[1] | {"weight": 0.2}]}, None)
    assert targets[0]["weight"] == pytest.approx(0.2)


@pytest.mark.parametrize("weight", [-1, "1", True, math.nan, math.inf, None])
def test_a_weight_that_is_no_number_from_0_on_makes_the_sample_a_bad_one(weight):
    asked = {"questions": [{"question": "?", "answers": ["red"], "weight": weight}]}
    with pytest.raises(BadSample, match="`weight` of a question"):
        ENTRY(Options(), LABELS).read(asked, torch.Generator())


@pytest.mark.parametrize("form", ["captioner", "vqa"])
@pytest.mark.parametrize("how", ["rank", "write"])
def test_evaluation_answers_each_question_once(tmp_path, form, how):
    backbone = blip.ENTRY(blip.Options(model=tiny_blip.write(tmp_path, form), form=form), None)
    model = backbone.build().eval()
    task = ENTRY(Options(evaluate=how, max_new_tokens=4), LABELS)
    texts, targets = read(task, everything=True)
    pixels = backbone.image_transform(False)(torch.zeros(3, 8, 8, dtype=torch.uint8), None)
    batch: PackedBatch = pack(
        [Sample("a", 1.0, [pixels], texts, targets, RECORD)],
        backbone.collate_images,
        backbone.collate_texts,
        task.collate,
    )
    with torch.no_grad():
        outputs = answer(model, backbone, task, batch)
        rows = task.predict(outputs, batch)
    assert [r["text"] for r in rows] == [q["question"] for q in RECORD["questions"]]
    if how == "rank":
        assert all(r["prediction"] in LABELS for r in rows)
    assert task.weight(batch) == 2 and task.loss(outputs, batch).isfinite()
    assert set(task.score(rows)) == {"accuracy"}
    assert forward(model, backbone, batch).token_losses()[1][2] == 0  # nobody knows the answer


@pytest.mark.parametrize(
    ("options", "labels", "what"),
    [
        ({"k": 0}, LABELS, "task.k"),
        ({"smoothing": 1.0}, LABELS, "smoothing"),
        ({"prompt": "question"}, LABELS, "prompt"),
        ({"evaluate": "guess"}, LABELS, "evaluate"),
        ({}, None, "choose from"),
    ],
)
def test_bad_options_are_refused(options, labels, what):
    with pytest.raises(BadInput, match=what):
        ENTRY(Options(**options), labels)
