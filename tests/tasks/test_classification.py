"""Classification: texts that know no label, classes by name, restricted columns, weighted terms, scores."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmpeft_ds.backbones.features.model import ClassificationOutput
from mmpeft_ds.data.batch import Described, Sample, pack
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.tasks.classification.task import Classification, Options

LABELS = ["bird", "fruit", "tool", "fish"]


def record(label, **more):
    return {"label": label, "class_name": LABELS[label], "captions": ["first words", "second words", "third"], **more}


def task(labels=None, classes=None, **options):
    made = Classification(Options(**options), LABELS)
    made.use_source(labels or LABELS, classes)
    return made


def batch(of, *records, weights=None, slots=()):
    samples = []
    for i, r in enumerate(records):
        texts, targets = of.read_all(r, torch.Generator())
        samples.append(Sample(f"set/{i}", 1.0 if weights is None else weights[i], [], texts, targets, r))
    samples += [Sample() for _ in slots]
    return pack(samples, lambda i: {}, lambda t: {"n": torch.zeros(len(t), 1)}, of.collate)


def out(logits, terms=None):
    return ClassificationOutput(logits=logits, terms=terms)


def random(rows, seed=1, dtype=torch.float64):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_loss_is_the_weighted_sum_of_cross_entropies_over_the_terms():
    of = task()
    packed = batch(of, record(0), record(2), record(3))
    a, b = random(3, 1).requires_grad_(), random(3, 2).requires_grad_()
    target = torch.tensor([0, 2, 3])
    by_hand = cross_entropy(a, target, reduction="sum") + 0.1 * cross_entropy(b, target, reduction="sum")
    wanted = torch.autograd.grad(by_hand, (a, b))
    loss = of.loss(out(a + b, [(1.0, a), (0.1, b)]), packed)
    torch.testing.assert_close(loss, by_hand, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, (a, b)), wanted, rtol=1e-12, atol=0)
    plain = of.loss(out(a), packed)  # no terms: the logits alone
    torch.testing.assert_close(plain, cross_entropy(a, target, reduction="sum"), rtol=1e-12, atol=0)
    assert of.weight(packed) == 3


def test_half_precision_logits_give_a_float32_loss():
    of = task()
    packed = batch(of, record(0), record(2))
    logits = random(2).to(torch.bfloat16)
    loss = of.loss(out(logits), packed)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), torch.tensor([0, 2]), reduction="sum"))


def test_a_row_without_weight_or_known_class_is_absent_from_loss_and_gradient_even_if_not_finite():
    of = task()
    packed = batch(of, record(0), record(2), record(3), weights=[1.0, 0.0, 1.0])
    packed.targets["label"][2] = -1
    logits = random(3)
    logits[1] = float("nan")
    logits.requires_grad_()
    loss = of.loss(out(logits), packed)
    loss.backward()
    torch.testing.assert_close(loss.detach(), cross_entropy(logits.detach()[:1], torch.tensor([0])))
    assert of.weight(packed) == 1
    assert logits.grad[2].abs().sum() == 0 and logits.grad[0].abs().sum() > 0
    assert [row["sample_id"] for row in of.predict(out(logits), packed)] == ["set/0", "set/2"]


def test_a_micro_batch_of_padding_alone_has_a_loss_of_zero_that_reaches_every_term():
    of = task()
    packed = batch(of, slots=(1, 2))
    a, b = random(0).requires_grad_(), random(0).requires_grad_()
    loss = of.loss(out(a, [(1.0, a), (0.5, b)]), packed)
    loss.backward()
    assert loss == 0 and a.grad is not None and b.grad is not None
    assert of.weight(packed) == 0 and of.predict(out(a), packed) == []


def test_texts_do_not_depend_on_the_label():
    of = task(text="captions")
    for read in (of.read, of.read_all):
        texts = {str(read(record(i), torch.Generator().manual_seed(3))[0][0]) for i in range(4)}
        assert len(texts) == 1


def test_permuted_labels_leave_every_prediction_as_it_is():
    of = task(text="captions")
    logits = random(4)
    rows = [of.predict(out(logits), batch(of, *(record(i) for i in p))) for p in ([0, 1, 2, 3], [3, 2, 0, 1])]
    kept = [[(r["sample_id"], r["text"], r["prediction"], r["probability"]) for r in of_order] for of_order in rows]
    assert kept[0] == kept[1]
    assert [r["answer"] for r in rows[0]] != [r["answer"] for r in rows[1]]


def test_captions_are_drawn_in_training_and_the_first_in_evaluation_with_their_own_features():
    of = task(text="captions")
    stored = torch.arange(6.0).reshape(3, 2)
    drawn = set()
    for seed in range(20):
        (text,), _ = of.read(record(1, text=stored), torch.Generator().manual_seed(seed))
        torch.testing.assert_close(text.features, stored[record(1)["captions"].index(text.text)])
        drawn.add(text.text)
    assert drawn == set(record(1)["captions"])
    (text,), _ = of.read_all(record(1, text=stored), torch.Generator().manual_seed(7))
    assert text.text == "first words" and text.features.tolist() == [0.0, 1.0]
    assert of.fields == ("label", "captions") and task().fields == ("label",)


def test_without_captions_there_is_one_empty_text():
    (text,), (target,) = task().read(record(1, text=torch.zeros(3, 2)), torch.Generator())
    assert text == Described() and target == {"label": 1}


def test_classes_of_another_data_set_meet_by_name_whatever_their_number():
    of = task(labels=["tool", "bird"])
    assert of.read({"label": 0}, torch.Generator())[1] == [{"label": 2}]
    assert of.read({"label": 0, "class_name": "bird"}, torch.Generator())[1] == [{"label": 0}]


def test_columns_of_the_target_are_taken_before_softmax_and_argmax():
    logits = torch.tensor([[1.0, 9.0, 2.0, 8.0], [3.0, 9.0, 1.0, 9.0]])
    shift = [{"label": 0, "class_name": "tool"}, {"label": 1, "class_name": "bird"}]
    of = task(labels=["tool", "bird"])
    rows = of.predict(out(logits), batch(of, *shift))
    assert [r["prediction"] for r in rows] == ["tool", "bird"]
    torch.testing.assert_close(rows[0]["probability"], float(torch.tensor([1.0, 2.0]).softmax(0)[1]))
    wanted = cross_entropy(logits[:, [0, 2]], torch.tensor([1, 0]), reduction="sum")
    torch.testing.assert_close(of.loss(out(logits), batch(of, *shift)), wanted)
    of = task(labels=["tool", "bird"], columns="all")
    assert {r["prediction"] for r in of.predict(out(logits), batch(of, *shift))} == {"fruit"}


def test_a_subset_of_classes_restricts_the_columns_and_refuses_samples_of_the_others():
    of = task(classes=["fish", "bird"])
    assert of.read(record(3), torch.Generator())[1] == [{"label": 3}]
    with pytest.raises(BadSample, match="tool"):
        of.read(record(2), torch.Generator())
    rows = of.predict(out(torch.tensor([[0.0, 5.0, 5.0, 1.0]])), batch(of, record(0)))
    assert rows[0]["prediction"] == "fish" and rows[0]["answer"] == "bird" and rows[0]["label"] == 0


def test_scores_and_baseline():
    of = task()
    rows = [{"answer": a, "prediction": p} for a, p in [("bird", "bird"), ("bird", "bird"), ("tool", "fish")]]
    assert of.score([*rows, {"prediction": "bird"}]) == {
        "accuracy": pytest.approx(2 / 3),
        "mean_class_accuracy": pytest.approx(0.5),
    }
    assert of.score([]) == {}
    train = [record(0), record(2), record(2), record(0)]  # of equals the first in the alphabet
    assert of.baselines(iter(train), iter([record(0), record(2), record(0), record(3)])) == {"majority": 0.5}
    assert of.baselines([], [record(0)]) == {}


def test_asked_images_have_no_known_class():
    of = task()
    asked, targets = of.ask(["some words"])
    sample = Sample("photo.jpg", 1.0, [], [Described("some words")], targets, asked)
    packed = pack([sample], lambda i: {}, lambda t: {}, of.collate)
    (row,) = of.predict(out(random(1)), packed)
    assert set(row) == {"sample_id", "text", "prediction", "probability"} and row["text"] == "some words"


@pytest.mark.parametrize(
    "bad",
    [
        {"label": 4},
        {"label": True},
        {"label": "bird"},
        {"label": 1, "class_name": "cat"},
        {"label": 1, "captions": []},
        {"label": 1, "captions": "words"},
        {"label": 1, "captions": ["a", "b"], "text": torch.zeros(3, 2)},
    ],
)
def test_a_bad_record_is_a_bad_sample(bad):
    with pytest.raises(BadSample):
        task(text="captions").read({"captions": ["words"], **bad}, torch.Generator())


def test_a_data_set_without_labels_or_with_unknown_classes_is_refused_in_one_line():
    with pytest.raises(BadInput, match="label list"):
        Classification(Options(), None)
    for labels, classes in ((["bird", "cat"], None), (LABELS, ["cat"])):
        with pytest.raises(BadInput, match="'cat'") as caught:
            task(labels=labels, classes=classes)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_give_no_accuracy_at_all(broken):
    of = task()
    packed = batch(of, record(0), record(2))
    logits = 10 * torch.eye(4)[[0, 2]]
    assert of.score(of.predict(out(logits), packed))["accuracy"] == 1
    logits[0] = broken  # argmax would take the first class, which is right
    scores = of.score(of.predict(out(logits), packed))
    assert math.isnan(scores["accuracy"]) and math.isnan(scores["mean_class_accuracy"])


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(BadInput, match="'fish' names the classes 1, 3"):
        Classification(Options(), ["bird", "fish", "tool", "fish"])
