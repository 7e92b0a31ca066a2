"""An adapter directory as lmms-eval asks it, by requests in that library's form; lmms-eval itself is not needed."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mmpeft_ds import adapter
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput
from mmpeft_ds.runs.lmms_model import AdapterAnswers
from tests.helpers.runs import tiny_adapters

QUESTIONS = ["what color is it", "is there a red circle"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_adapters.export(tmp_path_factory.mktemp("lmms"), "instruction")


@pytest.fixture(scope="module")
def model(directory):
    made = AdapterAnswers(str(directory), "cpu", 1)
    made.task_dict = {"t": {"test": [{"question": q} for q in QUESTIONS]}}
    return made


def picture(document):
    return [Image.new("RGB", (24, 20), (255, 0, 0))]


def generation(number, visuals=picture, **options):
    return SimpleNamespace(args=(QUESTIONS[number], options, visuals, number, "t", "test"))


def test_answers_are_those_of_predict(model, directory):
    told = model.generate_until([generation(i, max_new_tokens=3, temperature=0) for i in range(2)])
    red = torch.zeros(3, 20, 24, dtype=torch.uint8)
    red[0] = 255
    rows = adapter.load(directory).predict([red, red], QUESTIONS)
    assert told == [row["prediction"].strip() for row in rows] and any(told)


@pytest.mark.parametrize("pixels", ["shown", "published"])
def test_pictures_are_read_by_the_rule_of_the_training(model, monkeypatch, pixels):
    """Half transparent, turned by its metadata: as a file of the same picture is read."""
    monkeypatch.setattr(model.loaded.recipe.data, "pixels", pixels)
    file, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6
    Image.new("RGBA", (6, 4), (200, 0, 0, 128)).save(file, "PNG", exif=turned)
    visual = Image.open(io.BytesIO(file.getvalue()))
    sample = model._sample(QUESTIONS[0], lambda document: [visual], 0, "t", "test")
    expected = model.loaded.sample("t/test/0", file.getvalue(), QUESTIONS[0])
    torch.testing.assert_close(sample.images, expected.images, rtol=0, atol=0)


def test_what_is_no_picture_is_one_line(model):
    with pytest.raises(BadInput, match="a str among what a task shows"):
        model._sample(QUESTIONS[0], lambda document: ["a.png"], 0, "t", "test")


def test_an_answer_ends_before_the_text_that_ends_it(model, monkeypatch):
    monkeypatch.setattr(model.loaded.backbone, "generate", lambda *given, **options: ["red; or blue"])
    assert model.generate_until([generation(0, until=[";"])]) == ["red"]
    assert model.generate_until([generation(0, until="or")]) == ["red;"]


def test_texts_without_a_picture_are_answered(model):
    assert isinstance(model.generate_until([generation(0, visuals=lambda document: [], max_new_tokens=2)])[0], str)


def test_losses_are_the_means_over_the_labels_in_the_logits(model):
    request = SimpleNamespace(args=(QUESTIONS[0], " red", picture, 0, "t", "test"))
    ((value, greedy),) = model.loglikelihood([request])
    sample = model._sample(QUESTIONS[0], picture, 0, "t", "test")
    sample.texts = [Prompted(QUESTIONS[0], "red")]
    batch = model.loaded.pack([sample], 0)
    with torch.no_grad():
        outputs = forward(model.loaded.model, model.loaded.backbone, batch)
    total, count = outputs.token_losses()
    assert value == pytest.approx(float(total[0] / count[0]), abs=1e-5)
    assert 0 < value < math.inf and greedy is False


def test_what_is_cut_of_questions_and_of_answers_to_choose_from_is_counted(model, caplog):
    long, picked = "is it a big red circle " * 30, SimpleNamespace
    model.generate_until([generation(0, max_new_tokens=2)])
    assert not caplog.records
    asked = picked(args=(long, {"max_new_tokens": 2}, picture, 0, "t", "test"))
    model.generate_until([asked, asked])
    assert "2 conversations longer than backbone.max_text_length (60), cut to fit" in caplog.text
    caplog.clear()
    model.loglikelihood([picked(args=(QUESTIONS[0], long, picture, 0, "t", "test"))])
    assert "1 answer longer than" in caplog.text


def test_control_tokens_in_questions_to_a_model_that_picks_are_counted(model, monkeypatch, caplog):
    monkeypatch.setattr(type(model.loaded.backbone), "generates", False)
    monkeypatch.setattr(model.loaded, "answer", lambda samples: [{"prediction": "yes", "control_tokens": 2}])
    assert model.generate_until([generation(0)]) == ["yes"]
    assert "1 text with control tokens" in caplog.text


def test_what_is_not_offered_is_refused(directory):
    with pytest.raises(BadInput, match="batch_size: 8"):
        AdapterAnswers(str(directory), "cpu", 8)
    with pytest.raises(BadInput, match="model_args: pretrained unknown"):
        AdapterAnswers(str(directory), pretrained="x")
