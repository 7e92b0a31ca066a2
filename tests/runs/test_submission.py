"""Result files: the form that each server takes, an answer for every item, in the order of the split."""

import json

import pytest

from data_prep.sources.common import questions
from mmpeft_ds.errors import BadInput
from mmpeft_ds.runs.submission import FORMS, content, file_name, not_listed


def asked(*ids):
    return {"source_name": "s", "questions": [{"question": "q", "answers": [], "question_id": i} for i in ids]}


def row(number, prediction, key="question_id"):
    return {"sample_id": "s/0", key: number, "prediction": prediction}


RECORDS = [asked(7, 3), asked(5)]
ROWS = [row(3, "no"), row(7, "a red bus"), row(5, "Zürich")]


def test_vqa_keeps_ids_as_they_are_and_the_order_of_the_split():
    text, missing = content("vqa", ROWS, RECORDS)
    wanted = [{"question_id": 7, "answer": "a red bus"}, {"question_id": 3, "answer": "no"}]
    assert json.loads(text) == [*wanted, {"question_id": 5, "answer": "Zürich"}] and missing == 0


def test_gqas_ids_are_texts_with_their_zeros():
    text, _ = content("gqa", [row("02930152", "yes")], [asked("02930152")])
    assert json.loads(text) == [{"questionId": "02930152", "prediction": "yes"}]


def test_nlvr2_is_lines_of_true_and_false():
    text, _ = content(
        "nlvr2", [row("dev-1-0-0", "true"), row("dev-1-0-1", "false")], [asked("dev-1-0-0", "dev-1-0-1")]
    )
    assert text == "dev-1-0-0,True\ndev-1-0-1,False\n"
    assert file_name("nlvr2", "test1") == "submission-test1-nlvr2.csv"
    assert content("nlvr2", [row("a", "i\nsee it")], [asked("a")])[0] == "a,I see it\n", "one line an example"


def test_captions_are_keyed_by_picture_number_or_text():
    records = [{"image_id": 9, "captions": []}, {"image_id": "00ff", "captions": ["x"]}]
    text, _ = content("coco", [row(9, "a dog", "image_id"), row("00ff", "a sign", "image_id")], records)
    assert json.loads(text) == [{"image_id": 9, "caption": "a dog"}, {"image_id": "00ff", "caption": "a sign"}]


def test_vizwiz_is_keyed_by_the_name_of_the_picture():
    text, _ = content("vizwiz", [row("VizWiz_test_0.jpg", "keys")], [asked("VizWiz_test_0.jpg")])
    assert json.loads(text) == [{"image": "VizWiz_test_0.jpg", "answer": "keys"}]


def test_an_item_without_prediction_gets_an_empty_one_and_is_counted():
    text, missing = content("vqa", ROWS[:1], RECORDS)
    assert missing == 2 and [item["answer"] for item in json.loads(text)] == ["", "no", ""]


def test_what_preparation_set_aside_is_said_to_lack():
    account = {"records": 9, "aside": {"picture not there": [2, ["a.jpg", "b.jpg"]], "id given before": [1, ["7"]]}}
    assert "2 records that preparation set aside (picture not there)" in not_listed(account), "7 itself is in the file"
    reasons = "id given before", "listed before", questions.REPEATED, questions.UNASKED
    repeated = {reason: [1, ["7"]] for reason in reasons}
    assert not_listed({"aside": repeated}) == ""
    assert not_listed({"records": 9, "aside": {}}) == not_listed({}) == ""


@pytest.mark.parametrize(
    ("form", "rows", "records", "words"),
    [
        ("vqa", ROWS, [asked(7, 7)], "7"),
        ("vqa", [], [{"source_name": "b.jpg", "questions": [{"question": "q"}]}], "b.jpg has no question_id"),
        ("coco", ROWS, [{"image_id": 1}], "takes predictions for captions"),
        ("vqa", [row(1, "a dog", "image_id")], [asked(1)], "takes predictions for questions"),
    ],
)
def test_what_no_server_would_take_is_refused_in_one_line(form, rows, records, words):
    with pytest.raises(BadInput, match=words):
        content(form, rows, records)


def test_every_form_is_explained():
    from mmpeft_ds.runs import submission

    assert all(f"{name} (" in submission.HELP for name in FORMS)
