"""Files of an evaluation of some of a run's data sets do not take the names of another's."""

import json

import pytest

from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.errors import BadInput
from mmpeft_ds.runs.evaluate import keep_others, named


def name(known, *dirs):
    return named("test", [SourceOptions(directory) for directory in known], dirs)


def test_all_data_sets_need_no_names():
    assert name(["data/vqav2"]) == name(["data/vqav2"], "data/vqav2") == "test"
    # Two tasks on one directory are still all of it.
    assert name(["data/coco", "data/coco"], "data/coco") == "test"
    assert name(["data/coco", "data/gqa"], "data/gqa", "data/coco") == "test"


def test_some_are_named_in_the_order_of_the_run():
    known = ["data/vqav2", "s3://bucket/coco", "/d/gqa"]
    assert name(known, "/d/gqa") == "test-gqa"
    assert name(known, "s3://bucket/coco", "data/vqav2") == "test-vqav2-coco"


def test_directories_of_equal_names_are_told_apart():
    known = ["a/prepared", "b/prepared", "prepared", "/x/b/other"]
    assert [name(known, directory) for directory in known] == [
        "test-a-prepared", "test-b-prepared", "test-prepared", "test-other",
    ]  # fmt: skip


def test_a_directory_that_the_run_does_not_know_is_refused():
    with pytest.raises(BadInput, match="not trained on it"):
        name(["data/a", "data/b"], "data/c")


def test_an_evaluation_of_another_checkpoint_or_other_overrides_leaves_the_earlier_one(tmp_path, capsys):
    def evaluate(checkpoint, *overrides):
        reports = [{"checkpoint": checkpoint, "set": list(overrides)}]
        keep_others(tmp_path, "test", reports)
        for name, text in (("evaluation-test", json.dumps(reports)), ("predictions-test", checkpoint)):
            (tmp_path / f"{name}.json{'l' * (name[0] == 'p')}").write_text(text)

    evaluate("step-2")
    (tmp_path / "submission-test-gqa.json").write_text("two")
    evaluate("step-2")
    assert not list(tmp_path.glob("*.1.*")) and not capsys.readouterr().out
    evaluate("step-4")
    evaluate("step-4", "task.num_beams=3")
    there = {path.name: path.read_text() for path in tmp_path.iterdir() if not path.name.startswith("evaluation")}
    assert there == {
        "predictions-test.jsonl": "step-4",
        "predictions-test.1.jsonl": "step-2",
        "predictions-test.2.jsonl": "step-4",
        "submission-test-gqa.1.json": "two",
    }
    assert json.loads((tmp_path / "evaluation-test.2.json").read_text()) == [{"checkpoint": "step-4", "set": []}]
    assert "stays as evaluation-test.1.json" in capsys.readouterr().out
