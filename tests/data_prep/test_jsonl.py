"""The source for JSON lines: records, images beside the file, and lines that are refused."""

import numpy as np
import pytest
import webdataset

from data_prep import prepare
from data_prep.sources.jsonl import EACH, Jsonl, Options
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.errors import BadInput
from tests.helpers.data.films import film


def prepared(tmp_path, *argv):
    out = tmp_path / "out"
    prepare.main(["jsonl", "--out", str(out), "--processes", "1", *map(str, argv)])
    manifest = Manifest.load(out)
    samples = {
        split: list(webdataset.WebDataset([manifest.path(s.file) for s in shards], shardshuffle=False).decode("rgb8"))
        for split, shards in manifest.splits.items()
    }
    return manifest, samples


def test_all_forms_of_a_line(jsonl, tmp_path):
    ten = ["2"] * 7 + ["3"] * 3
    path = jsonl(
        {"image": "0.png", "caption": "a thing", "id": "x.y.z", "split": "kept"},
        {"image": "0.png", "captions": ["one", "two"]},
        {"image": "0.png", "question": "how many?", "answers": ten, "question_id": 7, "answer_type": "number"},
        {"image": ["0.png", "1.png"], "questions": [{"question": "same?", "answer": "no", "type": "yes/no"}]},
        {"image": "2.png", "questions": ["a?", "b?"], "answers": ["1", ["2", "3"]]},
        b"",
        {"image": "2.png", "question": "v2?", "answers": [{"answer": "yes", "answer_id": 1}]},
        {"question": "no picture?", "answer": "right"},
        {
            "image": "3.png",
            "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Ho"}],
        },
    )
    manifest, samples = prepared(tmp_path, "--train", path)
    records = [s["json"] for s in samples["train"]]
    assert records[0] == {"captions": ["a thing"], "source_name": "x.y.z", "extra": {"split": "kept"}}
    assert records[1]["captions"] == ["one", "two"]
    assert records[2]["questions"] == [{"question": "how many?", "answers": ten, "question_id": 7, "type": "number"}]
    assert records[3]["questions"] == [{"question": "same?", "answers": ["no"], "type": "yes/no"}]
    assert [q["answers"] for q in records[4]["questions"]] == [["1"], ["2", "3"]]
    assert records[5]["questions"][0]["answers"] == ["yes"]
    assert records[5]["source_name"] == "train.jsonl:7"
    assert records[6]["questions"][0]["question"] == "no picture?"
    assert not any(k.endswith(("png", "jpg")) for k in samples["train"][6])
    assert records[7]["conversations"][0] == {"from": "human", "value": "<image>\nHi"}
    assert samples["train"][3]["0.png"][0, 0, 0] == 0 and samples["train"][3]["1.png"][0, 0, 0] == 40
    assert manifest.labels[:2] == ["2", "3"] and manifest.label_counts[:2] == [8, 4]
    assert manifest.fields["train"]["images"]["min"] == 0 and manifest.fields["train"]["images"]["max"] == 2


def test_video_frames_keep_their_order(jsonl, tmp_path):
    frames = [f"{i % 6}.png" for i in range(13)]
    _, samples = prepared(tmp_path, "--train", jsonl({"image": frames, "caption": "a clip"}))
    (sample,) = samples["train"]
    assert [int(sample[f"{i}.png"][0, 0, 0]) for i in range(13)] == [40 * (i % 6) for i in range(13)]


def test_frames_of_videos_stand_behind_images_with_their_times(jsonl, tmp_path):
    film(tmp_path / "a.mp4")
    shown = {"frames": ["1.png", "2.png"], "times": [0.5, 2]}
    talk = [{"from": "human", "value": "<video> <image> <video>"}, {"from": "gpt", "value": "b"}]
    lines = {"image": "0.png", "video": ["a.mp4", shown], "conversations": talk}, {"videos": [], "caption": "x"}
    _, samples = prepared(tmp_path, "--frames", "4", "--train", jsonl(*lines))
    first, second = samples["train"]
    assert [name for name in sorted(first) if name[0].isdigit()] == [
        "0.png", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.png", "6.png",
    ]  # fmt: skip
    clip, given = first["json"]["videos"]
    assert clip["times"] == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.1) and clip["duration"] == pytest.approx(4)
    assert given == {"times": [0.5, 2], "duration": 3.0} and "videos" not in second["json"]


@pytest.mark.parametrize(
    "video, said",
    [
        ("0.png", "'video' needs a path"),
        ("gone.mp4", "gone.mp4 does not exist"),
        ({"frames": ["0.png"], "times": [1, 2]}, "2 frames, but 1 pictures"),
        ({"frames": ["0.png", "1.png"], "times": [2, 1]}, "do not decrease"),
    ],
)
def test_a_video_that_cannot_be_read_is_refused_with_its_line(video, said, jsonl, tmp_path, capsys):
    with pytest.raises(BadInput, match="1 problem,"):
        prepare.main(
            ["jsonl", "--out", str(tmp_path / "out"), "--train", str(jsonl({"video": video, "caption": "x"}))]
        )
    assert said in capsys.readouterr().err


def test_text_labels_are_numbered_by_the_training_split_and_files_of_a_split_follow_each_other(jsonl, tmp_path):
    a = jsonl({"image": "0.png", "label": "zebra"}, {"image": "1.png", "label": "ant"}, name="a.jsonl")
    b = jsonl({"image": "2.png", "label": "zebra"}, name="b.jsonl")
    val = jsonl({"image": "3.png", "label": "ant"}, name="val.jsonl")
    manifest, samples = prepared(tmp_path, "--train", a, b, "--val", val, "--samples-per-shard", 2)
    assert manifest.labels == ["ant", "zebra"] and manifest.label_counts == [1, 2]
    assert [s["json"]["label"] for s in samples["train"]] == [1, 0, 1]
    assert samples["val"][0]["json"] == {"label": 0, "class_name": "ant", "source_name": "val.jsonl:1"}


def test_rare_answers_and_the_end_of_a_long_list_can_be_left_out(jsonl, tmp_path):
    lines = [{"question": "?", "answer": a} for a in ["b", "b", "a", "a", "a", "c", "d", "d"]]
    path = jsonl(*lines)
    manifest, _ = prepared(tmp_path, "--train", path, "--min-answer-count", 2, "--max-answers", 2)
    assert manifest.labels == ["a", "b"] and manifest.label_counts == [3, 2]


def test_an_empty_answer_of_one_annotator_is_kept_but_is_no_answer_to_choose(jsonl, tmp_path):
    manifest, samples = prepared(tmp_path, "--train", jsonl({"question": "?", "answers": ["", "red", " "]}))
    assert manifest.labels == ["red"]
    assert samples["train"][0]["json"]["questions"][0]["answers"] == ["", "red", " "]


ASKED = {"question": "what?", "answer": "red"}
TALK = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]


@pytest.mark.parametrize(
    ("line", "named", "meant"),
    [
        ({"images": ["0.png"], "conversations": TALK}, "images", "'image'"),
        ({"image_path": "0.png", "conversations": TALK}, "image_path", "'image'"),
        ({"imagePath": "0.png", **ASKED}, "imagePath", "'image'"),
        ({"img": "0.png", **ASKED}, "img", "'image'"),
        ({"Image": "0.png", **ASKED}, "Image", "'image'"),
        ({"pictures": ["0.png"], **ASKED}, "pictures", "'image'"),
        ({"photo": "elsewhere", "label": "cat"}, "photo", "'image'"),
        ({"imgae": "0.png", "caption": "x"}, "imgae", "'image'"),
        ({"image_url": "http://example.com/0.png", "caption": "x"}, "image_url", "'image'"),
        ({"file_name": "gone.png", "label": "cat"}, "file_name", "'image'"),
        ({"foo": "imgs/gone.png", "caption": "x"}, "foo", "'image'"),
        ({"foo": ["gone.JPG"], "conversations": TALK}, "foo", "'image'"),
        ({"foo": "gone.npy", "label": "cat"}, "foo", "'features'"),
        ({"questions": [{**ASKED, "shown": "gone.png"}]}, "shown", "'image'"),
        ({"image": "0.png", "caption": "x", "second": "1.png"}, "second", "'image'"),
        ({"image": "0.png", "caption": "x", "more": {"views": [{"at": "1.png"}]}}, "more", "'image'"),
        ({"x": "data:image/png;base64,AAAA", "caption": "x"}, "x", "'image'"),
        ({"image_base64": "iVBORw0KGgo", "caption": "x"}, "image_base64", "'image'"),
        ({"base64": "/9j/4AAQSkZJRg", "caption": "x"}, "base64", "'image'"),
        ({"content": {"bytes": "iVBORw0KGgoAAAA"}, "caption": "x"}, "content", "'image'"),
        ({"movie": "clip7", "caption": "x"}, "movie", "'video'"),
        ({"audio": "a", "caption": "x"}, "audio", "sound"),
        ({"image_features": "f", "caption": "x"}, "image_features", "'features'"),
        ({"image": "0.png", "label": "cat", "text": "a cat"}, "text", "'caption'"),
        ({"image": "0.png", "label": "cat", "description": "a cat"}, "description", "'caption'"),
        ({"image": "0.png", "caption": "x", "captions_en": ["y"]}, "captions_en", "'caption'"),
        ({"image": "0.png", **ASKED, "answer_list": ["red"]}, "answer_list", "'answers'"),
        ({"image": "0.png", "caption": "x", "class": "cat"}, "class", "'label'"),
        ({"image": "0.png", "label": "cat", "messages": TALK}, "messages", "'conversations'"),
        ({"image": "0.png", "conversations": TALK, "system": "be short"}, "system", "'conversations'"),
        ({"messages": [{"role": "user", "content": "what?"}], "images": ["0.png"]}, "messages", "'conversations'"),
        ({"image": "0.png", "questions": [{**ASKED, "img": "1.png"}]}, "img", "'image'"),
        ({"conversations": [{**TALK[0], "image": "0.png"}, TALK[1]]}, "image", "'image'"),
    ],
)
def test_a_key_that_looks_like_a_known_one_is_refused_with_the_right_name(line, named, meant, jsonl, tmp_path, capsys):
    with pytest.raises(BadInput, match="1 problem,"):
        prepare.main(["jsonl", "--out", str(tmp_path / "out"), "--train", str(jsonl(line))])
    (shown,) = capsys.readouterr().err.splitlines()
    assert f"the key {named!r}" in shown and meant in shown and f"--keep {named}" in shown
    assert not (tmp_path / "out").exists()


HARMLESS = {
    "split": "kept",
    "url": "http://example.com/1.png",
    "image_id": 7,
    "image_width": 8,
    "score": 0.5,
    "source": "gone.png",
    "tags": ["a", "b"],
    "title": "thing",
    "answer_type": "number",
    "images": None,
    "movie": [],
}


def test_harmless_keys_stay_under_extra_and_are_named_once(jsonl, tmp_path, capsys):
    line = {"image": "0.png", "caption": "x", **HARMLESS}
    asked = {"questions": [{**ASKED, "difficulty": 3, "remark": "as in old.png"}]}
    talk = {"conversations": [{**TALK[0], "lang": "en"}, TALK[1]]}
    _, samples = prepared(tmp_path, "--train", jsonl(line, line, asked, talk))
    records = [s["json"] for s in samples["train"]]
    assert records[0]["extra"] == HARMLESS
    extra = {"difficulty": 3, "remark": "as in old.png"}
    assert records[2]["questions"] == [{"question": "what?", "answers": ["red"], "extra": extra}]
    assert records[3]["conversations"] == [{**TALK[0], "extra": {"lang": "en"}}, TALK[1]]
    (told,) = [x for x in capsys.readouterr().err.splitlines() if "kept under `extra`" in x]
    assert "split (2)" in told and "questions[].difficulty (1)" in told and "conversations[].lang (1)" in told


def test_what_the_user_keeps_by_name_is_kept(jsonl, tmp_path):
    path = jsonl({"image": "0.png", "label": "cat", "text": "a cat", "thumbnail": "1.png"})
    _, samples = prepared(tmp_path, "--train", path, "--keep", "text", "thumbnail")
    assert samples["train"][0]["json"]["extra"] == {"text": "a cat", "thumbnail": "1.png"}


def test_an_integer_label_has_one_name_whichever_line_brings_it(jsonl, tmp_path, capsys):
    lines = [{"label": 1}, {"label": 1, "class_name": "dog"}, {"label": 0, "class_name": "cat"}]
    manifest, samples = prepared(tmp_path, "--train", jsonl(*lines))
    assert manifest.labels == ["cat", "dog"] and [s["json"]["label"] for s in samples["train"]] == [1, 1, 0]
    with pytest.raises(BadInput, match="1 problem,"):
        prepare.main(["jsonl", "--out", str(tmp_path / "b"), "--train", str(jsonl(*lines, lines[2] | {"label": 1}))])
    assert "label 1 is class 'cat' here, but 'dog' in another line" in capsys.readouterr().err


def test_a_directory_prepared_before_an_option_existed_is_still_the_same(jsonl, tmp_path, capsys):
    path = jsonl({"image": "0.png", "caption": "x"})
    manifest, _ = prepared(tmp_path, "--train", path)
    del manifest.source["options"]["keep"]
    manifest.save(tmp_path / "out")
    prepared(tmp_path, "--train", path)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(BadInput, match="keep None, now"):
        prepared(tmp_path, "--train", path, "--keep", "text")


GOOD = {"image": "0.png", "caption": "fine"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"image": "0.png", ', "no JSON"),
        (b"[1, 2]", "expected an object"),
        (b'{"caption": "\xff\xfe"}', "UTF-8"),
        (b'{"caption": "x", "score": NaN}', "NaN"),
        (b'{"caption": "x", "score": 1e999}', "too large"),
        (b'{"caption": "half \\ud83d of it"}', "half of a character"),
        ({"image": "0.png"}, "has none of caption"),
        ({"image": 5, "caption": "x"}, "'image' must be"),
        ({"image": ["0.png", None], "caption": "x"}, "'image' must be"),
        ({"image": "0.mp4", "caption": "x"}, "extension"),
        ({"image": "gone.png", "caption": "x"}, "gone.png does not exist"),
        ({"image": "0.png", "caption": "  "}, "'caption' must be"),
        ({"image": "0.png", "captions": []}, "'caption' must be"),
        ({"image": "0.png", "question": "why?"}, "needs 'answer'"),
        ({"image": "0.png", "question": "", "answer": "x"}, "'question' must be"),
        ({"image": "0.png", "question": "n?", "answer": 2}, "needs 'answer'"),
        ({"image": "0.png", "question": "n?", "answer": " "}, "no answer but empty ones"),
        ({"image": "0.png", "questions": []}, "'questions' must be"),
        ({"image": "0.png", "questions": ["a?", "b?"], "answers": ["1"]}, "'answers' must be a list of 2"),
        ({"image": "0.png", "questions": [5]}, "'questions' must hold"),
        ({"image": "0.png", "label": 1.5}, "'label' must be"),
        ({"image": "0.png", "label": True}, "'label' must be"),
        ({"image": "0.png", "label": -1}, "'label' must be"),
        ({"image": "0.png", "conversations": {}}, "'conversations' must be"),
        ({"image": "0.png", "conversations": [{"from": "robot", "value": "x"}]}, "from 'robot'"),
        ({"image": "0.png", "conversations": [{"from": "human"}]}, "'value'"),
        ({"conversations": [{"from": "human", "value": "<image> what?"}]}, "1 times but the line has 0"),
        (
            {"image": ["0.png", "1.png"], "conversations": [{"from": "human", "value": "<image> what?"}]},
            "1 times but the line has 2",
        ),
        (b'{"caption": "x", "caption": "y"}', "'caption' twice"),
        ({"caption": "x", "captions": ["y"]}, "both 'caption' and 'captions'"),
        ({"image": "0.png", "question": "n?", "answer": "2", "answers": ["2"]}, "both 'answer' and 'answers'"),
        ({"question": "n?", "answer": "2", "questions": ["m?"], "answers": ["3"]}, "both 'question' and"),
        ({"questions": [{"question": "n?", "answer": "2", "answers": ["2"]}]}, "both 'answer' and 'answers'"),
        ({"questions": [{"question": "n?", "answer": "2"}], "answers": ["2"]}, "'answers' stands beside 'questions'"),
        ({"image": "0.png", "caption": "x", "answer": "2"}, "'answer' without a 'question'"),
        ({"image": "0.png", "caption": "x", "class_name": "cat"}, "'class_name' goes with"),
        ({"image": "0.png", "label": "cat", "class_name": "dog"}, "'class_name' 'dog' beside"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_written(line, says, jsonl, tmp_path, capsys):
    path = jsonl(GOOD, line, GOOD)
    with pytest.raises(BadInput, match=r"1 problem, shown above\. Nothing was written") as error:
        prepare.main(["jsonl", "--out", str(tmp_path / "out"), "--train", str(path)])
    assert "\n" not in str(error.value)
    (shown,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith(f"{path}:2: ")]
    assert says in shown
    assert not (tmp_path / "out").exists()


def test_mixed_labels_and_labels_unknown_in_training_are_refused(jsonl, tmp_path, capsys):
    mixed = jsonl({"label": "a"}, {"label": 1})
    with pytest.raises(BadInput, match="2 problems"):
        prepare.main(["jsonl", "--out", str(tmp_path / "out"), "--train", str(mixed)])
    train, val = jsonl({"label": "a"}), jsonl({"label": "b"}, name="val.jsonl")
    with pytest.raises(BadInput, match="1 problem,"):
        prepare.main(["jsonl", "--out", str(tmp_path / "out"), "--train", str(train), "--val", str(val)])
    assert f"{val}:1: label 'b' does not occur in split 'train'" in capsys.readouterr().err


def test_missing_images_are_listed_once_and_a_long_list_is_cut(jsonl, tmp_path, capsys):
    path = jsonl(*[{"image": f"no{i // 2}.png", "caption": "x"} for i in range(60)])
    with pytest.raises(BadInput, match="30 problems, 20 of them shown above"):
        prepare.main(["jsonl", "--out", str(tmp_path / "out"), "--train", str(path)])
    shown = [x for x in capsys.readouterr().err.splitlines() if "does not exist" in x]
    assert len(shown) == 20 and shown[0].startswith(f"{path}:1: ")


def test_the_same_mistake_in_many_lines_is_one_line_that_counts_them(jsonl, tmp_path, capsys):
    path = jsonl(*[{"image": "0.png", "captoins": ["x"]} for _ in range(30)], {"image": "0.png", "caption": 3})
    with pytest.raises(BadInput, match="31 problems, shown above"):
        prepare.main(["jsonl", "--out", str(tmp_path / "out"), "--train", str(path)])
    same, other = capsys.readouterr().err.splitlines()
    assert same.startswith(f"{path}:1: ") and "'captoins'" in same and same.endswith(" (so in 29 further lines)")
    assert other.startswith(f"{path}:31: ") and "further" not in other


def test_no_file_and_an_empty_file_are_refused(jsonl, tmp_path):
    out = ["jsonl", "--out", str(tmp_path / "out")]
    with pytest.raises(BadInput, match="--train FILE"):
        prepare.main(out)
    with pytest.raises(BadInput, match=r"--val .*gone.jsonl: no such file"):
        prepare.main([*out, "--train", str(jsonl(GOOD)), "--val", str(tmp_path / "gone.jsonl")])
    with pytest.raises(BadInput, match="has no samples"):
        prepare.main([*out, "--train", str(jsonl())])


def test_an_image_that_vanished_after_the_check_is_named_with_its_line(jsonl, tmp_path, monkeypatch):
    path = jsonl(GOOD, {"image": "1.png", "caption": "y"})
    original = prepare.make_shard

    def vanish(job):
        (tmp_path / "1.png").unlink(missing_ok=True)
        return original(job)

    monkeypatch.setattr(prepare, "make_shard", vanish)
    with pytest.raises(BadInput, match=r"train\.jsonl:2: .*1\.png"):
        prepared(tmp_path, "--train", path)


def test_stored_features_go_into_the_shard_in_the_place_of_images(jsonl, tmp_path, capsys):
    grids = np.arange(2 * 4 * 3, dtype=np.float16).reshape(2, 4, 3)
    for i, grid in enumerate(grids):
        np.save(tmp_path / f"{i}.npy", grid)
    np.save(tmp_path / "other.npy", grids[0, :1])
    path = jsonl({"features": "0.npy", "caption": "x"}, {"features": ["0.npy", "1.npy"], "caption": "y"})
    _, samples = prepared(tmp_path, "--train", path)
    stored = [sample["npy"] for sample in samples["train"]]
    assert [a.shape for a in stored] == [(4, 3), (2, 4, 3)] and (stored[1] == grids).all()
    assert stored[0].dtype == np.float16
    uneven = jsonl({"features": ["0.npy", "other.npy"], "caption": "z"}, name="uneven.jsonl")
    with pytest.raises(BadInput, match=r"uneven.jsonl:1: features of one line differ in shape"):
        prepare.main(["jsonl", "--out", str(tmp_path / "b"), "--processes", "1", "--train", str(uneven)])
    gone = jsonl({"features": "gone.npy", "caption": "z"}, {"features": "0.png", "caption": "z"}, name="gone.jsonl")
    with pytest.raises(BadInput, match="2 problems"):
        prepare.main(["jsonl", "--out", str(tmp_path / "c"), "--processes", "1", "--train", str(gone)])
    assert "gone.npy does not exist" in (said := capsys.readouterr().err) and "none of the extensions .npy" in said


def test_a_shard_may_begin_at_any_line_of_several_files_with_blank_lines(jsonl):
    lines = [[{"caption": f"{file} {n}"} for n in range(count)] for file, count in enumerate((EACH + 3, 1, 2 * EACH))]
    files = [jsonl(*[x for line in of for x in (line, b"", b" ")], name=f"{k}.jsonl") for k, of in enumerate(lines)]
    source = Jsonl(Options(train=files))
    wanted = [line["caption"] for of in lines for line in of]
    assert source.count("train") == len(wanted)
    for start in (0, 1, EACH - 1, EACH, EACH + 2, EACH + 3, EACH + 4, 2 * EACH + 4, len(wanted) - 1, len(wanted)):
        found = list(source.samples("train", start))
        assert [sample.record["captions"] for sample in found] == [[caption] for caption in wanted[start:]]
    assert [sample.name for sample in source.samples("train", EACH + 2)][:2] == [
        f"0.jsonl:{3 * EACH + 7}",
        "1.jsonl:1",
    ]


@pytest.mark.parametrize("form", ["beside", "inside"])
def test_the_weight_of_a_question_is_read_and_a_wrong_one_is_told_with_its_line(jsonl, tmp_path, capsys, form):
    def line(weight):
        asked = {"question": "what?", "answer": "red", "weight": weight}
        return asked if form == "beside" else {"questions": [asked]}

    _, samples = prepared(tmp_path, "--train", jsonl(line(0.25)))
    record = samples["train"][0]["json"]
    assert record["questions"] == [{"question": "what?", "answers": ["red"], "weight": 0.25}] and "extra" not in record
    for number, wrong in enumerate((-1, True, "12 kg")):
        capsys.readouterr()
        with pytest.raises(BadInput, match="1 problem"):
            prepared(tmp_path / str(number), "--train", jsonl(line(wrong)))
        assert "'weight'" in capsys.readouterr().err
