"""The commands of docs/own_pictures.md, one after the other, on a few drawn pictures: from JSON lines to answers."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mmpeft_ds.backbones.common import packaged
from mmpeft_ds.errors import BadInput
from tests.helpers import ROOT
from tests.helpers.doc_pages import blocks, commands
from tests.helpers.launch import free_port

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
COLORS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square")
# Appended to the commands of the page, which else take minutes.
TINY = {
    "launchers/train.py": ["--set", "optim.epochs=2", "--set", "data.global_batch=8"],
    "launchers/evaluate.py": [],
}


@pytest.fixture
def desk(tmp_path):
    """A working directory of somebody who has the repository, pictures, and the lines that the page asks for."""
    for name in ("launchers", "data_prep", "recipes", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    draw(tmp_path / "pictures", 24)
    draw(tmp_path / "new_photos", 4)
    return tmp_path


def draw(folder: Path, count: int) -> None:
    folder.mkdir()
    place = random.Random(count)
    for i in range(count):
        color, shape = COLORS[i % 4], SHAPES[i // 4 % 2]
        picture = Image.new("RGB", (64, 64), "white")
        x, y = place.randrange(8, 24), place.randrange(8, 24)
        getattr(ImageDraw.Draw(picture), "ellipse" if shape == "circle" else "rectangle")(
            (x, y, x + 30, y + 30), color
        )
        picture.save(folder / f"{i:02d}-{color}-{shape}.png")


def write_lines(desk: Path, line) -> None:
    """train.jsonl and val.jsonl with what `line` makes of colour and shape."""
    pictures = sorted((desk / "pictures").iterdir())
    for name, part in (("train", pictures[:16]), ("val", pictures[16:])):
        rows = [{"image": f"pictures/{p.name}", **line(*p.stem.split("-")[1:])} for p in part]
        (desk / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(desk: Path, section: str) -> None:
    """Every command of a section of the page, in order, with fewer epochs; without `make`, and what needs the hub."""
    page = (ROOT / "docs" / "own_pictures.md").read_text("utf-8")
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "MMPEFT_MODELS": str(packaged.root()),
        "DS_ACCELERATOR": "cpu",
    }
    shells = [b for b in blocks(text, "own_pictures.md") if b.language == "sh" and "hub" not in b.needs]
    for words in (w for b in shells for w in commands(b) if w[0] != "make"):
        script = next(w for w in words if w.endswith(".py"))
        if words[0] == "deepspeed":  # whose own port may be another run's
            words[1:1] = ["--master_port", str(free_port())]
        done = subprocess.run(
            [*words, *TINY.get(script, [])], cwd=desk, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (words, done.stderr[-2000:])


def test_search(desk):
    write_lines(desk, lambda color, shape: {"captions": [f"a {color} {shape}", f"{shape} in {color}"]})
    run(desk, "Search")
    hits = [json.loads(line) for line in (desk / "results" / "results.jsonl").read_text().splitlines()]
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4] and len({hit["image"] for hit in hits}) == 4
    assert (desk / "results" / "results.png").stat().st_size > 1000 and (desk / "own.png").exists()
    assert json.loads((desk / "runs" / "retrieval_own" / "evaluation-val.json").read_text())


def test_questions(desk):
    write_lines(
        desk,
        lambda color, shape: {
            "questions": [{"question": "what is it?", "answer": shape}, {"question": "what color?", "answer": color}]
        },
    )
    run(desk, "Questions")
    answers = [json.loads(line) for line in (desk / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and {a["prediction"] for a in answers} <= {*COLORS, *SHAPES}


def test_classes(desk):
    for picture in sorted((desk / "pictures").iterdir()):
        folder = desk / "photos" / picture.stem.split("-")[1]
        folder.mkdir(parents=True, exist_ok=True)
        picture.rename(folder / picture.name)
    run(desk, "Classes")
    answers = [json.loads(line) for line in (desk / "classes.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    assert all(f"-{answer['prediction']}-" in answer["image"] for answer in answers), answers


def test_captions(desk):
    try:
        packaged.ensure("smollm2")
    except BadInput:
        pytest.skip("the packaged language model is not installed: make captioner")
    write_lines(desk, lambda color, shape: {"captions": [f"a {color} {shape}", f"{shape} in {color}"]})
    run(desk, "Captions")
    rows = [json.loads(line) for line in (desk / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(isinstance(row["prediction"], str) for row in rows)
