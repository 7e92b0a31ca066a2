"""Conversations: turns, what enters the loss, weights, rows and scores; through a tiny multimodal model."""

import math

import peft
import pytest
import torch

from mmpeft_ds.backbones.mllm.backbone import ENTRY
from mmpeft_ds.backbones.mllm.backbone import Options as MllmOptions
from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.engine.assembly.forward import answer, forward
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.methods import get
from mmpeft_ds.sites import find_sites
from mmpeft_ds.tasks.instruction.task import Instruction, Options
from tests.helpers.models import tiny_mllm


def said(*turns):
    names = {"h": "human", "g": "gpt", "s": "system"}
    return {"conversations": [{"from": names[t[0]], "value": t[1:]} for t in turns]}


ONE = said("h<image>\nwhat color is it ?", "gred .")
LONG = said("sa big circle", "his it round ?<image>", "gyes .", "hwhat shape is it ?", "ga big circle .", "hand ?")
ONLY_TEXT = said("gno", "his there a square ?", "gno .")


def read(record, **options):
    texts, targets = Instruction(Options(**options), None).read(record, torch.Generator())
    assert targets == [{}]
    return texts[0]


def test_a_conversation_becomes_its_last_question_and_answer_behind_all_earlier_turns():
    assert read(ONE) == Prompted("<image>\nwhat color is it ?", "red .")
    turns = (("system", "a big circle"), ("user", "is it round ?<image>"), ("assistant", "yes ."))
    assert read(LONG) == Prompted("what shape is it ?", "a big circle .", turns)
    assert read(ONLY_TEXT) == Prompted("is there a square ?", "no .")


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"conversations": "hello"},
        {"conversations": [{"from": "human"}]},
        {"conversations": [{"from": "somebody", "value": "hello"}]},
        said("his it ?"),
        said("his it ?", "hor not ?", "gyes"),
        said("his it ?", "gyes", "gor no"),
        said("his it ?", "gyes", "snew rules", "hand ?", "gno"),
        said("his it ?", "g<image>"),
        said("his it ?", "g "),
    ],
)
def test_what_is_no_conversation_is_a_bad_sample(record):
    with pytest.raises(BadSample):
        read(record)


@pytest.mark.parametrize("options", [{"loss": "mean"}, {"num_beams": 0}, {"max_new_tokens": -1}])
def test_impossible_options_are_refused_in_one_line(options):
    with pytest.raises(BadInput) as error:
        Instruction(Options(**options), None)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    made = ENTRY(MllmOptions(tiny_mllm.write(tmp_path_factory.mktemp("llava"), "llava")), None)
    made.check()
    return made


@pytest.fixture(scope="module")
def model(backbone):
    return backbone.build().eval()


def batch(backbone, task, *records, weights=None):
    samples = []
    for i, record in enumerate(records):
        texts, targets = task.read(record, torch.Generator())
        images = [torch.full((3, 8, 8), 60, dtype=torch.uint8)] * (1 if "<image>" in str(record) else 0)
        images = [backbone.image_transform(True)(image) for image in images]
        samples.append(Sample(f"set/{i}", 1.0 if weights is None else weights[i], images, texts, targets, record))
    return pack(samples, backbone.collate_images, backbone.collate_texts, task.collate)


@pytest.mark.parametrize("loss", ["token", "conversation"])
def test_losses_of_batches_add_up_and_weight_zero_is_absent(backbone, model, loss):
    task = Instruction(Options(loss=loss), None)
    with torch.no_grad():
        together = batch(backbone, task, ONE, LONG, ONLY_TEXT)
        whole = task.loss(forward(model, backbone, together), together)
        parts = []
        for record in (ONE, LONG, ONLY_TEXT):
            alone = batch(backbone, task, record)
            parts.append((task.loss(forward(model, backbone, alone), alone), task.weight(alone)))
        torch.testing.assert_close(whole, sum(p[0] for p in parts), rtol=1e-5, atol=1e-5)
        assert task.weight(together) == sum(p[1] for p in parts) == {"token": 3 + 8 + 3, "conversation": 3}[loss]
        without = batch(backbone, task, ONE, LONG, ONLY_TEXT, weights=[1, 0, 1])
        outputs = forward(model, backbone, without)
        outputs.logits[1] = float("nan")
        torch.testing.assert_close(task.loss(outputs, without), parts[0][0] + parts[2][0], rtol=1e-5, atol=1e-5)
        assert task.weight(without) == parts[0][1] + parts[2][1]
        assert [r["sample_id"] for r in task.predict(outputs, without)] == ["set/0", "set/2"]


def test_rows_hold_what_was_written_and_how_likely_the_given_answers_were(backbone, model):
    task = Instruction(Options(max_new_tokens=4), None)
    packed = batch(backbone, task, ONE, LONG, ONLY_TEXT)
    with torch.no_grad():
        outputs = answer(model, backbone, task, packed)
    rows = task.predict(outputs, packed)
    assert [r["answer"] for r in rows] == ["red .", "a big circle .", "no ."]
    assert [r["tokens"] for r in rows] == [3, 8, 3]
    assert [r["prediction"] for r in rows] == outputs.generated
    scores = task.score(rows)
    loss = task.loss(outputs, packed) / task.weight(packed)
    assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert set(scores) == {"perplexity", "token_accuracy", "exact_match"}
    silent = Instruction(Options(max_new_tokens=0), None)
    assert silent.generation is None and "exact_match" not in silent.score(rows)


def test_scores_of_rows_made_by_hand():
    task = Instruction(Options(), None)
    logits = torch.full((2, 3, 5), -50.0)
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]])
    logits[0, 1, 1] = logits[0, 2, 4] = logits[1, 2, 3] = 50.0
    packed = pack(
        [
            Sample("a", 1.0, [], [Prompted("q", "One  two")], [{}]),
            Sample("b", 1.0, [], [Prompted("q", "three")], [{}]),
        ],
        lambda i: {},
        lambda t: {"labels": labels},
        task.collate,
    )
    rows = task.predict(GenerationOutput(logits, labels, ["one two", "four"]), packed)
    scores = task.score(rows)
    assert scores["token_accuracy"] == pytest.approx(2 / 3) and scores["exact_match"] == 0.5
    assert scores["perplexity"] == pytest.approx(math.exp(100 / 3), rel=1e-3)
    assert task.score([]) == {}


def test_questions_of_somebody_new_need_no_answer(backbone, model):
    task = Instruction(Options(max_new_tokens=3), None)
    record, targets = task.ask(["is it round ?"])
    sample = Sample("x", 1.0, [], [task.prompted("is it round ?")], targets, record)
    packed = pack([sample], backbone.collate_images, backbone.collate_texts, task.collate)
    assert task.weight(packed) == 0
    with torch.no_grad():
        (row,) = task.predict(answer(model, backbone, task, packed), packed)
    assert row["tokens"] == 0 and "exact_match" not in task.score([row])


def test_the_prior_is_the_most_frequent_last_answer():
    task = Instruction(Options(), None)
    train = [ONE, ONLY_TEXT, said("his it ?", "gNo  ."), {"conversations": "damaged"}]
    assert task.baselines(train, [ONLY_TEXT, LONG]) == {"majority_exact_match": 0.5}
    assert task.baselines([], [ONE]) == {}


def test_lora_learns_a_conversation_by_heart(backbone):
    base = backbone.build()
    config = get("lora").prepare(peft.LoraConfig(r=8, lora_alpha=16), base, find_sites(base))
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    task = Instruction(Options(max_new_tokens=6), None)
    packed = batch(backbone, task, ONE, ONLY_TEXT)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    for _ in range(40):
        optimizer.zero_grad()
        loss = task.loss(forward(model, backbone, packed), packed) / task.weight(packed)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = task.score(task.predict(answer(model.eval(), backbone, task, packed), packed))
    assert scores["exact_match"] == 1.0 and scores["token_accuracy"] == 1.0 and scores["perplexity"] < 1.5
