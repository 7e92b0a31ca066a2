"""SVG drawings of unknown origin: their metadata, and pictures of them by resvg, in a process that may do little else.

resvg (package resvg-py, the extra `svg`; MIT, the library Apache-2.0 or MIT) was taken for these reasons: it runs no
scripts and has no network code, brings no C libraries of its own, and needs half the time of CairoSVG. What a hostile
drawing could still ask of it is refused by the operating system: `confine` leaves the child process no file or socket
to open, 1 GiB of memory, and some seconds of CPU for a drawing. If the process dies, the drawing is the reason and the
next one gets a new process.

Fonts are not read, so that a drawing gives the same picture on every machine: its letters are not drawn, unless they
were stored as paths.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"
HREF = ("href", "{http://www.w3.org/1999/xlink}href")
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC = "{http://purl.org/dc/elements/1.1/}"
PIXELS = {"": 1, "px": 1, "pt": 4 / 3, "pc": 16, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96}  # CSS, 96 to the inch
LENGTH = re.compile(r"\s*([+-]?[\d.]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)

MEMORY = 1 << 30  # bytes of address space
LARGEST = 16 << 20  # bytes of a file
SECONDS = 20  # of CPU for a drawing; the slowest of 7,458 in Debian's openclipart took less than one


class Unusable(Exception):
    """A drawing that gives no picture; the reason in a few words."""


class Renderer:
    """Reads and draws SVG files in a child process. Use as a context manager.

    Args:
        seconds: CPU time that one file may take.
    """

    def __init__(self, seconds: int = SECONDS):
        self.seconds = seconds
        self._child: subprocess.Popen | None = None

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def metadata(self, data: bytes) -> dict[str, Any]:
        """`title`, `keywords`, `licence`, `creator` as its RDF has them, empty where it has none. Raises Unusable."""
        return json.loads(self._ask("metadata", data))

    def png(self, data: bytes, side: int) -> bytes:
        """PNG of `side` x `side` pixels: the whole drawing in the middle, on white. Raises Unusable."""
        return self._ask("png", data, side)

    def _ask(self, what: str, data: bytes, side: int = 0) -> bytes:
        if len(data) > LARGEST:
            raise Unusable(f"larger than {LARGEST >> 20} MiB")
        if self._child is None:
            command = [sys.executable, __file__, str(self.seconds)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._child = subprocess.Popen(command, **pipes)
        try:
            _write(self._child.stdin, {"what": what, "side": side}, data)
            answer, body = _read(self._child.stdout)
        except (BrokenPipeError, EOFError):
            raise Unusable(self._end()) from None
        if "unusable" in answer:
            raise Unusable(answer["unusable"])
        return body

    def _end(self) -> str:
        """End the child; why it had ended before, if it had."""
        child, self._child = self._child, None
        if child is None:
            return ""
        child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        code = child.wait()
        if -code in (signal.SIGXCPU, signal.SIGKILL):
            return f"needs more than {self.seconds} s of CPU"
        return f"the renderer fails on it ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _write(stream: Any, header: dict[str, Any], body: bytes = b"") -> None:
    stream.write(json.dumps(header | {"bytes": len(body)}).encode() + b"\n" + body)
    stream.flush()


def _read(stream: Any) -> tuple[dict[str, Any], bytes]:
    """A header and its body. Raises EOFError where the stream ends before."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    header = json.loads(line)
    body = stream.read(header["bytes"])
    if len(body) < header["bytes"]:
        raise EOFError
    return header, body


# What follows runs in the child.


def confine() -> None:
    """From now on this process opens no file and no socket, writes no file, and gets no more than MEMORY."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # stdin, stdout and stderr are open
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def serve(seconds: int) -> None:
    """Answer requests until stdin ends."""
    import resvg_py

    confine()
    while True:
        try:
            request, data = _read(sys.stdin.buffer)
        except EOFError:
            return
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + seconds, hard))
        try:
            if request["what"] == "metadata":
                body = json.dumps(metadata(parsed(data))).encode()
            else:
                markup = framed(parsed(data), request["side"])
                drawn = resvg_py.svg_to_bytes(svg_string=markup, background="#fff", skip_system_fonts=True, dpi=96)
                body = bytes(drawn)
            _write(sys.stdout.buffer, {}, body)
        except Unusable as error:
            _write(sys.stdout.buffer, {"unusable": str(error)})
        except MemoryError:
            _write(sys.stdout.buffer, {"unusable": f"needs more than {MEMORY >> 20} MiB of memory"})
        except BaseException as error:  # a panic of Rust is no Exception
            words = " ".join(str(error).split())[:60]
            _write(sys.stdout.buffer, {"unusable": f"cannot be drawn ({words or type(error).__name__})"})


def parsed(data: bytes) -> ElementTree.Element:
    """The root of a drawing. External entities are not read, and expat bounds how far internal ones grow.

    Raises:
        Unusable: not XML, or not an SVG.
    """
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise Unusable("not well-formed XML") from error
    if root.tag not in ("svg", f"{SVG}svg"):
        raise Unusable("no SVG")
    return root


def metadata(root: ElementTree.Element) -> dict[str, Any]:
    """RDF metadata of a drawing, see `Renderer.metadata`."""
    work = next((e for e in root.iter() if e.tag.endswith("}Work")), None)
    if work is None:
        return {"title": "", "keywords": [], "licence": "", "creator": ""}
    licence = next((e.get(f"{RDF}resource", "") for e in work if e.tag.endswith("}license")), "")
    return {
        "title": (work.findtext(f"{DC}title") or "").strip(),
        "keywords": [(e.text or "").strip() for e in work.iterfind(f"{DC}subject//{RDF}li")],
        "licence": licence.strip(),
        "creator": (work.findtext(f"{DC}creator/*/{DC}title") or "").strip(),
    }


def framed(root: ElementTree.Element, side: int) -> str:
    """A drawing as XML without document type, of `side` x `side` pixels. Raises Unusable."""
    left, top, width, height = _box(root)
    for element in root.iter():
        if not element.tag.startswith("{"):
            element.tag = SVG + element.tag  # older programs left the namespace out
        for key in HREF:
            target = element.get(key, "#").strip()
            if element.tag == f"{SVG}a":
                element.attrib.pop(key, None)  # a link to follow, nothing to draw
            elif target and not target.startswith(("#", "data:")):
                raise Unusable("needs a file that is not in it")
    root.set("viewBox", f"{left} {top} {width} {height}")
    root.set("width", str(side))
    root.set("height", str(side))
    root.set("preserveAspectRatio", "xMidYMid meet")
    return ElementTree.tostring(root, "unicode")


def _box(root: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, top, width and height of what a drawing shows, in its own units. Raises Unusable."""
    try:
        left, top, width, height = (float(number) for number in re.split(r"[\s,]+", root.get("viewBox", "").strip()))
    except ValueError:
        left = top = 0.0
        width, height = (_pixels(root.get(side, "")) for side in ("width", "height"))
    box = (left, top, width, height)
    if not all(map(math.isfinite, box)) or min(width, height) <= 0:
        raise Unusable("has no size")
    return box


def _pixels(length: str) -> float:
    """A length in pixels; NaN where it depends on something else, such as a share of the page."""
    match = LENGTH.fullmatch(length)
    try:
        return float(match[1]) * PIXELS[match[2].lower()] if match else math.nan
    except (KeyError, ValueError):
        return math.nan


if __name__ == "__main__":
    # This folder must not come first on the path: its file names would hide installed modules of the same name.
    sys.path.remove(str(Path(__file__).resolve().parent))
    serve(int(sys.argv[1]))
