"""Names of sources, by which their scores and curves are told apart."""

from types import SimpleNamespace

import pytest

from mmpeft_ds.engine.assembly.resolve import titles


def source(name, split, task):
    options = SimpleNamespace(split=split, task={"name": task})
    return SimpleNamespace(manifest=SimpleNamespace(name=name), options=options)


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ([("vqa", "val", "answering")], ["vqa-val"]),
        ([("vqa", "val", "answering"), ("coco", "val", "captioning")], ["vqa-val", "coco-val"]),
        (
            [("coco", "val", "answering"), ("coco", "val", "captioning"), ("coco", "train", "captioning")],
            ["coco-val-answering", "coco-val-captioning", "coco-train"],
        ),
        ([("x", "val", "answering"), ("x", "val", "answering")], ["x-val-answering-0", "x-val-answering-1"]),
    ],
)
def test_sources_have_names_of_their_own(sources, names):
    assert titles([source(*s) for s in sources]) == names
