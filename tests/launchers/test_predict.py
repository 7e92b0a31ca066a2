"""Asking adapters of every task about new pictures, as a user does: by the model card's words, by the command."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from mmpeft_ds.runs import inputs
from tests.helpers.data.films import film
from tests.helpers.data.images import encoded
from tests.helpers.runs import tiny_adapters


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", tiny_adapters.KINDS)
def test_what_the_model_card_recommends_works(adapters, photos, command, monkeypatch, kind):
    directory = adapters(kind)
    card = (directory / "README.md").read_text().replace("THIS_DIRECTORY", str(directory))
    (python,) = re.findall(r"```python\n(.*?)```", card, re.S)
    (shell,) = re.findall(r"```sh\n(.*?)```", card, re.S)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(python.replace("photo.jpg", str(photos / "photo0.jpg")), {})
    assert "prediction" in said.getvalue()
    monkeypatch.chdir(photos.parent)
    for line in shell.splitlines():
        program, script, *arguments = shlex.split(line)
        assert program == "python" and script.startswith("launchers/")
        code, out, err = command(script.removeprefix("launchers/"), *arguments)
        assert code == 0 and "photo2.png" in out, err


def test_a_picture_that_cannot_be_read_has_a_row_with_its_error_and_the_others_go_on(adapters, photos, command):
    (photos / "photo1.jpg").write_bytes(b"no picture")
    out = photos.parent / "new" / "captions.jsonl"
    code, shown, err = command(
        "predict.py", "--adapter", adapters("captioning"), "--images", photos, "--out", out, "--batch", 1
    )
    assert code == 2 and err.count("error: ") == 1 and "1 of 3 images" in err and "photo1.jpg" in err
    good, bad, last = rows_of(out)
    assert "error" in bad and "prediction" not in bad and "prediction" in good and "prediction" in last
    assert "cannot be read" in shown and f"2 answers, 1 without: {out}" in shown
    (photos / "photo1.jpg").write_bytes(encoded(3))  # mended, the same command asks about this one alone
    code, shown, _ = command(
        "predict.py", "--adapter", adapters("captioning"), "--images", photos, "--out", out, "--batch", 1
    )
    assert code == 0 and "2 images had theirs already" in shown
    assert {row["image"]: "prediction" in row for row in rows_of(out)} == {
        str(photos / name): True for name in ("photo0.jpg", "photo1.jpg", "photo2.png")
    }


def test_a_name_that_is_not_utf_8_has_its_row_and_is_found_again(adapters, photos, command):
    (photos / "photo1.jpg").rename(photos / "photo\udcff\n1.jpg")
    out = photos.parent / "captions.jsonl"
    words = ("predict.py", "--adapter", adapters("captioning"), "--images", photos, "--out", out)
    code, shown, _ = command(*words)
    assert code == 0 and str(photos / "photo\udcff\n1.jpg") in {row["image"] for row in rows_of(out)}
    assert r"photo\udcff\n1.jpg" in shown
    code, shown, _ = command(*words)
    assert code == 0 and "3 images had theirs already" in shown


def test_an_interrupted_call_keeps_its_answers_and_the_same_command_asks_the_rest(
    adapters, photos, command, monkeypatch
):
    from mmpeft_ds import adapter

    directory, out = adapters("vqa"), photos.parent / "answers.jsonl"
    words = ("--adapter", directory, "--images", photos, "--text", "what is it", "--out", out, "--batch", 1)
    asked = []
    answer = adapter.Loaded.answer

    def stopped(self, samples, task=0):
        asked.extend(sample.sample_id for sample in samples)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, samples, task)

    monkeypatch.setattr(adapter.Loaded, "answer", stopped)
    assert command("predict.py", *words)[0] == 130
    assert [row["image"] for row in rows_of(out)] == [str(photos / "photo0.jpg")]
    with out.open("a") as file:
        file.write('{"image": "half a li')
    assert command("predict.py", *words)[0] == 0
    assert asked[2:] == [str(photos / "photo1.jpg"), str(photos / "photo2.png")]
    assert [row["image"] for row in rows_of(out)] == [asked[0], *asked[2:]]
    assert command("predict.py", *words)[0] == 0 and len(asked) == 4


def test_answers_of_another_adapter_are_not_mixed_in(adapters, photos, command):
    out = photos.parent / "answers.jsonl"
    words = ("--images", photos, "--out", out)
    assert command("predict.py", "--adapter", adapters("captioning"), *words)[0] == 0
    before = out.read_bytes()
    code, _, err = command("predict.py", "--adapter", adapters("classification"), *words)
    assert code == 2 and "another adapter" in err and out.read_bytes() == before
    out.write_text("notes\nof mine\n")
    code, _, err = command("predict.py", "--adapter", adapters("classification"), *words)
    assert code == 2 and "no answers of predict.py" in err and out.read_text() == "notes\nof mine\n"


@pytest.mark.parametrize("kind", ["vqa", "retrieval"])
def test_a_task_that_needs_a_text_says_so_before_anything_is_loaded(adapters, photos, command, monkeypatch, kind):
    from mmpeft_ds import adapter

    monkeypatch.setattr(adapter, "load", None)
    code, _, err = command("predict.py", "--adapter", adapters(kind), "--images", photos)
    assert code == 2 and "nothing to ask" in err and "--text" in err and err.count("\n") == 1


def test_files_without_a_picture_among_them_are_refused_before_the_model_is_loaded(
    adapters, photos, command, monkeypatch
):
    from mmpeft_ds import adapter

    lines = photos.parent / "train.jsonl"
    lines.write_text('{"image": "photo0.jpg"}\n')
    (photos / "photo1.jpg").rename(photos.parent / "nameless")
    monkeypatch.setattr(adapter, "load", None)
    for script, more in (("predict.py", ()), ("search.py", ("--text", "a dog", "--out", photos.parent / "hits"))):
        code, _, err = command(script, "--adapter", adapters("retrieval"), "--images", lines, *more)
        assert code == 2 and f"--images {lines}: is no picture" in err and err.count("\n") == 1
    assert inputs.find_pictures([photos.parent / "nameless"]), "a picture by another name is taken"
    assert inputs.find_pictures([lines, photos]), "beside pictures it has its row with the error"


def test_videos_alone_are_answered_and_a_folder_without_any_is_refused(adapters, photos, command):
    clips, out = photos.parent / "clips", photos.parent / "answers.jsonl"
    film(clips / "a.mp4", seconds=1), film(clips / "b.mkv", seconds=2, noise=True)
    words = ("--adapter", adapters("instruction"), "--frames", 2, "--text", "what is it ?")
    code, _, err = command("predict.py", *words, "--videos", clips, "--out", out)
    assert code == 0, err
    assert [Path(row["image"]).name for row in rows_of(out) if "prediction" in row] == ["a.mp4", "b.mkv"]
    code, _, err = command("predict.py", *words, "--videos", photos)
    assert code == 2 and f"--videos {photos}: no video" in err and err.count("\n") == 1


@pytest.mark.parametrize("texts", [[""], ["what is it", "  "]])
def test_an_empty_question_is_no_question(adapters, photos, command, monkeypatch, texts):
    import mmpeft_ds
    from mmpeft_ds import adapter
    from mmpeft_ds.errors import BadInput

    words = [word for text in texts for word in ("--text", text)]
    assert command("predict.py", "--adapter", adapters("captioning"), "--images", photos, *words)[0] == 0
    loaded = mmpeft_ds.load(adapters("vqa"))
    with pytest.raises(BadInput, match="a text to ask is empty"):
        loaded.predict([photos / "photo0.jpg"], [texts])
    monkeypatch.setattr(adapter, "load", None)
    for kind in ("vqa", "retrieval"):
        code, _, err = command("predict.py", "--adapter", adapters(kind), "--images", photos, *words)
        assert code == 2 and "a text to ask is empty" in err and err.count("\n") == 1
    out = photos.parent / "hits"
    code, _, err = command("search.py", "--adapter", adapters("retrieval"), "--images", photos, *words, "--out", out)
    assert code == 2 and "nothing to look for" in err and not out.exists()


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there_is_one_line(adapters, photos, command, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = command("predict.py", "--adapter", adapters("captioning"), "--images", photos, "--device", name)
    assert code == 2 and err.count("\n") == 1 and f"--device {name}" in err and "cpu" in err


def test_stored_features_are_answered_as_the_pictures_they_were_made_of(adapters, photos, tmp_path):
    """An adapter that was trained on stored features reads pictures through the towers that made them."""
    import mmpeft_ds
    from mmpeft_ds.data.manifest import Manifest
    from mmpeft_ds.data.shards import ShardReader, members

    for kind in ("retrieval on stored features", "classification on stored features"):
        directory = adapters(kind)
        pieces = {}
        for name in ("data", "features"):
            reader = ShardReader(Manifest.load(directory.parent / name), "val")
            pieces[name] = [members(piece)[1] for piece in reader.read([(0, i) for i in range(4)])]
            reader.close()
        pictures = [parts["jpg"] for parts in pieces["data"]]
        stored = [parts["npy"] for parts in pieces["features"]]
        text = ["the blue square"] * 4
        of_pictures = mmpeft_ds.load(directory, pictures=True).predict(pictures, text)
        of_features = mmpeft_ds.load(directory).predict(stored, text)
        key = "probability" if "probability" in of_pictures[0] else "prediction"
        # features are stored in half precision
        assert [r[key] for r in of_pictures] == pytest.approx([r[key] for r in of_features], abs=2e-3)
        assert len({round(r[key], 4) for r in of_features}) > 1


def test_arrays_that_are_no_features_have_rows_with_their_errors(adapters, photos, tmp_path, command):
    directory = adapters("classification on stored features")
    towers = json.loads((directory / "towers.json").read_text())
    width, folder = towers["image_width"], tmp_path / "arrays"
    folder.mkdir()
    bad = {
        "0": np.zeros(width + 3, np.float32),
        "2": np.full(width, np.nan, np.float32),
        "3": np.array(["a"] * width),
        "4": np.zeros((2, 2, width), np.float32),
        "5": np.zeros(width, np.int64),
        "6": np.zeros(0, np.float32),
    }
    for name, array in {**bad, "1": np.ones(width, np.float32), "7": np.ones((3, width), np.float16)}.items():
        np.save(folder / f"{name}.npy", array)
    out = tmp_path / "answers.jsonl"
    code, _, err = command("predict.py", "--adapter", directory, "--images", folder, "--out", out, "--batch", 2)
    assert code == 2 and "6 of 8 images" in err
    assert {Path(row["image"]).stem for row in rows_of(out) if "error" in row} == bad.keys()


def test_pictures_given_to_a_model_of_stored_features_from_python_are_one_line(adapters, photos):
    import mmpeft_ds
    from mmpeft_ds.errors import BadInput

    loaded = mmpeft_ds.load(adapters("retrieval on stored features"))
    with pytest.raises(BadInput, match=r"photo0.jpg.*stored features"):
        loaded.predict([photos / "photo0.jpg"], ["a dog"])


def ten_photos(folder):
    """Ten pictures, one of which cannot be read, with a name that is several bytes a letter."""
    for i in range(10):
        (folder / f"née {i}.jpg").write_bytes(b"no picture" if i == 4 else encoded(i))
    return sorted(folder.glob("née*"))


@pytest.mark.parametrize("kind", ["captioning", "classification"])
def test_a_call_that_was_killed_at_any_byte_ends_with_the_file_of_an_undisturbed_one(adapters, photos, command, kind):
    ten_photos(photos)
    words = ("predict.py", "--adapter", adapters(kind), "--images", photos, "--batch", 3)
    assert command(*words, "--out", photos.parent / "whole.jsonl")[0] == 2
    whole = (photos.parent / "whole.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    middle_of_a_letter = whole.index("é".encode(), ends[4]) + 1
    out = photos.parent / "again.jsonl"
    for length in (0, ends[2], middle_of_a_letter, ends[6], len(whole) - 1):
        out.write_bytes(whole[:length])
        code, _, err = command(*words, "--out", out)
        assert code == 2 and "1 of 13 images" in err
        assert out.read_bytes() == whole


@pytest.mark.slow
def test_a_killed_process_loses_no_answer_that_it_has_written(adapters, photos):
    import signal
    import subprocess
    import sys
    import time

    from tests.helpers import ROOT

    ten_photos(photos)
    whole, out = photos.parent / "whole.jsonl", photos.parent / "killed.jsonl"
    words = [
        sys.executable,
        ROOT / "launchers" / "predict.py",
        "--adapter",
        adapters("captioning"),
        "--images",
        photos,
    ]
    words += ["--images", photos, "--batch", "1", "--out"]
    assert subprocess.run([*words, whole], capture_output=True).returncode == 2
    started = subprocess.Popen([*words, out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not out.exists() or out.stat().st_size == 0:
        assert started.poll() is None
        time.sleep(0.001)
    started.send_signal(signal.SIGKILL)
    started.wait()
    before = out.read_bytes()
    assert 0 < len(before) < len(whole.read_bytes()), "the kill came too late"
    assert subprocess.run([*words, out], capture_output=True).returncode == 2
    assert out.read_bytes() == whole.read_bytes()


def test_answers_to_something_else_are_not_mixed_in_and_more_of_the_same_is_added(adapters, photos, command, tmp_path):
    out, other = tmp_path / "answers.jsonl", tmp_path / "other"
    other.mkdir()
    (other / "x.jpg").write_bytes(encoded(7))
    words = ("predict.py", "--adapter", adapters("vqa"), "--out", out)
    assert command(*words, "--images", photos, "--text", "what is it")[0] == 0
    before = out.read_bytes()
    for changed in (("--images", other, "--text", "what is it"), ("--images", photos, "--text", "is it red")):
        code, _, err = command(*words, *changed)
        assert code == 2 and err.count("\n") == 1 and "which is not asked now" in err and out.read_bytes() == before
    assert command(*words, "--images", photos, other, "--text", "what is it", "--text", "is it red")[0] == 0
    assert len(rows_of(out)) == 8


def test_what_cannot_be_written_is_one_line_before_the_model_is_loaded(adapters, photos, command, monkeypatch):
    from mmpeft_ds import adapter

    monkeypatch.setattr(adapter, "load", None)
    words = ("predict.py", "--adapter", adapters("captioning"), "--images", photos, "--out")
    (photos.parent / "file").write_text("")
    for out in (photos.parent / "file" / "answers.jsonl", photos, Path("/dev/full")):
        code, _, err = command(*words, out)
        assert code == 2 and err.count("\n") == 1 and str(out) in err


def test_a_full_disk_is_one_line_and_the_answers_before_are_kept(adapters, photos, command, monkeypatch):
    import errno

    from mmpeft_ds.runs import predict

    out, written = photos.parent / "answers.jsonl", []
    append = predict._append

    def full(path, rows):
        with predict.writing(path):
            if written:
                raise OSError(errno.ENOSPC, "No space left on device")
        written.append(1)
        append(path, rows)

    words = ("predict.py", "--adapter", adapters("captioning"), "--images", photos, "--out", out, "--batch", 1)
    monkeypatch.setattr(predict, "_append", full)
    code, _, err = command(*words)
    assert code == 2 and err.count("\n") == 1 and "No space left on device" in err and "same command continues" in err
    assert len(rows_of(out)) == 1
    monkeypatch.setattr(predict, "_append", append)
    assert command(*words)[0] == 0 and len(rows_of(out)) == 3


def test_pictures_that_do_not_go_together_are_asked_alone(adapters, photos, command, monkeypatch):
    from mmpeft_ds import adapter
    from mmpeft_ds.errors import BadInput

    answer = adapter.Loaded.answer

    def alone(self, samples, task=0):
        if len(samples) > 1 or "photo1" in samples[0].sample_id:
            raise BadInput(f"{samples[0].sample_id}: cannot be packed")
        return answer(self, samples, task)

    monkeypatch.setattr(adapter.Loaded, "answer", alone)
    out = photos.parent / "answers.jsonl"
    code, _, err = command("predict.py", "--adapter", adapters("captioning"), "--images", photos, "--out", out)
    assert code == 2 and "1 of 3 images" in err and "photo1" in err
    assert ["error" in row for row in rows_of(out)] == [False, True, False]
