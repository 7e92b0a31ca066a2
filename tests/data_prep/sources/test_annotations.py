"""Annotation files are read alike whether they are parsed at once or, being large, as a stream."""

import math

import pytest

from data_prep.sources.common import annotations
from mmpeft_ds.errors import BadInput


@pytest.fixture(params=["at once", "as a stream"])
def size(request, monkeypatch):
    if request.param == "as a stream":
        monkeypatch.setattr(annotations, "WHOLE", 0)


def read(tmp_path, content, *keys, of=annotations.items):
    (tmp_path / "file.json").write_bytes(content)
    return list(of(tmp_path / "file.json", *keys))


@pytest.mark.parametrize(
    ("content", "keys", "wanted"),
    [
        (b'\xef\xbb\xbf[1, 1.5, null, "\\u00e9"]\r\n', (), [1, 1.5, None, "é"]),
        (b"[null]", (), [None]),
        (b'{"info": {"a": [1]}, "a": [2], "b": [3]}', ("a",), [2]),
        (b'{"a": []}', ("a",), []),
        (b"[]", (), []),
        (b'["\\ud83d\\ude00", "\\ud800x", "x\\udc00"]', (), ["\U0001f600", "\ud800x", "x\udc00"]),
        (b'{"a": [1, {"id": 18446744073709551616}, 3]}', ("a",), [1, {"id": 2**64}, 3]),
        (b"[0, -Infinity, 2]", (), [0, -math.inf, 2]),
    ],
)
def test_lists(size, tmp_path, content, keys, wanted):
    assert read(tmp_path, content, *keys) == wanted


def test_objects(size, tmp_path):
    assert read(tmp_path, b'{"a": 99999999999999999999, "b": 1}', of=annotations.pairs) == [
        ("a", 10**20 - 1),
        ("b", 1),
    ]
    assert read(tmp_path, b'{"02": {"a": 1}, "2": null}', of=annotations.pairs) == [("02", {"a": 1}), ("2", None)]
    assert read(tmp_path, b"{}", of=annotations.pairs) == []


def test_a_key_that_stands_twice_in_an_object_is_given_twice(size, tmp_path):
    content = b'{"02": {"a": 1, "a": 2}, "3": 4, "02": 5}'
    assert read(tmp_path, content, of=annotations.pairs) == [("02", {"a": 2}), ("3", 4), ("02", 5)]


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        (b'[{"a": 1}, {"a"', ()),
        (b"[1, Nap]", ()),
        (b'{"a": [1]}', ()),
        (b'{"a": [1]}', ("b",)),
        (b'["\xff"]', ()),
        (b"", ()),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(size, tmp_path, content, keys):
    with pytest.raises(BadInput) as error:
        read(tmp_path, content, *keys)
    assert str(error.value).startswith(f"{tmp_path / 'file.json'}: ") and "\n" not in str(error.value)


def test_a_broken_line_is_named_by_its_number_in_the_file(tmp_path):
    (tmp_path / "file.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n \n{"a": 2}\n{"a"')
    rows = annotations.json_lines(tmp_path / "file.jsonl")
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(BadInput, match="line 5 is no JSON"):
        next(rows)
