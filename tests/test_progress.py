"""Progress is a bar for a terminal and plain lines for a log, and importing it costs nothing."""

import io
import subprocess
import sys

import pytest

from mmpeft_ds import progress
from mmpeft_ds.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(monkeypatch, seconds: float, stream: io.StringIO, **options) -> str:
    """What counting to three shows, with so many seconds between two of them."""
    clock = iter(range(10**6))
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) * seconds)
    with Progress("read", 3, "pictures", **options) as counted:
        for _ in range(3):
            counted.advance(note="loss 0.5", details="epoch 1")
    return stream.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    lines = run(monkeypatch, 11.0, io.StringIO()).splitlines()
    assert len(lines) == 3 and lines[1].startswith("read: 2 of 3 pictures, epoch 1, loss 0.5, left ")
    assert run(monkeypatch, 0.01, io.StringIO()) == ""


def test_the_first_and_the_last_line_can_be_asked_for(monkeypatch):
    lines = run(monkeypatch, 0.01, io.StringIO(), first_and_last=True).splitlines()
    assert [line[:9] for line in lines] == ["read: 1 o", "read: 3 o"]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_other_ranks_show_nothing(monkeypatch, stream):
    assert run(monkeypatch, 11.0, stream(), shown=False, first_and_last=True) == ""


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("train", 2, "steps") as outer:
        for _ in range(2):
            assert list(Progress("evaluate", 3, "steps").track("abc")) == ["a", "b", "c"]
            outer.say("step [1]: accuracy 0.5")
            outer.advance(note="loss 0.25")
    shown = sys.stderr.getvalue()
    assert "step [1]: accuracy 0.5\n" in shown
    last = [line for line in shown.splitlines() if "train" in line][-1]
    assert "2/2" in last and "loss 0.25" in last
    assert progress._Bar.display is None


def test_importing_it_imports_neither_torch_nor_rich():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit(bool({'torch', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code, progress.__file__], timeout=120).returncode == 0
