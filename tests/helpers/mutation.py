"""Mutations of valid files, drawn by hypothesis: of any bytes, of a tar's headers, and of values in JSON."""

from __future__ import annotations

import json
import tarfile
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, -1, 1, 255, 2**31 - 1, 2**31, 2**63 - 1, -(2**63), 2**64, 10**30, 0.5, float("nan"), float("inf"), 1e308)
TEXTS = ("", " ", "x" * 5000, "../../outside", "/outside", "a\nb", "\0", "\ud83d", "é\u202e", "!!python/name:os.x")
VALUES = (None, True, [], {}, [[]], [None], {"": None}, [0] * 200, *NUMBERS, *TEXTS)
_BLOCK = tarfile.BLOCKSIZE
_PLACE = st.integers(0, 2**20)  # as a fraction of the length, so that one draw suits every seed


def edits(most: int = 6) -> st.SearchStrategy[list[tuple[str, int, int, Any]]]:
    """None to `most` edits for `edited` and `edited_value`: what is done, where, how much, and with which value."""
    verbs = st.sampled_from(("flip", "set", "cut", "drop", "repeat", "insert", "move", "zero"))
    return st.lists(st.tuples(verbs, _PLACE, st.integers(0, 255), st.sampled_from(VALUES)), max_size=most)


def edited(data: bytes, changes: list[tuple[str, int, int, Any]]) -> bytes:
    """`data` after the edits, one after the other; at most a few KiB longer."""
    for verb, place, amount, value in changes:
        at = place * len(data) >> 20
        some = data[at : at + 1 + amount]
        if verb == "flip":
            data = data[:at] + bytes(b ^ 1 << amount % 8 for b in some[:1]) + data[at + 1 :]
        elif verb == "set":
            data = data[:at] + bytes([amount]) + data[at + 1 :]
        elif verb == "cut":
            data = data[:at]
        elif verb == "drop":
            data = data[:at] + data[at + len(some) :]
        elif verb == "repeat":
            data = data[:at] + some * 4 + data[at + len(some) :]
        elif verb == "insert":
            data = data[:at] + str(value).encode("utf-8", "replace")[:300] + data[at:]
        elif verb == "move":
            data = data[:at] + data[at + len(some) :] + some
        else:
            data = data[:at] + bytes(len(some)) + data[at + len(some) :]
    return data


def edited_value(value: Any, changes: list[tuple[str, int, int, Any]]) -> Any:
    """A copy of a JSON value in which entries are replaced, removed, doubled or given other names."""
    value = json.loads(json.dumps(value))
    for verb, place, amount, new in changes:
        new = json.loads(json.dumps(new))
        owners = [owner for owner in _containers(value) if owner]
        if not owners:
            return new
        owner = owners[place % len(owners)]
        key = list(owner)[amount % len(owner)] if isinstance(owner, dict) else amount % len(owner)
        if verb in ("cut", "drop"):
            del owner[key]
        elif verb == "repeat" and isinstance(owner, list):
            owner += owner[key : key + 1] * 3
        elif verb == "move" and isinstance(owner, dict):
            owner[str(new)[:50]] = owner.pop(key)
        elif verb == "zero":
            owner[key] = type(owner[key])() if owner[key] is not None else 0
        elif verb == "insert":
            owner[key] = [owner[key], new]
        else:
            owner[key] = new
    return value


def with_right_sums(piece: bytes) -> bytes:
    """A tar in which every block that stands where a header would has the right sum, so that what it says is read."""
    data, at = bytearray(piece), 0
    while at + _BLOCK <= len(data) and any(data[at : at + _BLOCK]):
        head = data[at : at + _BLOCK]
        head[148:156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(head)
        try:
            size = int(bytes(head[124:136]).strip(b" \0"), 8)
        except ValueError:
            break
        at += _BLOCK + -(-max(size, 0) // _BLOCK) * _BLOCK
    return bytes(data)


def _containers(value: Any) -> list[Any]:
    found, here = [], [value]
    while here := [v for v in here if isinstance(v, (dict, list))]:
        found += here
        here = [child for v in here for child in (v.values() if isinstance(v, dict) else v)]
    return found
