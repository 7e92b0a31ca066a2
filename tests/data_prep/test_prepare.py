"""Preparation of shards: the same bytes every time, continued after an interruption, one line for bad input."""

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep import prepare
from data_prep.sources.base import RawSample, Source
from mmpeft_ds import registry
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.tar import TarWriter
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import CannotWrite
from tests.helpers import ROOT


def contents(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


def read(out, split):
    """Samples as any WebDataset reader sees them, with its default decoding."""
    manifest = Manifest.load(out)
    urls = [manifest.path(s.file) for s in manifest.shards(split)]
    return list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))


def test_every_source_satisfies_the_contract():
    from data_prep import sources

    assert {"easy_vqa", "image_folder", "jsonl"} <= set(registry.names(sources))
    for name in registry.names(sources):
        entry = registry.load(sources, name, "test")
        assert issubclass(entry, Source) and entry.Options, name


@pytest.mark.parametrize("name", ["easy-vqb", "easy_vqb"])
def test_an_unknown_source_is_refused_with_the_names_of_the_help(tmp_path, name):
    with pytest.raises(BadInput) as refused:
        prepare.main([name, "--out", str(tmp_path / "out")])
    line = str(refused.value)
    assert f"no source named {name!r}. Did you mean 'easy-vqa'? Known: coco-captions, " in line
    assert "_" not in line.replace(name, "")


def test_two_runs_are_byte_identical_for_any_number_of_processes(image_folder, tmp_path):
    common = ["image-folder", "--folder", str(image_folder), "--samples-per-shard", "5", "--val-fraction", "0.25"]
    prepare.main([*common, "--out", str(tmp_path / "a"), "--processes", "1"])
    prepare.main([*common, "--out", str(tmp_path / "b"), "--processes", "3"])
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a == b
    assert set(a) == {
        "manifest.json",
        "image-folder-train.index.npy",
        "image-folder-val.index.npy",
        *(f"image-folder-train-{i:06d}.tar" for i in range(4)),
        *(f"image-folder-val-{i:06d}.tar" for i in range(2)),
    }


def test_any_webdataset_reader_reads_every_sample_although_names_hold_dots(image_folder, tmp_path):
    out = tmp_path / "out"
    prepare.main(["image-folder", "--folder", str(image_folder), "--out", str(out), "--samples-per-shard", "7"])
    samples = read(out, "train")
    assert [s["__key__"] for s in samples] == [f"train-{i:09d}" for i in range(24)]
    assert {s["json"]["source_name"] for s in samples} == {
        str(p.relative_to(image_folder)) for p in image_folder.rglob("*.*") if p.is_file()
    }
    for s in samples:
        image = s["jpg"] if "jpg" in s else s["png"]
        assert image.shape == (6, 8, 3)
        assert (image[0, 0, 1] > 128) == (s["json"]["class_name"] == "dog")
        assert s["json"]["label"] == ["Cat.v1", "dog"].index(s["json"]["class_name"])
    manifest = Manifest.load(out)
    assert manifest.labels == ["Cat.v1", "dog"] and manifest.label_counts == [12, 12]


def test_offsets_cut_out_exactly_one_sample(image_folder, tmp_path):
    out = tmp_path / "out"
    prepare.main(["image-folder", "--folder", str(image_folder), "--out", str(out), "--samples-per-shard", "7"])
    manifest = Manifest.load(out)
    for number, shard in enumerate(manifest.shards("train")):
        data = (out / shard.file).read_bytes()
        for i, (begin, length) in enumerate(manifest.offsets("train", number).tolist()):
            with tarfile.open(fileobj=io.BytesIO(data[begin : begin + length]), mode="r:") as piece:
                names = piece.getnames()
            assert len(names) == 2
            assert {name.split(".", 1)[0] for name in names} == {f"train-{number * 7 + i:09d}"}


def test_folders_named_train_and_val_are_the_splits(tmp_path, image_folder):
    (tmp_path / "set").mkdir()
    image_folder.rename(tmp_path / "set" / "train")
    (tmp_path / "set" / "valid" / "dog").mkdir(parents=True)
    (tmp_path / "set" / "train" / "dog" / "a.b.00.png").rename(tmp_path / "set" / "valid" / "dog" / "x.png")
    out = tmp_path / "out"
    prepare.main(["image-folder", "--folder", str(tmp_path / "set"), "--out", str(out)])
    manifest = Manifest.load(out)
    assert {s: manifest.samples(s) for s in manifest.splits} == {"train": 23, "val": 1}
    assert read(out, "val")[0]["json"]["label"] == 1


@dataclass
class NoOptions:
    """A source without options."""


class SlowSource(Source):
    """40 texts, `pause` seconds each."""

    Options = NoOptions
    licence = "none"
    pause = 0.0

    def __init__(self, options):
        pass

    def splits(self):
        return ["train"]

    def fingerprint(self):
        return {"slow": "1"}

    def labels(self, split):
        return None

    def count(self, split):
        return 40

    def samples(self, split, start=0):
        for i in range(start, 40):
            time.sleep(self.pause)
            yield RawSample(f"n{i}", [], {"captions": [f"text {i}"]})


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_killed_preparation_continues_and_keeps_finished_shards(tmp_path, monkeypatch, processes):
    out, whole = tmp_path / "out", tmp_path / "whole"
    argv = ["slow", "--samples-per-shard", "4", "--processes", processes, "--out"]

    monkeypatch.setattr(registry, "load", lambda *a: SlowSource)

    def run_slowly():
        os.setsid()
        SlowSource.pause = 0.05
        prepare.main([*argv, str(out)])

    child = multiprocessing.get_context("fork").Process(target=run_slowly)
    child.start()
    deadline = time.monotonic() + 60
    while len(list(out.glob(".parts/*.tar.json"))) < 3 and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    deadline = time.monotonic() + 20
    while _alive_in_session(child.pid) and time.monotonic() < deadline:
        time.sleep(0.05)  # workers notice that their parent is gone
    assert not _alive_in_session(child.pid)
    assert not (out / "manifest.json").exists()
    finished = {p.name.removesuffix(".json") for p in out.glob(".parts/*.tar.json")}
    assert 3 <= len(finished) < 10
    stamps = {name: (out / name).stat().st_mtime_ns for name in finished}
    damaged = sorted(finished)[0]
    with open(out / damaged, "r+b") as file:  # a shard that lost its bytes after it was finished is made again
        file.seek(600)
        file.write(b"#")

    prepare.main([*argv, str(out)])
    prepare.main([*argv, str(whole)])
    assert contents(out) == contents(whole)
    again = {name: (out / name).stat().st_mtime_ns for name in finished}
    assert {name for name in finished if again[name] != stamps[name]} == {damaged}


def _alive_in_session(session):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(its_session) == session and state != "Z":
                found.append(int(entry.name))
    return found


def test_a_finished_directory_is_left_alone_and_another_wish_is_refused_with_the_difference(
    image_folder, tmp_path, capsys
):
    out = tmp_path / "out"
    argv = ["image-folder", "--folder", str(image_folder), "--out", str(out)]
    prepare.main(argv)
    before = contents(out)
    capsys.readouterr()
    prepare.main(argv)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"val_fraction 0.0, now 0.5.*--overwrite"):
        prepare.main([*argv, "--val-fraction", "0.5"])
    (image_folder / "dog" / "new.png").write_bytes((image_folder / "dog" / "a.b.00.png").read_bytes())
    with pytest.raises(BadInput, match="otherwise: image names and sizes changed. Choose"):
        prepare.main(argv)
    assert contents(out) == before
    (out / "notes.txt").write_text("mine")
    prepare.main([*argv, "--overwrite", "--val-fraction", "0.5"])
    assert (out / "notes.txt").read_text() == "mine"
    assert Manifest.load(out).samples("val") == 12


def test_a_moved_source_is_the_same_source(image_folder, tmp_path, capsys):
    out = tmp_path / "out"
    prepare.main(["image-folder", "--folder", str(image_folder), "--out", str(out)])
    image_folder.rename(tmp_path / "elsewhere")
    prepare.main(["image-folder", "--folder", str(tmp_path / "elsewhere"), "--out", str(out)])
    assert "already prepared" in capsys.readouterr().out


def test_a_finished_directory_that_lost_a_shard_is_no_success(image_folder, tmp_path):
    out = tmp_path / "out"
    argv = ["image-folder", "--folder", str(image_folder), "--out", str(out)]
    prepare.main(argv)
    (out / "image-folder-train-000000.tar").unlink()
    with pytest.raises(BadInput, match="missing"):
        prepare.main(argv)


def test_foreign_files_in_the_directory_are_not_written_over(image_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tar").write_text("x")
    with pytest.raises(BadInput, match="thesis.tar"):
        prepare.main(["image-folder", "--folder", str(image_folder), "--out", str(out)])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["image-foldr", "--out", "o"], "Did you mean 'image-folder'"),
        (["image-folder", "--out", "o"], "--folder"),
        (["image-folder", "--out", "o", "--folder", "nowhere"], "no such directory"),
        (["image-folder", "--out", "o", "--folder", ".", "--colour", "3"], "--colour"),
        (["image-folder", "--out", "o", "--folder", ".", "--val-fraction", "half"], "--val-fraction"),
        (["image-folder", "--out", "o", "--folder", ".", "--val-fraction", "1.5"], "--val-fraction"),
        (["easy-vqa", "--out", "o", "--samples-per-shard", "0"], "--samples-per-shard"),
        (["easy-vqa", "--out", "o", "--name", "A.b"], "--name"),
        (["easy-vqa", "--out", "o", "--engine", "spark"], "--engine"),
        (["--out", "o"], "SOURCE"),
    ],
)
def test_wrong_options_are_one_clear_line(argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as error:
        prepare.main(argv)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "o").exists()


def test_a_full_disk_is_no_fault_of_ours_and_the_same_command_continues(image_folder, tmp_path, monkeypatch):
    argv = ["image-folder", "--folder", str(image_folder), "--out", str(tmp_path / "o"), "--processes", "1"]
    argv += ["--samples-per-shard", "9"]
    close, calls = TarWriter.close, []

    def full(tar):
        calls.append(tar)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return close(tar)

    monkeypatch.setattr(TarWriter, "close", full)
    with pytest.raises(CannotWrite, match=r"No space left.*-000001\.tar"):
        prepare.main(argv)
    assert not list((tmp_path / "o").rglob("*.tmp")), "nothing half-written"
    prepare.main(argv)
    assert len(calls) == 2 + 2 and Manifest.load(tmp_path / "o").samples("train") == 24


def test_a_second_preparation_of_the_same_directory_is_refused_while_the_first_works(image_folder, tmp_path):
    argv = ["image-folder", "--folder", str(image_folder), "--out", str(tmp_path / "o"), "--processes", "1"]
    with prepare._locked(tmp_path / "o"), pytest.raises(BadInput, match="another prepare.py"):
        prepare.main(argv)


def test_ray_without_ray_says_how_to_install_it(image_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match="pip install"):
        prepare.main(["image-folder", "--folder", str(image_folder), "--out", str(tmp_path / "o"), "--engine", "ray"])


def test_ray_writes_the_same_bytes(image_folder, tmp_path):
    pytest.importorskip("ray")
    common = ["image-folder", "--folder", str(image_folder), "--samples-per-shard", "5", "--processes", "2"]
    prepare.main([*common, "--out", str(tmp_path / "a")])
    prepare.main([*common, "--out", str(tmp_path / "b"), "--engine", "ray"])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_script_runs_from_anywhere_and_exits_with_2_on_bad_input(tmp_path):
    command = [sys.executable, str(ROOT / "data_prep" / "prepare.py"), "image-folder", "--out", "o", "--folder", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --folder x")
    assert "Traceback" not in done.stderr


def test_easy_vqa_keeps_the_test_split_and_takes_val_from_the_training_images(tmp_path):
    easy_vqa = pytest.importorskip("easy_vqa")
    out = tmp_path / "out"
    prepare.main(["easy-vqa", "--out", str(out), "--processes", "2"])
    manifest = Manifest.load(out)
    assert {s: manifest.samples(s) for s in manifest.splits} == {"train": 3800, "val": 200, "test": 1000}
    records = {s: _records(manifest, s) for s in manifest.splits}
    names = {s: {r["source_name"] for r in of_split} for s, of_split in records.items()}
    assert not names["train"] & names["val"]
    assert names["train"] | names["val"] == {f"train/{i}.png" for i in easy_vqa.get_train_image_paths()}
    asked = [(q["question"], q["answers"]) for r in records["test"] for q in r["questions"]]
    texts, answers, _ = easy_vqa.get_test_questions()
    assert sorted(asked) == sorted((t, [a]) for t, a in zip(texts, answers, strict=True))
    assert set(manifest.labels) == set(easy_vqa.get_answers())
    assert manifest.label_counts == sorted(manifest.label_counts, reverse=True)
    counted = sum(len(r["questions"]) for r in records["train"])
    assert sum(manifest.label_counts) == counted == manifest.fields["train"]["questions[]"]["present"]


def _records(manifest, split):
    urls = [manifest.path(s.file) for s in manifest.shards(split)]
    return [json.loads(s["json"]) for s in webdataset.WebDataset(urls, shardshuffle=False)]


def test_features_travel_as_npy_without_pickle(tmp_path, monkeypatch):
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)

    class Features(SlowSource):
        def count(self, split):
            return 3

        def samples(self, split, start=0):
            for i in range(start, 3):
                yield RawSample(f"n{i}", [], {"label": i, "class_name": str(i)}, rows[i])

    monkeypatch.setattr(registry, "load", lambda *a: Features)
    prepare.main(["features", "--out", str(tmp_path / "out"), "--processes", "1"])
    assert np.array_equal(np.stack([s["npy"] for s in read(tmp_path / "out", "train")]), rows)
    rows = np.array([["x", None]] * 3, dtype=object)
    with pytest.raises(ValueError, match="pickle"):
        prepare.main(["features", "--out", str(tmp_path / "bad"), "--processes", "1"])


def test_a_source_that_forgets_a_method_is_not_a_source():
    class Forgets(SlowSource):
        samples = Source.samples

    assert SlowSource(NoOptions()).count("train") == 40
    with pytest.raises(TypeError, match="samples"):
        Forgets(NoOptions())
