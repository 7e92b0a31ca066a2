"""Conversations in the forms of LLaVA, ShareGPT, messages and Qwen-VL."""

import json

import pytest

from tests.helpers.data.miniatures import prepared, put, put_picture, records


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(("coco/train2017/1.jpg", "b.png")):
        put_picture(tmp_path / "data" / name, number)
    return tmp_path / "data"


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def said(row):
    return [(turn["from"], turn["value"]) for turn in row["conversations"]]


def test_llavas_mark_goes_to_the_front_of_its_turn_and_ids_may_repeat(root, tmp_path):
    rows = [
        {"id": "7", "image": "coco/train2017/1.jpg", "conversations": turns("What is it?\n<image>", "A cat.")},
        {"id": 7, "conversations": turns("Hello", "Hi", "Again?", "Yes")},
        {"id": "8", "image": "b.png", "conversations": [{"from": "gpt", "value": "early"}, *turns("<image>", "b")]},
    ]
    put(root / "llava_v1_5_mix665k.json", rows)
    found = records(prepared("conversations", root, tmp_path / "out"), "train")
    assert [said(row)[0][1] for row in found] == ["<image>\nWhat is it?", "Hello", "<image>"]
    assert [len(row["endings"]) for row in found] == [1, 0, 1]
    assert [row["conversation_id"] for row in found] == ["7", 7, "8"]


def test_several_pictures_stay_where_they_are_named(root, tmp_path):
    names = ["b.png", "coco/train2017/1.jpg"]
    row = {"image": names, "conversations": turns("Is <image> as red as <image>?", "No.")}
    put(root / "train.json", [row, {"image": names[:1], "conversations": turns("Is <image> red?", "No.")}])
    found = records(prepared("conversations", root, tmp_path / "out"), "train")
    assert said(found[0])[0][1] == "Is <image> as red as <image>?" and len(found[0]["endings"]) == 2
    assert said(found[1])[0][1] == "Is <image> red?", "a list, whose marks stay"


def test_messages_and_sharegpt_have_system_turns(root, tmp_path):
    messages = [
        {"role": r, "content": c} for r, c in (("system", "S"), ("user", "hi <image> there"), ("assistant", "yo"))
    ]
    put(root / "train.jsonl", json.dumps({"messages": messages, "images": ["b.png"]}) + "\n")
    found = records(prepared("conversations", root, tmp_path / "messages", "--form", "messages"), "train")
    assert said(found[0]) == [("system", "S"), ("human", "hi <image> there"), ("gpt", "yo")]
    put(root / "share.json", [{"conversations": turns("hi", "yo"), "system": "S"}])
    options = ["--form", "sharegpt", "--train", "share.json"]
    found = records(prepared("conversations", root, tmp_path / "share", *options), "train")
    assert said(found[0])[0] == ("system", "S")


def test_qwen_vl_names_pictures_in_the_text(root, tmp_path):
    value = "Picture 1: <img>b.png</img>\nPicture 2: <img>coco/train2017/1.jpg</img>\nWhere is <ref>it</ref>?"
    box = "<box>(1,2),(30,40)</box>"
    row = {"id": "a", "conversations": [{"from": "user", "value": value}, {"from": "assistant", "value": box}]}
    put(root / "train.json", [row])
    found = records(prepared("conversations", root, tmp_path / "out", "--form", "qwen-vl"), "train")
    assert said(found[0])[0][1] == "Picture 1: <image>\nPicture 2: <image>\nWhere is <ref>it</ref>?"
    assert said(found[0])[1][1] == box and len(found[0]["endings"]) == 2


def test_every_broken_record_is_set_aside_by_its_reason(root, tmp_path):
    good = {"image": "b.png", "conversations": turns("<image>", "b")}
    tool = [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}]
    rows = [
        good,
        {**good, "conversations": turns("no mark", "b")},
        {**good, "conversations": turns("<image> <image>", "b")},
        {"conversations": turns("<image>", "b")},
        {"conversations": turns("only a question")},
        {"conversations": [*turns("a", "b"), {"from": "gpt", "value": "c"}]},
        {"conversations": turns("a", "b", "a last question without answer is none of these")},
        {**good, "conversations": turns("a", "<image>")},
        {"conversations": turns("a", " ")},
        {"conversations": tool},
        {"conversations": [{"from": "\ud800", "value": "q"}]},
        {**good, "image": "https://example.org/a.jpg"},
        {**good, "image": "missing.jpg"},
        {**good, "video": "a.mp4"},
        {"conversation": []},
    ]
    put(root / "train.json", rows)
    aside = prepared("conversations", root, tmp_path / "out").account["train"]["aside"]
    assert {reason: number for reason, (number, _) in aside.items()} == {
        "<image> in a turn of the assistant": 1,
        "an answer is empty": 1,
        "no 'conversations' in the record": 1,
        "no turn of the assistant": 1,
        "number of <image> is not that of the pictures": 2,
        "picture is an address, none is fetched": 1,
        "picture missing": 1,
        "picture without <image>": 1,
        "roles do not alternate": 1,
        "turn of the role \\ud800": 1,
        "turn of the role function_call": 1,
        "video are not read here": 1,
    }
