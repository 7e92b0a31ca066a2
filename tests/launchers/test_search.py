"""Searching a folder of new pictures with a retrieval adapter, as a user does."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mmpeft_ds import adapter
from mmpeft_ds.data import pictures
from mmpeft_ds.runs import inputs
from tests.helpers.runs import tiny_adapters


def hits_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "kind", ["retrieval", "retrieval on stored features", "retrieval with clip", "retrieval with blip"]
)
def test_the_ranking_is_that_of_the_adapters_own_scores(adapters, photos, command, kind):
    directory, out = adapters(kind), photos.parent / "results"
    texts = ["a red circle", "the blue square"]
    words = [word for text in texts for word in ("--text", text)]
    code, shown, err = command(
        "search.py", "--adapter", directory, "--images", photos, *words, "--top", 2, "--out", out
    )
    assert code == 0, err
    hits = hits_of(out)
    assert [(h["text"], h["rank"]) for h in hits] == [(t, r) for t in texts for r in (1, 2)]
    assert all(text in shown for text in texts) and "results.png" in shown
    pictures = sorted(map(str, photos.iterdir()))
    rows = adapter.load(directory, pictures=True).predict(pictures, [texts] * 3)
    for text in texts:
        scores = {r["sample_id"]: r["prediction"] for r in rows if r["text"] == text}
        best = sorted(scores, key=scores.get, reverse=True)[:2]
        own = [h for h in hits if h["text"] == text]
        assert [h["image"] for h in own] == best
        assert [h["score"] for h in own] == pytest.approx([scores[name] for name in best], abs=1e-6)


def test_the_sheet_shows_the_pictures_in_order_of_their_rank(adapters, tmp_path, command):
    folder = tmp_path / "colours"
    folder.mkdir()
    colours = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
    for name, colour in colours.items():
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
    command(
        "search.py", "--adapter", adapters("retrieval"), "--images", folder, "--text", "red", "--out", tmp_path / "o"
    )
    hits = hits_of(tmp_path / "o")
    with Image.open(tmp_path / "o" / "results.png") as sheet:
        column = [sheet.getpixel((10 + i * 230 + 110, 26 + 10 + 110)) for i in range(3)]
    assert column == [colours[h["image"].rpartition("/")[2][:-4]] for h in hits]


def test_the_sheet_shows_a_picture_as_the_model_reads_it(tmp_path):
    """Turned as its EXIF says: a phone's pictures lay on their side."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of what is seen is stored at the left
    stored = Image.new("RGB", (40, 40), "red")
    stored.paste("blue", (20, 0, 40, 40))
    stored.save(tmp_path / "a.png", exif=exif)
    seen = pictures.shown((tmp_path / "a.png").read_bytes())
    assert seen.getpixel((20, 5)) == (255, 0, 0) and seen.getpixel((20, 35)) == (0, 0, 255)
    deep = Image.fromarray(np.full((8, 8), 20_000, dtype=np.uint16))
    deep.save(tmp_path / "b.png")
    assert pictures.shown((tmp_path / "b.png").read_bytes()).getpixel((4, 4)) == (78, 78, 78)


def test_hidden_files_of_a_folder_are_no_pictures_and_those_with_other_endings_are_told(photos, capsys):
    (photos / "._photo0.jpg").write_bytes(b"macOS")
    (photos / ".thumbnails").mkdir()
    (photos / ".thumbnails" / "photo0.jpg").write_bytes(b"small")
    assert [p.name for p in inputs.find_pictures([photos])] == ["photo0.jpg", "photo1.jpg", "photo2.png"]
    assert inputs.find_pictures([photos / "._photo0.jpg"]), "one that is named is taken"
    assert not capsys.readouterr().err
    (photos / "photo3.heic").write_bytes(b"")
    assert len(inputs.find_pictures([photos])) == 3
    assert "endings are others: 1, first photo3.heic" in capsys.readouterr().err


def test_captions_are_ranked_for_each_picture(adapters, photos, command, tmp_path):
    (tmp_path / "captions.txt").write_text("\n".join(tiny_adapters.CAPTIONS) + "\n\n")
    code, shown, err = command(
        "search.py", "--adapter", adapters("retrieval"), "--images", photos, "--captions", tmp_path / "captions.txt",
        "--out", tmp_path / "o",
    )  # fmt: skip
    hits = hits_of(tmp_path / "o")
    assert code == 0 and len(hits) == 9 and "photo2.png" in shown, err
    assert {h["text"] for h in hits if h["image"].endswith("photo0.jpg")} == set(tiny_adapters.CAPTIONS)
    for i in range(0, 9, 3):
        assert [h["rank"] for h in hits[i : i + 3]] == [1, 2, 3]
        assert hits[i]["score"] >= hits[i + 1]["score"] >= hits[i + 2]["score"]


def test_a_second_search_reads_no_picture_that_has_not_changed(adapters, photos, command, monkeypatch):
    from mmpeft_ds.runs import search

    seen = []
    picture = search.Searcher.picture
    monkeypatch.setattr(search.Searcher, "picture", lambda self, path: seen.append(path.name) or picture(self, path))
    out = photos.parent / "o"
    words = ("search.py", "--adapter", adapters("retrieval"), "--images", photos, "--out", out)
    command(*words, "--text", "red")
    first = hits_of(out)
    assert len(seen) == 3
    command(*words, "--text", "red")
    assert len(seen) == 3 and hits_of(out) == first
    Image.new("RGB", (9, 9), "blue").save(photos / "photo2.png")
    command(*words, "--text", "red")
    assert seen[3:] == ["photo2.png"] and hits_of(out) != first
    command("search.py", "--adapter", adapters("retrieval on stored features"), *words[3:], "--text", "red")
    assert len(seen) == 7, "features of another adapter are not taken over"


def test_a_kill_leaves_the_features_of_pictures_that_were_read(adapters, photos, command, monkeypatch):
    from mmpeft_ds.runs import search

    out, left = photos.parent / "o", photos.parent / "left"
    read = search.Searcher.picture

    def seen(self, path):
        if path.name == "photo2.png":
            shutil.copytree(out, left)  # as a kill would leave it
        return read(self, path)

    words = ("search.py", "--adapter", adapters("retrieval"), "--images", photos, "--text", "red", "--batch", 1)
    monkeypatch.setattr(search.Searcher, "picture", seen)
    monkeypatch.setattr(search, "SAVE_EVERY", -1)
    assert command(*words, "--out", out)[0] == 0
    again = []
    monkeypatch.setattr(search.Searcher, "picture", lambda self, path: again.append(path.name) or read(self, path))
    assert command(*words, "--out", left)[0] == 0 and again == ["photo2.png"]
    assert hits_of(left) == hits_of(out)


def test_pictures_that_cannot_be_read_are_left_out_and_said(adapters, photos, command):
    (photos / "photo1.jpg").write_bytes(b"no picture")
    out = photos.parent / "o"
    words = ("search.py", "--adapter", adapters("retrieval"), "--images", photos, "--text", "red", "--out", out)
    code, _, err = command(*words)
    assert code == 2 and "1 of 3 images" in err and "photo1.jpg" in err and len(hits_of(out)) == 2
    Image.new("RGB", (900, 3)).save(photos / "photo2.png")
    code, shown, err = command(*words)
    assert code == 2 and "2 of 3 images" in err and "left out: " in shown, "each one is named"
    assert "photo2.png: cannot be used (aspect" in shown and ".npy" not in shown


def test_a_link_to_nothing_is_left_out_and_a_name_that_is_not_utf_8_is_found(adapters, photos, command):
    (photos / "photo1.jpg").rename(photos / "photo\udcff.jpg")
    (photos / "photo1.jpg").symlink_to(photos / "nowhere.jpg")
    out = photos.parent / "o"
    words = ("search.py", "--adapter", adapters("retrieval"), "--images", photos, "--text", "red", "--out", out)
    for _ in range(2):
        code, shown, err = command(*words)
        assert code == 2 and "1 of 4 images" in err and "photo1.jpg" in err and r"photo\udcff.jpg" in shown
        assert str(photos / "photo\udcff.jpg") in {hit["image"] for hit in hits_of(out)}


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        ("retrieval", [], ["nothing to look for", "--text"]),
        ("retrieval", ["--text", "a", "--captions", __file__], ["nothing to look for"]),
        ("vqa", ["--text", "a"], ["task retrieval", "predict.py"]),
        ("retrieval", ["--text", "a", "--top", "0"], ["--top"]),
        ("retrieval", ["--text", "a", "--device", "gpu"], ["--device gpu"]),
    ],
)
def test_what_cannot_be_searched_is_one_line(adapters, photos, command, kind, words, says):
    code, _, err = command(
        "search.py", "--adapter", adapters(kind), "--images", photos, "--out", photos.parent / "o", *words
    )
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in says), err


def test_results_that_cannot_be_written_are_one_line_before_anything_is_loaded(adapters, photos, command, monkeypatch):
    from mmpeft_ds import adapter

    monkeypatch.setattr(adapter, "load", None)
    (photos.parent / "file").write_text("")
    words = ("search.py", "--adapter", adapters("retrieval"), "--images", photos, "--text", "a dog", "--out")
    for out in (photos.parent / "file", photos.parent / "file" / "results"):
        code, _, err = command(*words, out)
        assert code == 2 and err.count("\n") == 1 and str(out) in err and "cannot be written" in err


def test_pictures_that_do_not_go_together_are_read_alone(adapters, photos, command, monkeypatch):
    from mmpeft_ds.errors import BadInput
    from mmpeft_ds.runs.search import Searcher

    pictures = Searcher.pictures

    def alone(self, samples):
        if len(samples) > 1 or "photo1" in samples[0].sample_id:
            raise BadInput(f"{samples[0].sample_id}: cannot be packed")
        return pictures(self, samples)

    monkeypatch.setattr(Searcher, "pictures", alone)
    out = photos.parent / "results"
    words = ("search.py", "--adapter", adapters("retrieval"), "--images", photos, "--text", "a dog", "--out", out)
    code, _, err = command(*words)
    assert code == 2 and "1 of 3 images were left out" in err and "photo1" in err
    assert len((out / "results.jsonl").read_text().splitlines()) == 2
