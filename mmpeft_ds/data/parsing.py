"""Parsing of what one sample brings from outside, its json and its arrays, at a cost that its bytes bound.

Whatever fails while one sample is read, transformed or collated is the sample's: `one_sample` makes it a BadSample, so
that the budget of bad samples ends a run and not the first odd sample, which every restart would meet again.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft_ds.errors import BadInput, BadSample

# Levels of lists and objects in a record. Python's pickle, by which workers hand records over, follows about 500.
MAX_NESTING = 64
# What a question may hold of the keys that stand beside its score.
QUESTION_KEYS = {"type": str, "question_type": str, "question_id": (str, int)}
_DECODER = json.JSONDecoder()


@contextlib.contextmanager
def one_sample() -> Iterator[None]:
    """For a block that works on one sample. Raises BadSample for every failure but BadInput, which is not its own."""
    try:
        yield
    except (BadSample, BadInput):
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is of this sample
        kind = "memory" if isinstance(error, MemoryError) else "fault"
        raise BadSample(kind, described(error)) from error


def described(error: Exception) -> str:
    """An exception in one line, with the place that raised it, so that a fault of ours can be told from bad data."""
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in place)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{where}"


def json_object(data: bytes) -> dict[str, Any]:
    """The object in UTF-8 JSON. Raises BadSample `json`, also for nesting or texts that no later step could handle."""
    try:
        # Strict: json's own decoding lets halves of surrogate pairs pass. A byte order mark is left out as by the
        # codec `utf-8-sig`, which is written in Python.
        text = data.decode().removeprefix("\ufeff")
        value = _parsed(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadSample("json", "a text holds half of a surrogate pair, which is no character") from error
    except (ValueError, RecursionError) as error:
        raise BadSample("json", str(error)[:200]) from error
    if not isinstance(value, dict):
        raise BadSample("json", f"holds a {type(value).__name__}, not an object")
    if text.count("[") + text.count("{") > MAX_NESTING and _levels(value) > MAX_NESTING:
        raise BadSample("json", f"nested deeper than {MAX_NESTING} levels")
    return value


def json_objects(pieces: Iterable[bytes | memoryview]) -> list[dict[str, Any]]:
    """`json_object` of many; plain ones, as nearly all are, in a third of the time."""
    values = []
    for piece in pieces:
        try:
            text = str(piece, "utf-8")
            value, end = _DECODER.raw_decode(text)
            plain = end == len(text) and "\\u" not in text and text.count("[") + text.count("{") <= MAX_NESTING
        except (ValueError, RecursionError):
            plain = False
        values.append(value if plain and type(value) is dict else json_object(bytes(piece)))
    return values


def _parsed(text: str) -> Any:
    """`json.loads`, which spends as long on looking for white space around a small record as on the record."""
    with contextlib.suppress(ValueError):  # for whose words it is parsed again
        value, end = _DECODER.raw_decode(text)
        if end == len(text):
            return value
    return json.loads(text)


def check_nesting(data: bytes) -> None:
    """Raise BadSample `json` for a record that `json_object` would find nested too deep, which few are parsed for."""
    if data.count(b"[") + data.count(b"{") > MAX_NESTING:
        json_object(data)


def check_questions(record: Mapping[str, Any]) -> None:
    """Raise BadSample `type` for a question whose `type` or id could not stand beside its score."""
    questions = record.get("questions")
    for asked in questions if isinstance(questions, (list, tuple)) else ():
        for name, kinds in QUESTION_KEYS.items():
            value = asked.get(name) if isinstance(asked, dict) else None
            if value is not None and not isinstance(value, kinds):
                raise BadSample("type", f"`{name}` of a question is a {type(value).__name__}")


def npy_array(data: bytes) -> np.ndarray:
    """The numbers in the bytes of a .npy file, writable, C-ordered, in this machine's byte order.

    Raises:
        BadSample: `npy` if it is no such file, holds no plain numbers, or fewer of them than its header claims;
            `finite` if one is not finite.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream)
    except Exception as error:  # noqa: BLE001 - the header is a Python literal, whose parser raises nearly anything
        raise BadSample("npy", described(error)) from error
    if dtype.kind not in "biuf" or dtype.hasobject:
        raise BadSample("npy", f"holds {dtype}, no plain numbers")
    count, here = math.prod(shape), len(data) - stream.tell()
    if min(shape, default=0) < 0 or count * dtype.itemsize > here:  # before anything is allocated for it
        raise BadSample("npy", f"claims {shape} {dtype}, and {here:,} bytes follow")
    flat = np.frombuffer(data, dtype, count, stream.tell())
    array = flat.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="), order="C")
    check_finite(array)
    return array


def check_finite(array: np.ndarray) -> None:
    """Raise BadSample `finite` if a number of an array is not."""
    if array.dtype.kind == "f" and not _all_finite(array):
        wrong = np.count_nonzero(~np.isfinite(array))
        raise BadSample("finite", f"{wrong:,} of {array.size:,} numbers are not finite")


def _all_finite(array: np.ndarray) -> bool:
    if array.dtype == np.float16 and array.size:
        # By the bits, without that of the sign: numpy's own test takes seven times as long.
        return bool((array.view(np.uint16) << 1).max() < 0xF800)
    return bool(np.isfinite(array).all())


def size_in_memory(value: Any) -> int:
    """Bytes of the tensors and arrays in a transformed image: one, or lists and mappings of them."""
    if isinstance(value, Mapping):
        return sum(map(size_in_memory, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(size_in_memory, value))
    return getattr(value, "nbytes", 0)


def _levels(value: Any) -> int:
    levels, here = 0, [value]
    while here := [v for v in here if isinstance(v, (dict, list))]:
        levels += 1
        here = [child for v in here for child in (v.values() if isinstance(v, dict) else v)]
    return levels
