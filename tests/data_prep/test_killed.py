"""A preparation with an index that is killed at any moment continues to the same bytes, in processes and with Ray."""

import itertools
import multiprocessing
import os
import signal
import sys

import pytest

from data_prep import prepare
from data_prep.sources.common.index import Index
from mmpeft_ds.data import parts, writer
from mmpeft_ds.data.manifest import Manifest
from tests.helpers import ray_tasks
from tests.helpers.data.miniatures import put, put_picture

PICTURES = 11


@pytest.fixture
def coco(tmp_path):
    """COCO captions of two splits, where a picture is missing and another has no caption."""
    for split in ("train", "val"):
        images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(PICTURES)]
        rows = [{"id": 10 * n + k, "image_id": n, "caption": f"{split} {n} {k}"} for n in range(1, 10) for k in (0, 1)]
        put(tmp_path / f"coco/annotations/captions_{split}2014.json", {"images": images, "annotations": rows})
        for number in range(1, PICTURES):
            put_picture(tmp_path / f"coco/{split}2014/{number}.jpg", number + 20 * (split == "val"))
    (tmp_path / "coco/train2014/4.jpg").unlink()
    return ["coco-captions", "--form", "official", "--root", str(tmp_path / "coco"), "--samples-per-shard", "2"]


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def after(times, function):
    """`function` for so many calls, then death."""
    calls = itertools.count()
    return lambda *args, **options: die() if next(calls) == times else function(*args, **options)


# Where it dies: what is replaced, and what is on disk then.
MOMENTS = {
    "while the index reads": (Index, "_add", 1, {"shards": 0}),
    "while the index looks for pictures": (Index, "check", 1, {"shards": 0}),
    "before the index has its name": (Index, "_number", 0, {"shards": 0}),
    "in the middle of a shard": (writer, "members", 7, {"shards": 3}),
    "between a shard and its part": (writer, "save_part", 2, {"shards": 3}),
    "between the arrays of a part and the part": (parts, "write_atomic", 2, {"shards": 3}),
    "before the side files": (writer, "_write_index", 1, {"shards": 9}),
    "before the manifest": (Manifest, "save", 0, {"shards": 9}),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_preparation_with_an_index_continues_to_the_same_bytes(coco, tmp_path, moment):
    place, name, times, there = MOMENTS[moment]
    argv = [*coco, "--processes", "1", "--out"]

    def run():
        setattr(place, name, after(times, getattr(place, name)))
        prepare.main([*argv, str(tmp_path / "killed")])

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert len(list((tmp_path / "killed").glob("*.tar"))) == there["shards"]

    prepare.main([*argv, str(tmp_path / "killed")])
    prepare.main([*argv, str(tmp_path / "whole")])
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "killed") == whole
    assert Manifest.load(tmp_path / "whole").account["train"]["uncaptioned"][0] == 2 and len(whole) == 9 + 3


def test_a_finished_index_is_not_read_again(coco, tmp_path, monkeypatch):
    """Negative control of the above: the annotations are read once, although the preparation starts twice."""
    argv = [*coco, "--processes", "1", "--out", str(tmp_path / "out")]
    made = []
    add = Index.add
    monkeypatch.setattr(Index, "add", lambda *args: made.append(args[1]) or add(*args))
    with monkeypatch.context() as broken:
        broken.setattr(prepare, "write_shard", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.main(argv)
    # An error before the first shard leaves the index where it is: the same command continues.
    assert (tmp_path / "out/.parts/index.sqlite").exists()
    prepare.main(argv)
    assert made == ["train", "val"]


@pytest.mark.parametrize("engine", ["a stand-in", "Ray"])
def test_workers_of_ray_find_the_index_on_the_shared_file_system(coco, tmp_path, monkeypatch, engine):
    if engine == "Ray":
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'mmpeft_ds[ray]'")
    else:
        monkeypatch.setitem(sys.modules, "ray", ray_tasks.stand_in())
    argv = [*coco, "--processes", "2", "--samples-per-shard", "8", "--resize", "5", "--out"]
    prepare.main([*argv, str(tmp_path / "here")])
    prepare.main([*argv, str(tmp_path / "ray"), "--engine", "ray"])
    assert contents(tmp_path / "here") == contents(tmp_path / "ray")
