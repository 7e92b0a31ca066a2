"""Open Clip Art, from a small folder of SVG files that looks like the package."""

import io
import json
import subprocess

import pytest
from PIL import Image

pytest.importorskip("resvg_py")

from data_prep import prepare
from data_prep.common.reading import parse_sample
from data_prep.few_shot import _records
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.errors import BadInput
from tests.helpers import ROOT
from tests.helpers.data.drawings import circle, drawing

PUBLIC = "http://web.resource.org/cc/PublicDomain"


def package(root):
    """File -> what it holds: 24 ordinary drawings, and one of each kind that is set aside."""
    files = {
        f"animals/beast_{i}.svg": drawing(circle(10 + 3 * i, i), title=f"Beast {'abcdefghijklmnopqrstuvwx'[i]}")
        for i in range(24)
    }
    files |= {f"stars/{i}.svg": drawing(circle(20, 9 + i), title=f"star {i}") for i in range(6)}
    files["food/pie.svg"] = drawing(
        circle(60, 3, "red"),
        title="Clipart by Ann O. - Apple_pie &amp;amp; cream",
        keywords=["", "HASH(0x8a091c0)", "sweet_food", "pie", "Pie", "unsorted"],
        licence="http://creativecommons.org/licenses/GPL/2.0/",
        creator="Ann O.",
    )
    files["food/pie_again.svg"] = files["food/pie.svg"]
    files["food/cut.svg"] = files["food/pie.svg"][:-20]
    files["plants/untitled.svg"] = drawing(circle(15, 1))
    files["plants/number.svg"] = drawing(circle(16, 1), title="01")
    files["plants/white.svg"] = drawing(circle(16, 1, "white"), title="snow")
    files["plants/photo.svg"] = drawing('<image xlink:href="photo.png" width="9" height="9"/>', title="photograph")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "plants/link.svg").symlink_to(root / "animals/beast_0.svg")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root, out = tmp_path_factory.mktemp("svg"), tmp_path_factory.mktemp("out")
    package(root)
    run(root, out)
    return root, out


def run(root, out, *more):
    fractions = ["--val-fraction", "0.2", "--test-fraction", "0.3"]
    prepare.main(["openclipart", "--root", str(root), "--out", str(out), "--processes", "1", *fractions, *more])


def records(out):
    manifest = Manifest.load(out)
    return {split: [record for _, record in _records(manifest, split)] for split in manifest.splits}


def test_captions_are_the_title_and_the_title_with_keywords(prepared):
    found = [r for of_split in records(prepared[1]).values() for r in of_split]
    (pie,) = [r for r in found if r["class_name"] == "food"]
    assert pie["captions"] == ["apple pie & cream", "apple pie & cream, sweet food, pie"]
    assert pie["creator"] == "Ann O." and pie["licence"].endswith("GPL/2.0/")
    beast = next(r for r in found if r["class_name"] == "animals")
    assert beast["licence"] == "public domain" and "creator" not in beast and len(beast["captions"]) == 1
    assert len(found) == 25 and Manifest.load(prepared[1]).labels == ["animals", "food"]


def test_the_manifest_names_the_licences_and_the_renderer(prepared):
    import resvg_py

    manifest = Manifest.load(prepared[1])
    assert manifest.licence == "public domain (24), http://creativecommons.org/licenses/GPL/2.0/ (1)"
    assert manifest.source["fingerprint"]["resvg-py"] == resvg_py.__version__
    assert manifest.source["fingerprint"]["resvg"] == resvg_py.__resvg_version__


def test_what_is_no_drawing_with_a_title_of_its_own_is_set_aside_with_its_reason(prepared):
    aside = Manifest.load(prepared[1]).account["train"]["aside"]
    assert {reason: names for reason, (_, names) in aside.items()} == {
        "equal to another drawing": ["food/pie_again.svg"],
        "has the title of a series": [f"stars/{i}.svg" for i in range(6)],
        "needs a file that is not in it": ["plants/photo.svg"],
        "not well-formed XML": ["food/cut.svg"],
        "nothing to be seen on white": ["plants/white.svg"],
        "without a title": ["plants/number.svg", "plants/untitled.svg"],
    }


def test_pictures_are_squares_of_the_size_asked_for(prepared):
    manifest = Manifest.load(prepared[1])
    for split in manifest.splits:
        begin, length = manifest.offsets(split, 0)[0].tolist()
        with open(manifest.path(manifest.shards(split)[0].file), "rb") as stream:
            stream.seek(begin)
            sample = parse_sample(stream.read(length))
        with Image.open(io.BytesIO(sample.images[0])) as picture:
            assert picture.size == (256, 256) and picture.getpixel((0, 0))[:3] == (255, 255, 255)


def test_the_same_files_give_the_same_bytes_again(prepared, tmp_path):
    root, out = prepared
    run(root, tmp_path, "--samples-per-shard", "1000")
    for path in out.glob("*.tar"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_neither_a_near_copy_nor_a_title_that_differs_by_a_number_is_in_two_splits(tmp_path):
    root = tmp_path / "svg"
    root.mkdir()
    for i in range(12):
        shape = circle(8 + 4 * i, i)
        shade = shape.replace("<circle ", '<circle opacity="0.97" ')
        names = ("abcdefghijkl"[i], "mnopqrstuvwx"[i], "abcdefghijkl"[i] + " 2")
        bodies = (shape, shade, f'<rect width="{5 + 7 * i}" height="90" fill="rgb({20 * i},99,9)"/>')
        for number, (name, body) in enumerate(zip(names, bodies, strict=True)):
            (root / f"{i:02}_{number}.svg").write_text(drawing(body, title=f"thing {name}"))
    run(root, tmp_path / "out")
    split_of = {
        record["source_name"]: split for split, of_split in records(tmp_path / "out").items() for record in of_split
    }
    assert len(split_of) == 36 and set(split_of.values()) == {"train", "val", "test"}
    for i in range(12):
        assert len({split_of[f"{i:02}_{number}.svg"] for number in range(3)}) == 1
    # Negative control: where nothing counts as the same drawing, near-copies are drawn apart.
    run(root, tmp_path / "exact", "--same-drawing", "1")
    apart = {
        record["source_name"]: split for split, of_split in records(tmp_path / "exact").items() for record in of_split
    }
    assert any(apart[f"{i:02}_0.svg"] != apart[f"{i:02}_1.svg"] for i in range(12))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--root", "nowhere"], "make openclipart-data"),
        (["--size", "4"], "--size: 4"),
        (["--max-same-title", "0"], "--max-same-title"),
        (["--same-drawing", "1.5"], "--same-drawing"),
        (["--val-fraction", "1"], "--val-fraction"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, more, words):
    with pytest.raises(BadInput, match=words):
        prepare.main(["openclipart", "--root", str(tmp_path), "--out", str(tmp_path / "out"), *more])


def test_a_folder_without_drawings_says_what_it_holds(tmp_path):
    (tmp_path / "svg").mkdir()
    (tmp_path / "svg/a.svg").write_text(drawing(circle(9, 1)))
    with pytest.raises(BadInput, match=r"no drawing is left for training. without a title \(1\)"):
        run(tmp_path / "svg", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_make_offers_the_data():
    shown = subprocess.run(["make", "-n", "openclipart-data"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "download openclipart-svg" in shown.stdout
    assert json.dumps(shown.stdout).count("prepare.py openclipart") == 1
