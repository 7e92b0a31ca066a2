"""One record of a data set on its way into the index, and why a row becomes none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic_core import to_json

from mmpeft_ds.data.parsing import MAX_NESTING, QUESTION_KEYS, check_nesting, check_questions
from mmpeft_ds.errors import BadSample

WRONG_FORM = (LookupError, TypeError, ValueError, AttributeError)  # what reading a row of another form raises
FLAT = MAX_NESTING // 2  # lists and objects in a value that cannot be nested too deep


class Entry:
    """One record of a data set, before those of one picture are put together.

    Attributes:
        name: the source's own name of the sample that it belongs to.
        files: paths of its pictures, in order; those of the first record of a sample count.
        item: what this record adds to the sample (a question, a caption); None adds nothing.
        fields: further fields of the sample, of its first record.
        key: the record's own id, text; a second record with it is set aside. None: it has none.
    """

    __slots__ = ("name", "files", "item", "fields", "key", "place", "stored")

    def __init__(
        self,
        name: str,
        files: Sequence[str] = (),
        item: Any = None,
        fields: dict[str, Any] | None = None,
        key: str | None = None,
    ):
        self.name, self.files, self.item, self.fields, self.key = name, files, item, fields or {}, key
        self.place: tuple[str, int] | tuple[()] = ()  # of its row, as the list of those that were set aside names it
        self.stored: bytes | None = None

    def store(self) -> bytes | None:
        """`item` as it is kept, made once; None for none.

        Raises:
            TypeError, ValueError: for a name that is no text, half a character (a lone surrogate) anywhere, a number
                that is not finite, which JSON does not have, and whatever else no shard may hold.
        """
        if self.stored is None:
            (self.name + (self.key or "")).encode()
            if (item := self.item) is not None:
                self.stored = _storable_json(item)
                if isinstance(item, dict) and not QUESTION_KEYS.keys().isdisjoint(item):
                    try:
                        check_questions({"questions": [item]})
                    except BadSample as error:
                        raise ValueError(str(error)) from error
        return self.stored

    def store_first(self) -> tuple[bytes, bytes]:
        """`files` and `fields` as they are kept, which only those of the first record of a sample are. Raises as
        `store`."""
        "".join(self.files).encode()
        return to_json(list(self.files)), _storable_json(self.fields)


class Aside(Exception):
    """A record that becomes no sample.

    Args:
        reason: why, a few words that others of its kind share.
        name: which record.
    """

    def __init__(self, reason: str, name: str):
        super().__init__(f"{name}: {reason}")
        self.reason, self.name = reason, name


class Elsewhere(Exception):
    """A row that belongs to another split: neither read nor set aside."""


@contextlib.contextmanager
def finding_split(first: bool) -> Iterator[None]:
    """For a block that finds the split of a row in a file of several splits. Where the row has another form, the first
    of the splits tells of it, and the others take it for a row of elsewhere.

    Args:
        first: whether no other split of the file is read before.

    Raises:
        Elsewhere: in place of an error of WRONG_FORM, unless this is the first split.
    """
    try:
        yield
    except WRONG_FORM as error:
        if first:
            raise
        raise Elsewhere from error


def _storable_json(value: Any) -> bytes:
    """JSON of a value that a shard can hold. Raises TypeError or ValueError for any other."""
    stored = to_json(value)
    if b"NaN" in stored or b"Infinity" in stored:  # perhaps in a text
        json.dumps(value, allow_nan=False)
    if stored.count(b"[") + stored.count(b"{") > FLAT:
        try:
            check_nesting(b'{"questions":[%b]}' % stored)
        except BadSample as error:
            raise ValueError(str(error)) from error
    return stored
