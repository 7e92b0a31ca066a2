import numpy as np
import pytest
import webdataset

from data_prep import prepare
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.errors import BadInput


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
    ],
)
def test_a_bad_line_is_named_before_anything_is_written(line, says, jsonl, tmp_path, capsys):
    path = jsonl(GOOD, line, GOOD)
    with pytest.raises(BadInput, match=r"1 problems, shown above\. Nothing was written") as error:
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
    with pytest.raises(BadInput, match="1 problems"):
        prepare.main(["jsonl", "--out", str(tmp_path / "out"), "--train", str(train), "--val", str(val)])
    assert f"{val}:1: label 'b' does not occur in split 'train'" in capsys.readouterr().err


def test_missing_images_are_listed_once_and_a_long_list_is_cut(jsonl, tmp_path, capsys):
    path = jsonl(*[{"image": f"no{i // 2}.png", "caption": "x"} for i in range(60)])
    with pytest.raises(BadInput, match="30 problems, 20 of them shown above"):
        prepare.main(["jsonl", "--out", str(tmp_path / "out"), "--train", str(path)])
    shown = [x for x in capsys.readouterr().err.splitlines() if "does not exist" in x]
    assert len(shown) == 20 and shown[0].startswith(f"{path}:1: ")


def test_no_file_and_an_empty_file_are_refused(jsonl, tmp_path):
    out = ["jsonl", "--out", str(tmp_path / "out")]
    with pytest.raises(BadInput, match="--train FILE"):
        prepare.main(out)
    with pytest.raises(BadInput, match="no such file"):
        prepare.main([*out, "--train", str(tmp_path / "gone.jsonl")])
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
