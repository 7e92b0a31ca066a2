"""The two ways in which input can be wrong. Everything else is a fault of ours and keeps its traceback."""

from __future__ import annotations

LONGEST = 4000  # characters of a line; a value may be a whole file


def printable(text: str) -> str:
    """`text` as one line that a terminal shows as it is, of at most about `LONGEST` characters.

    Line breaks, control characters, marks that reverse the direction of writing and halves of characters are written
    as Python escapes them: they come from names and values of the user's files.
    """
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} [{len(text) - LONGEST:,} characters] {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def counted(number: int, kind: str) -> str:
    """`1 question`, `1,200 questions`."""
    return f"{number:,} {kind}{'' if number == 1 else 's'}"


class BadInput(Exception):  # noqa: N818 - names what the user gave, not what we did
    """Something the user gave cannot work: one line that says what, where and how to mend it; exit code 2."""

    def __init__(self, line: str = ""):
        super().__init__(printable(line))


class AgreedBadInput(BadInput):
    """Bad input that all ranks have learnt of at the same point: they may still act together, and save."""


class BadSample(Exception):  # noqa: N818
    """One sample of a shard cannot be used; it becomes a weight-0 slot and is counted under `kind`.

    Args:
        kind: short stable word for the counter, such as `image`, `json`, `field`, `type`, `pixels`.
        detail: what was wrong with this sample, in a few words.
    """

    def __init__(self, kind: str, detail: str = ""):
        self.kind = kind
        self.detail = printable(detail)
        super().__init__(f"{kind}: {self.detail}" if detail else kind)
