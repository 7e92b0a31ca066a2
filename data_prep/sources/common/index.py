"""Index of a data set's records: which make a sample, in which order, and which are set aside.

It is a SQLite file, so that millions of records cost disk and not memory, and every process that makes shards reads
the same. Records with the same name (usually a picture's) make one sample; samples stand in the order in which their
first record came, the records of a sample in the order in which they came.
"""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic_core import from_json, to_json

from data_prep.sources.common.entry import WRONG_FORM, Aside, Elsewhere, Entry

SHOWN = 10  # names kept for a reason to set records aside
BLOCK = 1024  # rows handled at a time
ANOTHER_FORM = "record of another form"
GROUP = 64  # samples that a thread looks at before it takes others
SLOW = 0.001  # seconds that looking at a sample takes where the storage keeps the reader waiting
THREADS = 8
_SCHEMA = """
CREATE TABLE sample(
    id INTEGER PRIMARY KEY, split TEXT, name TEXT, files BLOB, fields BLOB, number INTEGER,
    UNIQUE(split, name)
);
CREATE TABLE item(sample INTEGER, value BLOB);
CREATE TABLE seen(split TEXT, key TEXT, block INTEGER, PRIMARY KEY(split, key)) WITHOUT ROWID;
CREATE TABLE looked_up(kind TEXT, key TEXT, value BLOB, times INTEGER, PRIMARY KEY(kind, key)) WITHOUT ROWID;
CREATE TABLE met(kind TEXT, key TEXT, PRIMARY KEY(kind, key)) WITHOUT ROWID;
CREATE TABLE kept(name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE aside(split TEXT, reason TEXT, name TEXT);
CREATE TABLE uncaptioned(split TEXT, name TEXT);
CREATE TABLE number(split TEXT, name TEXT, value INTEGER, PRIMARY KEY(split, name)) WITHOUT ROWID;
"""


class Index:
    """Reads, and before `finish` also writes, an index. Several processes may use it; each opens it for itself.

    Args:
        path: of the SQLite file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._connection: tuple[int, sqlite3.Connection] | None = None
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._last = 0  # id of the sample that came last
        self._block = 0  # number of the block of records that came last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    @property
    def complete(self) -> bool:
        """Whether `finish` was called, here or in another process."""
        return self.path.exists()

    def build(self, fill: Callable[[Index], None]) -> None:
        """Make the index with `fill` under a temporary name, unless it exists. An error leaves nothing behind."""
        if self.complete:
            return
        draft = Index(self.path.with_suffix(f".{os.getpid()}.tmp"))
        draft.path.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(draft.path, isolation_level=None)) as connection:
                draft._connection = os.getpid(), connection
                # It is made again if this process dies, so nothing needs to be safe on the way.
                connection.executescript(f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; BEGIN; {_SCHEMA}")
                fill(draft)
                draft._number()
                connection.execute("COMMIT")
            os.replace(draft.path, self.path)
        finally:
            draft.path.unlink(missing_ok=True)

    def add(self, split: str, entries: Iterable[Entry]) -> None:
        """Add the records of a split, many with each statement."""
        entries = iter(entries)
        while block := list(itertools.islice(entries, BLOCK)):
            self._add(split, self._first_of_each_key(split, block))

    def _first_of_each_key(self, split: str, block: list[Entry]) -> list[Entry]:
        """The entries of a block but those whose id was given before, which are set aside."""
        keys = dict.fromkeys(entry.key for entry in block if entry.key is not None)
        self._block += 1
        rows = ((split, key, self._block) for key in keys)
        fresh = self._connected().executemany("INSERT OR IGNORE INTO seen VALUES(?,?,?)", rows).rowcount if keys else 0
        if fresh == sum(entry.key is not None for entry in block):  # as nearly always
            return block
        query = "SELECT key FROM seen WHERE split=? AND block<? AND key IN (SELECT value FROM json_each(?))"
        seen = {key for (key,) in self._run(query, (split, self._block, json.dumps(list(keys))))}
        kept = []
        for entry in block:
            if entry.key is not None and entry.key in seen:
                self.set_aside(split, "id given before", entry.key)
                continue
            kept.append(entry)
            if entry.key is not None:
                seen.add(entry.key)
        return kept

    def _add(self, split: str, block: list[Entry]) -> None:
        """Put the records of a block to their samples, which are made where there are none yet."""
        names = json.dumps([*dict.fromkeys(entry.name for entry in block)])
        query = "SELECT name, id FROM sample WHERE split=? AND name IN (SELECT value FROM json_each(?))"
        numbers = dict(self._run(query, (split, names)).fetchall())
        samples, items, used = [], [], 0
        for entry in block:
            try:
                item = entry.store()
                if entry.name not in numbers:
                    first = entry.store_first()
                    self._last += 1
                    numbers[entry.name] = self._last
                    samples.append((self._last, split, entry.name, *first))
            except WRONG_FORM:
                self.set_aside(split, ANOTHER_FORM, " ".join(map(str, entry.place)) or entry.name)
                continue
            used += 1
            if item is not None:
                items.append((numbers[entry.name], item))
        self.count(split, "records", used)
        rows = "INSERT INTO sample(id, split, name, files, fields) VALUES(?,?,?,?,?)"
        self._connected().executemany(rows, samples)
        self._connected().executemany("INSERT INTO item VALUES(?,?)", items)

    def parsed(
        self, split: str, rows: Iterable[Any], parse: Callable[[Any], Entry | Iterable[Any]], of: str = "record"
    ) -> Iterator[Any]:
        """Entries of rows; a row that `parse` cannot use is set aside and the others continue.

        Args:
            of: what a row is called in the list of those that were set aside, before its number.
            parse: entry of a row, or pairs for `put`. It raises Aside where it knows why there is none; one
                of WRONG_FORM says that the row has another form.
        """
        for number, row in enumerate(rows):
            try:
                entries = parse(row)
                if isinstance(entries, Entry):
                    entries.store()
                    entries.place = of, number
                else:
                    entries = list(entries)
            except Elsewhere:
                continue
            except Aside as aside:
                self.set_aside(split, aside.reason, aside.name)
            except WRONG_FORM as error:
                missing = f"no {error} in the record" if isinstance(error, KeyError) else ANOTHER_FORM
                self.set_aside(split, missing, f"{of} {number}")
            else:
                if isinstance(entries, Entry):
                    yield entries
                else:
                    yield from entries

    def put(self, kind: str, pairs: Iterable[tuple[str, Any]]) -> None:
        """Keep values to be looked up by key, such as annotations by the id of their question; the last one counts."""
        rows = ((kind, _storable(key), _kept_form(value)) for key, value in pairs)
        again = "ON CONFLICT DO UPDATE SET value=excluded.value, times=times+1"
        self._connected().executemany(f"INSERT INTO looked_up VALUES(?,?,?,1) {again}", rows)

    def put_once(
        self, kind: str, split: str, rows: Iterable[Any], parse: Callable[[Any], Iterable[Any]], of: str, repeated: str
    ) -> None:
        """`put` the pairs that `parse` makes of rows. Rows of another form, and those whose key a row before had, are
        set aside, the latter under the reason `repeated`."""
        self.put(kind, self.parsed(split, rows, parse, of))
        query = "SELECT key, times FROM looked_up WHERE kind=? AND times>1 ORDER BY key"
        for key, times in self._run(query, (kind,)).fetchall():
            for _ in range(times - 1):
                self.set_aside(split, repeated, key)
        self._run("UPDATE looked_up SET times=1 WHERE kind=? AND times>1", (kind,))

    def get(self, kind: str, key: str) -> Any:
        """The value that `put` stored for a key, or None."""
        row = self._run("SELECT value FROM looked_up WHERE kind=? AND key=?", (kind, _storable(key))).fetchone()
        return None if row is None else _value(row[0])

    def tally(self, kind: str) -> dict[Any, int]:
        """Value, text or number -> of how many keys `put` kept it."""
        rows = self._run("SELECT value, count(*) FROM looked_up WHERE kind=? GROUP BY value", (kind,))
        return {_value(value): number for value, number in rows}

    def joined(self, kind: str, rows: Iterable[Any], key: str, mark: bool = False) -> Iterator[tuple[Any, Any]]:
        """(row, what `put` kept for its value under `key`, or None) of rows, many looked up with each statement.

        A row without that key, or of another form, has None beside it. What rows of the same value get is one object,
        to be read only.

        Args:
            mark: keys that are looked up are no longer among `unmet`.
        """
        rows = iter(rows)
        query = "SELECT key, value FROM looked_up WHERE kind=? AND key IN (SELECT value FROM json_each(?))"
        while block := list(itertools.islice(rows, BLOCK)):
            keys = [_storable(str(row[key])) if isinstance(row, dict) and key in row else None for row in block]
            found = self._run(query, (kind, json.dumps([*dict.fromkeys(keys)])))
            values = {number: _value(value) for number, value in found}  # many rows may look for the same one
            if mark:
                self._connected().executemany("INSERT OR IGNORE INTO met VALUES(?,?)", ((kind, k) for k in values))
            for row, number in zip(block, keys, strict=True):
                yield row, values.get(number)

    def first_of_each(self, kind: str, pairs: Iterable[tuple[str | None, Any]]) -> Iterator[Any]:
        """Values of the pairs whose key no pair before had, or is None."""
        pairs = iter(pairs)
        query = "SELECT key FROM met WHERE kind=? AND key IN (SELECT value FROM json_each(?))"
        while block := list(itertools.islice(pairs, BLOCK)):
            block = [(None if key is None else _storable(key), value) for key, value in block]
            keys = dict.fromkeys(key for key, _ in block if key is not None)
            before = {key for (key,) in self._run(query, (kind, json.dumps(list(keys))))}
            self._connected().executemany("INSERT OR IGNORE INTO met VALUES(?,?)", ((kind, key) for key in keys))
            for key, value in block:
                if key is None or key not in before:
                    yield value
                before.add(key)

    def unmet(self, kind: str) -> list[str]:
        """Keys that `put` kept and that no row had which `joined` marked."""
        query = "SELECT key FROM looked_up WHERE kind=? EXCEPT SELECT key FROM met WHERE kind=? ORDER BY key"
        return [key for (key,) in self._run(query, (kind, kind))]

    def values(self, kind: str) -> Iterator[Any]:
        """What `put` kept, in the order of the keys."""
        return (_value(v) for (v,) in self._run("SELECT value FROM looked_up WHERE kind=? ORDER BY key", (kind,)))

    def keep(self, name: str, value: Any) -> None:
        """Keep a value, such as the list of answers, for all processes."""
        self._run("INSERT INTO kept VALUES(?,?)", (name, _kept_form(value)))

    def kept(self, name: str) -> Any:
        """The value that `keep` stored, or None."""
        row = self._run("SELECT value FROM kept WHERE name=?", (name,)).fetchone()
        return None if row is None else _value(row[0])

    def set_aside(self, split: str, reason: str, name: str) -> None:
        """Note that a record becomes no sample."""
        self._run("INSERT INTO aside VALUES(?,?,?)", (split, _storable(reason), _storable(name)))
        self.count(split, "records")

    def without_text(self, split: str, name: str) -> None:
        """Note a picture or video that is listed without a caption or question, which is no record."""
        self._run("INSERT INTO uncaptioned VALUES(?,?)", (split, _storable(name)))

    def count(self, split: str, name: str, by: int = 1) -> None:
        """Add to a number of a split that the report shows."""
        self._numbers[split, name] += by

    def keep_first(self, split: str, samples: int) -> None:
        """Drop all samples of a split but the first ones, without counting them as set aside."""
        self._run(
            "DELETE FROM sample WHERE split=? AND id NOT IN (SELECT id FROM sample WHERE split=? ORDER BY id LIMIT ?)",
            (split, split, samples),
        )

    def check(self, split: str, problem: Callable[[list[str]], str]) -> None:
        """Set samples aside whose pictures are not there or cannot be read.

        Args:
            problem: of a sample's paths, why it cannot be used, or nothing; called in several threads where the
                storage is slow.
        """

        def of_group(group: list[tuple[int, str, bytes]]) -> list[str]:
            return [problem(_value(files)) for _, _, files in group]

        self._run("CREATE INDEX IF NOT EXISTS items_of ON item(sample)")
        last, slow = -1, False
        with ThreadPoolExecutor(THREADS) as pool:
            while block := self._run(
                "SELECT id, name, files FROM sample WHERE split=? AND id>? ORDER BY id LIMIT ?", (split, last, BLOCK)
            ).fetchall():
                last = block[-1][0]
                # A group is a task of a thread: a task a picture would cost several times what looking at one does.
                groups = [block[i : i + GROUP] for i in range(0, len(block), GROUP)]
                # Where files are in memory there is nothing to wait for, and threads cost more than they save.
                begin = time.perf_counter()
                reasons = [of_group(groups[0]), *(pool.map if slow else map)(of_group, groups[1:])]
                slow = (time.perf_counter() - begin) * (THREADS if slow else 1) > SLOW * len(block)
                for (row, name, _), why in zip(block, itertools.chain.from_iterable(reasons), strict=True):
                    if why:
                        self._drop(split, row, name, why)

    def _drop(self, split: str, row: int, name: str, why: str) -> None:
        """Set the records of a sample aside."""
        records = self._run("SELECT count(*) FROM item WHERE sample=?", (row,)).fetchone()[0]
        self._connected().executemany("INSERT INTO aside VALUES(?,?,?)", [(split, why, name)] * max(records, 1))
        self._run("DELETE FROM sample WHERE id=?", (row,))

    def samples(self, split: str, start: int = 0) -> Iterator[tuple[str, list[str], list[Any], dict[str, Any]]]:
        """(name, files, items, fields) of the samples from number `start` on."""
        for first in itertools.count(start, BLOCK):
            wanted = "split=? AND number BETWEEN ? AND ? ORDER BY number"
            query = f"SELECT id, name, files, fields FROM sample WHERE {wanted}"
            rows = self._run(query, (split, first, first + BLOCK - 1)).fetchall()
            if not rows:
                return
            items: dict[int, list[bytes]] = {row: [] for row, _, _, _ in rows}
            for row, value in self._run(
                "SELECT sample, value FROM item WHERE sample BETWEEN ? AND ? ORDER BY sample, rowid",
                (rows[0][0], rows[-1][0]),
            ):
                if row in items:  # samples that were dropped have theirs still
                    items[row].append(value)
            for row, name, files, fields in rows:
                yield name, *_value(b"[%b,[%b],%b]" % (files, b",".join(items[row]), fields))

    def size(self, split: str) -> int:
        """Number of samples of a split."""
        return self._run("SELECT count(*) FROM sample WHERE split=?", (split,)).fetchone()[0]

    def items(self, split: str) -> Iterator[Any]:
        """All items of a split's samples."""
        query = "SELECT value FROM item JOIN sample ON sample.id=item.sample WHERE split=? ORDER BY number, item.rowid"
        return (_value(value) for (value,) in self._run(query, (split,)))

    def account(self, split: str) -> dict[str, Any]:
        """Numbers of a split and what was set aside, as `Source.account` gives them."""
        numbers = dict(self._run("SELECT name, value FROM number WHERE split=?", (split,)).fetchall())
        rows = self._run("SELECT reason, count(*) FROM aside WHERE split=? GROUP BY reason ORDER BY reason", (split,))
        aside = {}
        for reason, number in rows.fetchall():
            names = self._run(
                "SELECT name FROM aside WHERE split=? AND reason=? GROUP BY name ORDER BY min(rowid) LIMIT ?",
                (split, reason, SHOWN),
            )
            aside[reason] = [number, [name for (name,) in names]]
        return numbers | {"aside": aside} | self._uncaptioned(split)

    def _uncaptioned(self, split: str) -> dict[str, Any]:
        number = self._run("SELECT count(*) FROM uncaptioned WHERE split=?", (split,)).fetchone()[0]
        if not number:
            return {}
        names = self._run("SELECT name FROM uncaptioned WHERE split=? ORDER BY rowid LIMIT ?", (split, SHOWN))
        return {"uncaptioned": [number, [name for (name,) in names]]}

    def _number(self) -> None:
        """Give the samples of each split their numbers, and make what is asked later fast."""
        self._run("CREATE INDEX IF NOT EXISTS items_of ON item(sample)")
        self._run(
            "UPDATE sample SET number = ranked.place FROM (SELECT id AS row, row_number() OVER (PARTITION BY split "
            "ORDER BY id) - 1 AS place FROM sample) AS ranked WHERE sample.id = ranked.row"
        )
        self._run("CREATE INDEX numbers_of ON sample(split, number)")
        self._run("DELETE FROM looked_up")
        self._run("DELETE FROM met")
        self._run("DELETE FROM seen")
        rows = [(split, name, value) for (split, name), value in self._numbers.items()]
        self._connected().executemany("INSERT INTO number VALUES(?,?,?)", rows)

    def _run(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._connected().execute(query, values)

    def _connected(self) -> sqlite3.Connection:
        """The connection of this process: one must not be used after a fork."""
        if self._connection is None or self._connection[0] != os.getpid():
            address = f"file:{self.path}?mode=ro"
            self._connection = os.getpid(), sqlite3.connect(address, uri=True, check_same_thread=False)
        return self._connection[1]


def _storable(text: str) -> str:
    """A text whose lone surrogates, which SQLite cannot store, are escaped as JSON does it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _kept_form(value: Any) -> bytes:
    """JSON of any value, also of texts with lone surrogates. By pydantic's core, six times as fast as json."""
    try:
        return to_json(value)
    except ValueError:
        return json.dumps(value).encode()


def _value(stored: bytes) -> Any:
    """A value that `_kept_form` or `Entry.store` stored."""
    try:
        return from_json(stored)
    except ValueError:
        return json.loads(stored)
