"""Drawings of unknown origin: what is read and drawn of them, and what none of them can do."""

import io
import subprocess
import sys

import pytest
from PIL import Image

pytest.importorskip("resvg_py")

from data_prep.sources.common import svg
from tests.helpers import ROOT
from tests.helpers.data.drawings import circle, drawing

SQUARE = '<rect width="100" height="100" fill="blue"/>'


@pytest.fixture(scope="module")
def renderer():
    with svg.Renderer() as running:
        yield running


def drawn(renderer, text, side=64):
    with Image.open(io.BytesIO(renderer.png(text.encode(), side))) as picture:
        return picture.convert("RGB")


def share(picture, colour):
    pixels = list(picture.get_flattened_data() if hasattr(picture, "get_flattened_data") else picture.getdata())
    return sum(pixel == colour for pixel in pixels) / len(pixels)


def test_metadata_is_that_of_the_work(renderer):
    text = drawing(SQUARE, "  A  title ", ["one", "two"], "http://example.org/l", "Ann")
    want = {"title": "A  title", "keywords": ["one", "two"], "licence": "http://example.org/l", "creator": "Ann"}
    assert renderer.metadata(text.encode()) == want
    empty = {"title": "", "keywords": [], "licence": "", "creator": ""}
    assert renderer.metadata(b"<svg/>") == empty


@pytest.mark.parametrize(
    "size",
    [
        'width="100" height="100"',
        'width="75pt" height="75pt"',  # lengths in points once came out as nothing
        'width="50" height="50" viewBox="0 0 100 100"',
        'viewBox="0,0 100 100"',
        'width="100%" height="100%" viewBox="0 0 100 100"',
    ],
)
def test_sizes_in_any_unit_fill_the_picture(renderer, size):
    assert share(drawn(renderer, drawing(SQUARE, size=size)), (0, 0, 255)) == 1


def test_a_long_drawing_is_whole_and_in_the_middle(renderer):
    text = drawing('<rect width="1e6" height="1e5" fill="blue"/>', size='width="1e6" height="1e5"')
    picture = drawn(renderer, text, 100)
    assert picture.size == (100, 100) and share(picture, (0, 0, 255)) == pytest.approx(0.1, abs=0.02)
    assert picture.getpixel((50, 50)) == (0, 0, 255) and picture.getpixel((50, 5)) == (255, 255, 255)


def test_elements_without_the_namespace_are_drawn(renderer):
    assert share(drawn(renderer, f'<svg width="100" height="100">{SQUARE}</svg>'), (0, 0, 255)) == 1


def test_letters_are_not_drawn_whatever_fonts_the_machine_has(renderer):
    assert share(drawn(renderer, drawing('<text y="60" font-size="60">Hello</text>')), (255, 255, 255)) == 1


def test_entities_of_the_file_itself_are_read(renderer):
    text = (
        f'<!DOCTYPE svg [<!ENTITY blue "#0000ff">]><svg width="9" height="9">{SQUARE.replace("blue", "&blue;")}</svg>'
    )
    assert share(drawn(renderer, text), (0, 0, 255)) == 1


def bomb():
    """Ten levels of ten copies each: 10**10 shapes."""
    levels = "".join(f'<g id="g{i + 1}">' + f'<use xlink:href="#g{i}" x="{i}"/>' * 10 + "</g>" for i in range(10))
    return drawing(f'<defs><g id="g0">{circle(5, 1)}</g>{levels}</defs><use xlink:href="#g10"/>')


def laughs():
    entities = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(10))
    return f'<!DOCTYPE svg [<!ENTITY l0 "ha">{entities}]><svg width="9" height="9"><text>&l10;</text></svg>'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<svg", "not well-formed XML"),
        ("", "not well-formed XML"),
        ("<html/>", "no SVG"),
        (laughs(), "not well-formed XML"),
        ('<!DOCTYPE svg [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg><text>&e;</text></svg>', "not well-formed XML"),
        (drawing(SQUARE, size='width="100%" height="100%"'), "has no size"),
        (drawing(SQUARE, size='viewBox="0 0 0 100"'), "has no size"),
        (drawing(SQUARE, size='viewBox="0 0 nan 100"'), "has no size"),
        (drawing('<image xlink:href="/etc/passwd"/>'), "needs a file that is not in it"),
        (drawing('<image href="http://localhost/a.png"/>'), "needs a file that is not in it"),
        (drawing('<use xlink:href="other.svg#a"/>'), "needs a file that is not in it"),
        (drawing('<filter id="f"><feImage href="a.png"/></filter>'), "needs a file that is not in it"),
    ],
)
def test_what_gives_no_picture_says_why_and_the_next_is_drawn(renderer, text, reason):
    with pytest.raises(svg.Unusable, match=reason):
        renderer.png(text.encode(), 64)
    assert share(drawn(renderer, drawing(SQUARE)), (0, 0, 255)) == 1


def test_a_link_to_follow_is_no_file_that_is_needed(renderer):
    text = drawing(f'<a xlink:href="http://example.org">{SQUARE}</a>')
    assert share(drawn(renderer, text), (0, 0, 255)) == 1


def test_a_drawing_that_asks_for_too_much_ends_its_process_and_no_other():
    with svg.Renderer(seconds=1) as renderer:
        renderer.png(drawing(SQUARE).encode(), 64)
        with pytest.raises(svg.Unusable, match="CPU|memory|fails on it|cannot be drawn"):
            renderer.png(bomb().encode(), 64)
        assert share(drawn(renderer, drawing(SQUARE)), (0, 0, 255)) == 1


def test_a_file_beyond_the_largest_is_not_read(renderer, monkeypatch):
    monkeypatch.setattr(svg, "LARGEST", 1 << 20)
    with pytest.raises(svg.Unusable, match="larger than 1 MiB"):
        renderer.metadata(b" " * ((1 << 20) + 1))


@pytest.mark.parametrize("attempt", ["open('/etc/hosts')", "socket.socket()", "bytearray(2 << 30)"])
def test_a_confined_process_opens_nothing_and_grows_no_further(attempt):
    code = f"import socket\nfrom data_prep.sources.common import svg\n{{}}{attempt}\n"
    free = subprocess.run([sys.executable, "-c", code.format("")], cwd=ROOT, capture_output=True)
    confined = subprocess.run([sys.executable, "-c", code.format("svg.confine()\n")], cwd=ROOT, capture_output=True)
    assert free.returncode == 0 and confined.returncode == 1
    assert b"OSError" in confined.stderr or b"MemoryError" in confined.stderr
