"""Reading of annotation files as data sets publish them: JSON of any size, JSON lines, lists of names.

A file up to `WHOLE` bytes is parsed at once by the standard library. A larger one is read as a stream by ijson, so
that memory does not grow with it. That costs no time: a file of 38 MiB takes 1.1 s of CPU time either way, and 13 MiB
of memory in place of 221 (orjson: 0.9 s and 315 MiB). A file with half a character in it, an integer above 64
bits or NaN is parsed at once too.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mmpeft_ds.errors import BadInput

WHOLE = 1 << 20  # bytes; the parsed form takes about eight times as much
SCAN = 1 << 20  # bytes read at a time to look for escapes
_NUMBERS = ("integer overflow", "lexical error")  # what ijson says of integers above 64 bits, and of NaN
_BOM = b"\xef\xbb\xbf"
_SURROGATES = re.compile(rb"\\u[dD](?:[89abAB]..\\u[dD][c-fC-F]..|([89a-fA-F]))")  # a pair, or group 1: half of one


def items(path: Path, *keys: str) -> Iterator[Any]:
    """Items of a list in a JSON file.

    Args:
        keys: where the list stands: names of the objects around it, none for a file that is a list.

    Raises:
        BadInput: if the file cannot be read, is no JSON, or has no such list.
    """
    return _stream(path, keys, pairs=False)


def pairs(path: Path, *keys: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of an object in a JSON file, as `items` gives those of a list."""
    return _stream(path, keys, pairs=True)


def lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 text file, as `numbered_lines` gives them with their numbers."""
    return (line for _, line in numbered_lines(path))


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines of a UTF-8 text file that are not blank.

    There may be a byte-order mark, LF or CRLF, and the last line may lack its end.
    Only line feeds end a line: texts hold other separators that `str.splitlines` would cut at.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def json_lines(path: Path) -> Iterator[Any]:
    """Objects of a file with one JSON value per line. Raises BadInput that names the line."""
    for number, line in numbered_lines(path):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: line {number} is no JSON ({error}). Download the file again.") from error


def csv_rows(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    """Rows of a csv file with a header, by the names of its columns. Raises BadInput if it lacks one of `columns`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise BadInput(f"{path}: its first line names no column {missing[0]!r}. Download the file again.")
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from error


def nested(rows: Iterable[Any], key: str) -> Iterator[tuple[Any, Any]]:
    """(row, part) of every part of the list that a row has under `key`; (row, None) of a row without parts."""
    for row in rows:
        parts = row.get(key) if isinstance(row, dict) else None
        yield from ((row, part) for part in (parts if isinstance(parts, list) and parts else [None]))


def records(path: Path) -> Iterator[Any]:
    """Items of a file that is a JSON list or holds one JSON value per line, whichever it is. Raises BadInput."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            is_list = (stream.read(1024).lstrip() or " ")[0] == "["
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    return items(path) if is_list else json_lines(path)


def json_value(path: Path, make: Callable[[list[tuple[str, Any]]], dict] = dict) -> Any:
    """The value of a small JSON file; `make` builds each object from its pairs. Raises BadInput."""
    try:
        return json.loads(path.read_text("utf-8-sig"), object_pairs_hook=make)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


def text(value: Any) -> str:
    """A text of a record as it is. Raises ValueError if it is none, or holds half a character (a lone surrogate)."""
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is no text")
    value.encode()
    return value


def identifier(value: Any) -> int | str:
    """An id of a record as it is, a number or a text. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{str(value)[:40]!r} is no id")
    return value


def _stream(path: Path, keys: tuple[str, ...], pairs: bool) -> Iterator[Any]:
    try:
        whole = path.stat().st_size <= WHOLE or _halves(path)
        yield from (_whole if whole else _large)(path, keys, pairs)
    except OSError as error:
        raise _unreadable(path, error) from error


def _whole(path: Path, keys: tuple[str, ...], pairs: bool) -> Iterator[Any]:
    content = json_value(path, _object)
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, dict if pairs else list):
        raise _no_such(path, keys, pairs)
    if pairs:
        yield from content.pairs if isinstance(content, _Repeated) else content.items()
    else:
        yield from content


class _Repeated(dict):
    """An object of JSON in which a key stands twice. It keeps all its `pairs`, as a stream gives them."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.pairs = pairs


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    return mapping if len(mapping) == len(pairs) else _Repeated(pairs)


def _large(path: Path, keys: tuple[str, ...], pairs: bool) -> Iterator[Any]:
    import ijson

    prefix = ".".join(keys)
    with open(path, "rb") as stream:
        if stream.read(3) != _BOM:
            stream.seek(0)
        try:
            if pairs:
                entries = ijson.kvitems(stream, prefix, use_float=True)
            else:
                entries = ijson.items(stream, f"{prefix}.item" if prefix else "item", use_float=True)
            count = 0
            for value in entries:
                count += 1
                yield value
            if not count:
                stream.seek(0)
                begins = "start_map" if pairs else "start_array"
                if not any(event == begins and place == prefix for place, event, _ in ijson.parse(stream)):
                    raise _no_such(path, keys, pairs)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            if not any(words in str(error) for words in _NUMBERS):
                raise _unreadable(path, error) from error
            # The standard library reads these numbers, as it does in a small file.
            yield from itertools.islice(_whole(path, keys, pairs), count, None)


def _halves(path: Path) -> bool:
    """Whether a file has escapes of half a character, which ijson would turn into a question mark."""
    with open(path, "rb") as stream:
        rest, block = b"", stream.read(SCAN)
        while block:
            data, block = rest + block, stream.read(SCAN)
            keep = len(data) - 11  # where an escape may begin of which not all is there
            for match in _SURROGATES.finditer(data):
                if not match[1]:
                    keep = max(keep, match.end())
                elif block and match.end() + 12 > len(data):  # the other half may follow
                    keep = match.start()
                    break
                else:
                    return True
            rest = data[max(keep, 0) :]
    return False


def _no_such(path: Path, keys: tuple[str, ...], pairs: bool) -> BadInput:
    where = f" under {'.'.join(keys)!r}" if keys else ""
    return BadInput(f"{path}: no {'object' if pairs else 'list'}{where}. Is it a file of another data set or form?")


def _unreadable(path: Path, error: Exception) -> BadInput:
    reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
    return BadInput(f"{path}: cannot be read ({reason}). Download it again, or mend it.")
