"""Asking adapters of every task about new pictures, as a user does: by the model card's words, by the command."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

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
    assert "cannot be read" in shown
    (photos / "photo1.jpg").write_bytes(encoded(3))  # mended, the same command asks about this one alone
    code, shown, _ = command(
        "predict.py", "--adapter", adapters("captioning"), "--images", photos, "--out", out, "--batch", 1
    )
    assert code == 0 and "2 images had theirs already" in shown
    assert {row["image"]: "prediction" in row for row in rows_of(out)} == {
        str(photos / name): True for name in ("photo0.jpg", "photo1.jpg", "photo2.png")
    }


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


def test_pictures_given_to_a_model_of_stored_features_from_python_are_one_line(adapters, photos):
    import mmpeft_ds
    from mmpeft_ds.errors import BadInput

    loaded = mmpeft_ds.load(adapters("retrieval on stored features"))
    with pytest.raises(BadInput, match=r"photo0.jpg.*stored features"):
        loaded.predict([photos / "photo0.jpg"], ["a dog"])
