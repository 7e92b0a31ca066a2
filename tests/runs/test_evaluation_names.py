"""Files of an evaluation of some of a run's data sets do not take the names of another's."""

import pytest

from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.errors import BadInput
from mmpeft_ds.runs.evaluate import named


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
