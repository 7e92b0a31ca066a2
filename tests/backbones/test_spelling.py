"""Generated text: spelled as people write it, and right answers recognised whatever the tokenizer drops."""

import json
import types

import pytest
import torch

from mmpeft_ds.backbones.blip.tokens import BlipTokens
from mmpeft_ds.backbones.common.spelling import Spelling, spell
from mmpeft_ds.data.batch import Sample, pack
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.engine.assembly.forward import answer
from mmpeft_ds.metrics.ptb import tokenize
from mmpeft_ds.metrics.vqa import answer_score, vqa_accuracy
from mmpeft_ds.tasks.answering.options import Options as AnsweringOptions
from mmpeft_ds.tasks.answering.task import Answering
from mmpeft_ds.tasks.captioning.options import Options as CaptioningOptions
from mmpeft_ds.tasks.captioning.task import Captioning
from mmpeft_ds.tasks.instruction.options import Options as InstructionOptions
from mmpeft_ds.tasks.instruction.task import Instruction
from mmpeft_ds.tasks.vqa_generative.options import Options as VqaGenerativeOptions
from mmpeft_ds.tasks.vqa_generative.task import VqaGenerative
from tests.helpers.models.tiny_backbones import MAKERS
from tests.helpers.models.tiny_tokenizers import FAMILIES, word_piece

SPELLED = """
don't | it's | he's 5'10" | 5 o'clock | couldn't've | y'all | the dogs' toys | a man's hat | rock 'n' roll | the '90s
10:30 a.m. | 9:00pm | 16:9 | u.s.a. | e.g. this | p.m. | mr. smith's dog | no. 5 | ph.d. | www.google.com
$5.00 | 3.5% | 1,000 | 1,234,567 people | 72°f | -5°c | €20 | £3.50 | 20€ | #1 | 1/2 | 100% cotton | .5 | 60 km/h
12.5kg | 3.5ghz | .5in | 1,000kg | the 1,000th | $1,299usd | in 2010. 2nd place
t-shirt | 2-year-old | black-and-white | and/or | 24/7 | at&t | black & white | 2 + 2 | c++ | 3-1 | 18+ | 3–5
"yes" | he said "hi there" ok. | it says 'stop'. | (left) | what, me?! | cats, dogs and birds. | stop: go | [a] b; c
don’t | o'reilly | ma'am | d.c. | 6 ft. 2 in. | 1990's | me@mail.com | http://x.com/a
"""
TEXTS = [text.strip() for line in SPELLED.strip().splitlines() for text in line.split("|")]
CASED = ["New York, N.Y.", "It's a T-Shirt.", "José's café"]
GENERATIVE = ("blip", "clip_bart", "vision_text_decoder", "mllm")


@pytest.fixture(scope="module")
def tokenizers():
    return {family: make([*TEXTS, *CASED] * 3) for family, make in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
def tokenizer(tokenizers, request):
    return tokenizers[request.param]


def generated(tokenizer, text):
    """What a model gives that generates the tokens of `text`."""
    return Spelling(tokenizer).decode(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("family", ["uncased WordPiece", "words"])
def test_what_a_tokenizer_has_parted_is_spelled_as_people_write_it(tokenizers, family):
    tokenizer = tokenizers[family]
    for text in TEXTS:
        assert generated(tokenizer, text) == text
    plain = tokenizer.decode(tokenizer("10:30 a.m.", add_special_tokens=False)["input_ids"])
    assert plain != "10:30 a.m."  # the negative control: without spelling it is not


def test_spelling_adds_no_space_and_keeps_what_is_well_spelled():
    for text in (*TEXTS, *CASED, "a - b", "hi ( there )", 'x " y " z', "so ... it is", ""):
        assert spell(text).replace(" ", "") == text.replace(" ", "")
        assert spell(spell(text)) == spell(text)
    assert [text for text in TEXTS if spell(text) != text] == []


def test_the_tokens_of_a_text_are_the_same_however_it_is_spelled(tokenizer):
    for text in (*TEXTS, *CASED):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        again = tokenizer(Spelling(tokenizer).decode(ids), add_special_tokens=False)["input_ids"]
        if tokenizer.clean_up_tokenization_spaces is not True:
            assert again == ids


def test_a_right_answer_scores_1_and_a_wrong_one_0_in_every_family_of_tokenizers(tokenizer):
    as_generated = Spelling(tokenizer).as_generated
    outputs = GenerationOutput(torch.zeros(0), torch.zeros(0), as_generated=as_generated)
    answers = [*TEXTS, *CASED]
    for right in answers:
        said = generated(tokenizer, right)
        assert answer_score(outputs.spelled_as(said, [right]), [right]) == 1
        assert vqa_accuracy(outputs.spelled_as(said, [right] * 10), [right] * 10) == 1
        for other in answers:
            if as_generated(other) != said:
                assert outputs.spelled_as(said, [other]) == said
                assert answer_score(outputs.spelled_as(said, [other]), [other]) == 0


def test_a_part_that_the_tokenizer_does_not_know_is_equal_to_nothing():
    tokenizer = word_piece(["yes no 5 red"])
    spelling = Spelling(tokenizer)
    outputs = GenerationOutput(torch.zeros(0), torch.zeros(0), as_generated=spelling.as_generated)
    assert spelling.as_generated("☃") is None and spelling.as_generated("5 ☃") is None
    assert spelling.as_generated("") is None
    assert outputs.spelled_as("5", ["5 ☃"]) == "5" and outputs.spelled_as("", ["☃", ""]) == ""


def test_of_several_spellings_the_most_frequent_one_is_taken(tokenizers):
    as_generated = Spelling(tokenizers["uncased WordPiece"]).as_generated
    outputs = GenerationOutput(torch.zeros(0), torch.zeros(0), as_generated=as_generated)
    assert outputs.spelled_as("t-shirt", ["t - shirt", "T-shirt", "t-shirt", "T-shirt", "hat"]) == "T-shirt"
    assert GenerationOutput(torch.zeros(0), torch.zeros(0)).spelled_as("yes", ["Yes"]) == "yes"


def test_captions_are_scored_by_the_words_of_their_references(tokenizers):
    """Without spelling the words of "t - shirt" and "5. 00" are not those of the reference."""
    tokenizer = tokenizers["uncased WordPiece"]
    for text in ("don't", "10:30 a.m.", "$5.00", "t-shirt", "a man's hat", "1,000", "3.5%", "2-year-old"):
        assert tokenize(generated(tokenizer, text)) == tokenize(text)
    assert tokenize(tokenizer.decode(tokenizer("$5.00", add_special_tokens=False)["input_ids"])) != tokenize("$5.00")


class Saying:
    """A stand-in for the model of a backbone that generates given tokens, whatever it is asked."""

    def __init__(self, model, backbone, rows):
        self.rows, self.model = rows, model
        length = max(map(len, rows))
        self.ids = torch.tensor([row + [backbone.end] * (length - len(row)) for row in rows])

    def generate(self, input_ids=None, **_):
        prompt = input_ids if self.model.config.model_type.startswith("qwen") else self.ids[:, :0]
        return torch.cat([prompt, self.ids], 1)


@pytest.fixture(scope="module", params=GENERATIVE)
def backbone(request, tokenizers, tmp_path_factory):
    """A tiny backbone whose generated tokens are those of an uncased BERT."""
    made = MAKERS[request.param](tmp_path_factory.mktemp(request.param))
    made.check()
    tokenizer = tokenizers["uncased WordPiece"]
    if request.param == "blip":
        ids = types.SimpleNamespace(sep_token_id=3, pad_token_id=0, bos_token_id=len(tokenizer))
        made.decoded_by = {"_tokens": BlipTokens(tokenizer, ids)}
    else:
        made.decoded_by = {"_spelling": Spelling(tokenizer)}
    made.end = tokenizer.sep_token_id
    return made


def evaluated(backbone, task, records, said, tokenizers, monkeypatch):
    """Rows of an evaluation in which the model generates the tokens of `said`."""
    tokenizer = tokenizers["uncased WordPiece"]
    model, samples = backbone.build().eval(), []
    for number, record in enumerate(records):
        texts, targets = task.read_all(record, torch.Generator().manual_seed(0))
        transform = backbone.image_transform(False)
        image = transform(torch.full((3, 28, 28), 50 * number, dtype=torch.uint8), None)
        samples.append(Sample(str(number), 1.0, [image], texts, targets, record))
    batch = pack(samples, backbone.collate_images, backbone.collate_texts, task.collate)
    rows = tokenizer(said, add_special_tokens=False)["input_ids"]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model, "generate", Saying(model, backbone, rows).generate)
        for name, value in backbone.decoded_by.items():
            patch.setitem(backbone.__dict__, name, value)
        if "_tokens" in backbone.decoded_by:  # prompts are packed already, for another tokenizer
            patch.setattr(backbone, "_prompts", lambda batch, left: {})
        return task.predict(answer(model, backbone, task, batch), batch)


def questions(answers):
    return [{"questions": [{"question": "what is it", "answers": [a] * 10}]} for a in answers]


def conversations(answers):
    return [{"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": a}]} for a in answers]


ASKED = ["10:30 a.m.", "Don't", "$5.00", "T-Shirt", "u.s.a."]
FREELY = VqaGenerativeOptions(evaluate="write", listed_only=False)
TASKS = {
    "answering": (Answering, AnsweringOptions(), questions, "accuracy"),
    "vqa_generative": (VqaGenerative, FREELY, questions, "accuracy"),
    "instruction": (Instruction, InstructionOptions(max_new_tokens=8), conversations, "exact_match"),
}


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_scores_right_answers_of_every_generative_backbone(backbone, tokenizers, monkeypatch, name):
    entry, options, records, metric = TASKS[name]
    task = entry(options, None)
    rows = evaluated(backbone, task, records(ASKED), ASKED, tokenizers, monkeypatch)
    assert [row["prediction"] for row in rows] == ASKED and task.score(rows)[metric] == 1
    wrong = [*ASKED[1:], ASKED[0]]
    rows = evaluated(backbone, task, records(ASKED), wrong, tokenizers, monkeypatch)
    assert [row["prediction"] for row in rows] == [text.lower() for text in wrong] and task.score(rows)[metric] == 0
    assert json.dumps(rows)


def test_captions_of_every_generative_backbone_are_spelled(backbone, tokenizers, monkeypatch):
    task = Captioning(CaptioningOptions(max_new_tokens=8), None)
    records = [{"captions": [text]} for text in ASKED]
    rows = evaluated(backbone, task, records, ASKED, tokenizers, monkeypatch)
    assert [row["prediction"] for row in rows] == [text.lower() for text in ASKED]
    assert task.score(rows)["bleu1"] == pytest.approx(1)


def test_a_choice_comes_back_as_it_is_written(tokenizers):
    tokenizer, choices = tokenizers["uncased WordPiece"], ["T-Shirt", "10:30 a.m."]
    ids = tokenizer(choices, add_special_tokens=False)["input_ids"]
    assert Spelling(tokenizer).decode_all(ids, choices) == choices
    assert Spelling(tokenizer).decode_all(ids, ["other"]) == ["t-shirt", "10:30 a.m."]
