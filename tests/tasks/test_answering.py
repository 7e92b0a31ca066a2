"""Questions answered in words: targets drawn by their scores, the published loss, what is asked of the model."""

from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.tasks.answering.task import Answering, Options
from mmpeft_ds.tasks.base import TaskBase

TEN = ["red"] * 2 + ["blue"] + ["Green."] * 7


def record(*questions):
    return {"questions": [{"question": q, "answers": a} for q, a in questions]}


def drawn(task, answers, seed):
    (text,), (target,) = task.read(record(("what color?", answers)), torch.Generator().manual_seed(seed))
    return text, target


def test_it_is_a_task_that_asks_for_words():
    task = Answering(Options(), None)
    assert isinstance(task, TaskBase)
    assert task.generation == {"num_beams": 1, "max_new_tokens": 10}
    closed = Answering(Options(choices=["true", "false"]), None)
    assert closed.generation["choices"] == ["true", "false"]


def test_an_answer_is_drawn_in_proportion_to_its_score():
    task = Answering(Options(prompt="vqa: "), None)
    found = [drawn(task, TEN, seed) for seed in range(400)]
    assert {text.prompt for text, _ in found} == {"vqa: what color?"}
    scores = {"red": 0.6, "blue": 0.3, "Green.": 1.0}
    assert all(target["score"] == pytest.approx(scores[text.target]) for text, target in found)
    counts = Counter(text.target for text, _ in found)
    for answer, score in scores.items():
        assert counts[answer] / 400 == pytest.approx(score / 1.9, abs=0.08)
    assert drawn(task, TEN, 5) == drawn(task, TEN, 5)


@pytest.mark.parametrize(("target", "answers"), [("sample", ["Green.", "red", "blue"]), ("best", ["Green."])])
def test_every_text_that_training_may_draw_is_known_beforehand(target, answers):
    task = Answering(Options(prompt="vqa: ", target=target), None)
    texts = task.every_text(record(("what color?", TEN), ("why?", [])))
    assert texts == [*(Prompted("vqa: what color?", answer) for answer in answers), Prompted("vqa: why?", "")]


def test_the_best_answer_and_those_of_the_list_alone():
    best = Answering(Options(target="best"), None)
    assert {drawn(best, TEN, seed)[0].target for seed in range(20)} == {"Green."}
    listed = Answering(Options(listed_only=True), ["red", "green"])
    assert {drawn(listed, TEN, seed)[0].target for seed in range(60)} == {"red", "green"}
    assert drawn(listed, ["blue"], 0) == (Prompted("what color?", ""), {"question": 0, "score": 0.0, "weight": 1.0})


def test_an_empty_answer_is_never_what_the_model_learns_to_say():
    task = Answering(Options(), None)
    assert {drawn(task, ["", " ", "red"], seed)[0].target for seed in range(20)} == {"red"}
    assert drawn(task, ["", " \n"], 0)[1] == {"question": 0, "score": 0.0, "weight": 1.0}
    (text,), (target,) = task.read_all(record(("what color?", [""] * 9 + ["red"])), None)
    assert text.target == "red" and target["score"] == pytest.approx(0.3)


def test_questions_can_be_limited_to_some_that_are_drawn():
    task = Answering(Options(max_questions=2), None)
    asked = record(*((f"q{i}", ["a"]) for i in range(5)))
    seen = set()
    for seed in range(20):
        texts, targets = task.read(asked, torch.Generator().manual_seed(seed))
        assert [t.prompt for t in texts] == [f"q{t['question']}" for t in targets] and len(texts) == 2
        seen |= {t["question"] for t in targets}
    assert seen == set(range(5))


def written(lengths, seed=0):
    """Logits and labels of texts of these lengths; length 0 asks nothing."""
    g = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    labels = torch.randint(0, 7, (len(lengths), longest), generator=g)
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return GenerationOutput(torch.randn(len(lengths), longest, 7, generator=g, dtype=torch.float64), labels)


def batch(task, slots):
    """Slots of (weight, answers of each question)."""
    samples = []
    for i, (weight, questions) in enumerate(slots):
        given = record(*((f"q{j}", answers) for j, answers in enumerate(questions)))
        texts, targets = task.read(given, torch.Generator().manual_seed(i))
        samples.append(Sample(f"s{i}", weight, [], texts, targets, given))
    return pack(samples, lambda x: {}, lambda x: {}, task.collate)


@pytest.mark.parametrize("score_weight", [True, False])
def test_the_loss_is_the_mean_over_tokens_times_the_score_summed_over_questions(score_weight):
    task = Answering(Options(score_weight=score_weight, target="best"), None)
    # soft score 0.6, nobody knows, 1 (padding: weight 0), 1 at weight 0.5
    two = ["x", "x", *"abcdefgh"]
    given = batch(task, [(1.0, [two, []]), (0.0, [["y"]]), (0.5, [["z"]])])
    outputs = written([3, 0, 2, 4])
    outputs.logits[2] = float("nan")
    means = [cross_entropy(outputs.logits[i, :n], outputs.labels[i, :n]) for i, n in ((0, 3), (3, 4))]
    scores = [0.6, 1.0] if score_weight else [1.0, 1.0]
    want = means[0] * scores[0] + 0.5 * means[1] * scores[1]
    torch.testing.assert_close(task.loss(outputs, given), want, rtol=1e-6, atol=1e-6)
    assert task.weight(given) == 1.5


def test_the_weight_of_a_question_is_a_factor_of_its_loss_and_it_counts_as_one():
    task = Answering(Options(target="best"), None)
    given = batch(task, [(1.0, [["x"], ["y"]])])
    weighted = batch(task, [(1.0, [["x"], ["y"]])])
    targets = [{"question": 0, "score": 1.0, "weight": weight} for weight in (1.0, 0.2)]
    weighted.targets["weight"] = task.collate(targets)["weight"]
    outputs = written([3, 2])
    means = [cross_entropy(outputs.logits[i, :n], outputs.labels[i, :n]) for i, n in ((0, 3), (1, 2))]
    torch.testing.assert_close(task.loss(outputs, weighted), means[0] + 0.2 * means[1])
    torch.testing.assert_close(task.loss(outputs, given), means[0] + means[1])
    assert task.weight(weighted) == task.weight(given) == 2
    asked = {"questions": [{"question": "?", "answers": ["x"], "weight": 0.2}]}
    assert task.read_all(asked, None)[1][0]["weight"] == 0.2


def test_rows_hold_the_question_without_its_prompt_and_are_scored_officially():
    task = Answering(Options(prompt="vqa: "), None)
    given = batch(task, [(1.0, [TEN, ["one"]]), (0.0, [["y"]])])
    outputs = written([1, 1, 1])
    outputs.generated = ["red", "One", "y"]
    rows = task.predict(outputs, given)
    assert [(r["text"], r["prediction"]) for r in rows] == [("q0", "red"), ("q1", "One")]
    # two of ten annotators: 8 of the ten leave-one-out subsets have both (2/3), two have one (1/3)
    official = (8 * 2 / 3 + 2 * 1 / 3) / 10
    assert task.score(rows) == {"accuracy": pytest.approx((official + 1) / 2)}
    assert task.baselines([record(("q", ["red"]))], [record(("q", ["red"]))])["majority"] == 1.0


def test_new_questions_are_asked_with_the_prompt():
    task = Answering(Options(prompt="gpa: "), None)
    asked, targets = task.ask(["is it?"])
    assert task.prompted("is it?") == Prompted("gpa: is it?")
    assert targets == [{"question": 0, "score": 0.0, "weight": 1.0}]
    assert asked["questions"][0]["question"] == "is it?"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_questions": -1}, "max_questions"),
        ({"choices": ["true"]}, "choices"),
        ({"choices": ["true", "true"]}, "choices"),
        ({"listed_only": True}, "no label list"),
    ],
)
def test_what_cannot_work_is_refused(options, says):
    with pytest.raises(BadInput, match=says):
        Answering(Options(**options), None)


def test_a_record_without_questions_is_a_bad_sample():
    with pytest.raises(BadSample, match="questions"):
        Answering(Options(), None).read({"questions": "what?"}, torch.Generator())


def test_a_tiny_clip_bart_learns_its_answers_and_writes_them(tmp_path):
    """Loss, labels, prompts, generation and score belong together: what is learned by heart is written."""
    from tests.helpers.models import tiny_clip_bart

    torch.manual_seed(0)
    tiny_clip_bart.write_bart(tmp_path / "bart", scale=0.1)
    backbone = tiny_clip_bart.make(tmp_path)
    task = Answering(Options(prompt="vqa : ", max_new_tokens=5), None)
    model = backbone.build().requires_grad_(True)
    samples = []
    for i, answer in enumerate(["red", "blue", "a big circle", "no"]):
        given = record(("what is it", [answer]))
        texts, targets = task.read(given, torch.Generator())
        samples.append(Sample(f"s{i}", 1.0, [tiny_clip_bart.grid(i)], texts, targets, given))
    given = pack(samples, backbone.collate_images, backbone.collate_texts, task.collate)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def scored():
        model.eval()
        outputs = backbone.read(model(**backbone.inputs(given)), given)
        outputs.generated = backbone.generate(model, given, **task.generation)
        return task.score(task.predict(outputs, given))["accuracy"]

    assert scored() < 0.5
    for _ in range(200):
        loss = task.loss(backbone.read(model(**backbone.inputs(given)), given), given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.3:
            break
    assert loss < 0.3 and scored() == 1.0
