"""The two ways in which input can be wrong. Everything else is a fault of ours and keeps its traceback."""

from __future__ import annotations


class BadInput(Exception):  # noqa: N818 - names what the user gave, not what we did
    """Something the user gave cannot work: one line that says what, where and how to mend it; exit code 2."""


class AgreedBadInput(BadInput):
    """Bad input that all ranks have learnt of at the same point: they may still act together, and save."""


class BadSample(Exception):  # noqa: N818
    """One sample of a shard cannot be used; it becomes a weight-0 slot and is counted under `kind`.

    Args:
        kind: short stable word for the counter, such as `image`, `json`, `field`, `type`, `pixels`.
        detail: what was wrong with this sample, in a few words.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail
