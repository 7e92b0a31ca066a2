"""Conversations in the forms of LLaVA, ShareGPT, messages and Qwen-VL."""

import json

import pytest

from tests.helpers.data.films import film
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
    row = {"messages": messages[1:], "images": ["b.png"], "system": "S"}
    put(root / "train.jsonl", "".join(json.dumps(r) + "\n" for r in (row, {**row, "messages": messages})))
    found = records(prepared("conversations", root, tmp_path / "messages", "--form", "messages"), "train")
    for row in found:
        assert said(row) == [("system", "S"), ("human", "hi <image> there"), ("gpt", "yo")]
    put(root / "share.json", [{"conversations": turns("hi", "yo"), "system": "S"}])
    options = ["--form", "sharegpt", "--train", "share.json"]
    found = records(prepared("conversations", root, tmp_path / "share", *options), "train")
    assert said(found[0])[0] == ("system", "S")


def test_qwen_vl_names_pictures_in_the_text(root, tmp_path):
    value = "Picture 1: <img>b.png</img>\nPicture 2: <img> coco/train2017/1.jpg\n</img>\nWhere is <ref>it</ref>?"
    box = "<box>(1,2),(30,40)</box>"
    row = {"id": "a", "conversations": [{"from": "user", "value": value}, {"from": "assistant", "value": box}]}
    put(root / "train.json", [row])
    found = records(prepared("conversations", root, tmp_path / "out", "--form", "qwen-vl"), "train")
    assert said(found[0])[0][1] == "Picture 1: <image>\nPicture 2: <image>\nWhere is <ref>it</ref>?"
    assert said(found[0])[1][1] == box and len(found[0]["endings"]) == 2


def test_videos_become_frames_with_times_behind_the_pictures(root, tmp_path):
    film(root / "clips" / "a.mp4")
    rows = [
        {"video": "clips/a.mp4", "conversations": turns("<video>\nWhat?", "b")},
        {"videos": ["clips/a.mp4"] * 2, "images": ["b.png"], "conversations": turns("<video> <image> <video>", "b")},
        {"video": "b.png", "conversations": turns("<video>", "b")},
        {"video": "gone.mp4", "conversations": turns("<video>", "b")},
    ]
    put(root / "train.json", rows)
    manifest = prepared("conversations", root, tmp_path / "out", "--frames", "3")
    found = records(manifest, "train")
    assert [len(video["times"]) for video in found[1]["videos"]] == [3, 3]
    assert found[0]["endings"] == ["0.jpg", "1.jpg", "2.jpg"] and len(found[1]["endings"]) == 7
    assert said(found[0])[0][1] == "<video>\nWhat?"
    assert manifest.account["train"]["aside"].keys() == {"video missing"}


@pytest.mark.parametrize("form", ["llava", "messages", "qwen-vl"])
def test_a_record_whose_pictures_no_key_names_is_set_aside_with_the_right_name(root, tmp_path, form):
    under, role, text = ("messages", "role", "content") if form == "messages" else ("conversations", "from", "value")
    talk = [{role: "user", text: "what?"}, {role: "assistant", text: "a cat"}]
    lost = [
        {under: talk, "image_path": "b.png"},
        {under: talk, "photos": ["b.png"]},
        {under: talk, "meta": {"file": "b.png"}},
        {under: [{**talk[0], "image": "b.png"}, talk[1]]},
    ]
    fine = [
        {under: talk, "source": "web", "image_id": 7, "image_path": None, "images": []},
        {under: talk, "images": [], "image": ""},
    ]
    put(root / "train.json", lost + fine)
    manifest = prepared("conversations", root, tmp_path / "out", "--form", form)
    assert [len(row["endings"]) for row in records(manifest, "train")] == [0, 0]
    aside = manifest.account["train"]["aside"]
    keys = ("image", "image_path", "meta", "photos")
    assert [reason.split(": ")[0] for reason in sorted(aside)] == [f"no task reads the key {key!r}" for key in keys]
    assert all("pictures stand under 'image'" in reason for reason in aside)


def test_pictures_under_two_keys_and_beside_the_text_of_qwen_are_set_aside_and_an_empty_list_hides_none(
    root, tmp_path
):
    rows = [
        {"image": "b.png", "images": ["b.png"], "conversations": turns("<image>", "b")},
        {"image": "b.png", "images": [], "conversations": turns("<image>", "b")},
    ]
    put(root / "train.json", rows)
    manifest = prepared("conversations", root, tmp_path / "llava")
    assert [len(row["endings"]) for row in records(manifest, "train")] == [1]
    assert manifest.account["train"]["aside"].keys() == {"both images and image"}
    put(
        root / "train.json", [{"image": "b.png", "conversations": turns("a", "b")}, {"conversations": turns("a", "b")}]
    )
    manifest = prepared("conversations", root, tmp_path / "qwen", "--form", "qwen-vl")
    (reason,) = manifest.account["train"]["aside"]
    assert "names it in the text" in reason
    parts = [{"type": "image"}, {"type": "text", "text": "what?"}]
    asked = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]
    put(
        root / "train.json",
        [{"messages": m, "images": ["b.png"]} for m in (asked, [{**asked[0], "content": "<image>"}, asked[1]])],
    )
    manifest = prepared("conversations", root, tmp_path / "parts", "--form", "messages")
    (reason,) = manifest.account["train"]["aside"]
    assert "content in parts" in reason


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
        "video without <video>": 1,
    }
