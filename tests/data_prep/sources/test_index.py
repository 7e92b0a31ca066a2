"""The index of records keeps what rows hold, letter for letter, and sets aside what shards could not store."""

import json
import math

import pytest

from data_prep.sources.common.entry import Entry
from data_prep.sources.common.index import BLOCK, Index


@pytest.fixture
def built(tmp_path):
    def build(rows, parse):
        index = Index(tmp_path / "index.sqlite")
        index.build(lambda draft: draft.add("train", draft.parsed("train", rows, parse)))
        return index

    return build


def test_values_come_back_with_their_types(built):
    item = {"a": 2**70, "b": [1.0, 1e16, 5e-324, True, None], "c": "é\x7f\x00\u2028 NaN", "d": {"": ["Infinity"]}}
    index = built([item], lambda row: Entry("x", ["a/x.jpg"], row, {"row": row}))
    ((name, files, items, fields),) = index.samples("train")
    assert (name, files, repr(items), repr(fields)) == ("x", ["a/x.jpg"], repr([item]), repr({"row": item}))


@pytest.mark.parametrize(
    "entry",
    [
        {"item": {"score": math.nan}},
        {"item": 1, "fields": {"score": -math.inf}},
        {"item": "\udc00"},
        {"files": ["x\ud800.jpg"]},
        {"files": [3]},
        {"key": "\ud800"},
        {"item": {"question": "?", "question_id": 1.5}},
        {"item": {"question": "?", "type": ["other"]}},
        {"item": {"question": json.loads("[" * 70 + "]" * 70)}},
        {"fields": {"answerable": json.loads("[" * 70 + "]" * 70)}},
    ],
)
def test_what_no_shard_could_store_is_set_aside_and_the_others_go_on(built, entry):
    rows = [{"item": 0, "files": []}, entry, {"item": 2, "files": []}]
    index = built(rows, lambda row: Entry(f"n{rows.index(row)}", **row))
    assert [name for name, *_ in index.samples("train")] == ["n0", "n2"]
    assert index.account("train") == {"records": 3, "aside": {"record of another form": [1, ["record 1"]]}}


def test_an_entry_of_no_row_is_set_aside_under_its_name_and_fields_count_for_the_first_record_alone(tmp_path):
    index = Index(tmp_path / "index.sqlite")
    good, odd = {"label": 1}, {"label": math.nan}
    entries = [Entry("x\udcff.jpg", ["x\udcff.jpg"]), Entry("a", ["a.jpg"], 1, odd), Entry("a", ["a.jpg"], 2, good)]
    entries += [Entry("a", ["a.jpg"], 3, odd)]
    index.build(lambda draft: draft.add("train", entries))
    assert list(index.samples("train")) == [("a", ["a.jpg"], [2, 3], good)]
    assert index.account("train") == {"records": 4, "aside": {"record of another form": [2, ["x\\udcff.jpg", "a"]]}}


def test_the_first_record_of_an_id_counts_within_a_block_and_across_blocks(built):
    ids = [0, 1, 1, *range(2, BLOCK + 5), 3, BLOCK + 2, None, None, 1]
    rows = [*enumerate(ids)]
    index = built(rows, lambda row: Entry(f"n{row[0]}", [], row[0], key=None if row[1] is None else str(row[1])))
    seen, kept, aside = set(), [], []
    for number, key in rows:
        (aside if key in seen else kept).append(number if key not in seen else str(key))
        seen |= {key} - {None}
    assert [items for _, _, items, _ in index.samples("train")] == [[number] for number in kept]
    assert index.account("train")["aside"]["id given before"] == [4, ["1", "3", str(BLOCK + 2)]] and len(aside) == 4


@pytest.mark.parametrize("wait", [0, 0.002])
def test_pictures_are_looked_at_in_order_by_one_thread_or_several(built, monkeypatch, wait):
    import threading
    import time

    threads = set()

    def problem(names):
        threads.add(threading.get_ident())
        time.sleep(wait)
        return "odd" if int(names[0]) % 100 == 1 else ""

    from data_prep.sources.common import index as module

    monkeypatch.setattr(module, "BLOCK", 128)
    index = Index(built([], None).path.with_name("other.sqlite"))

    def fill(draft):
        draft.add("train", (Entry(str(n), [str(n)], n) for n in range(300)))
        draft.check("train", problem)

    index.build(fill)
    assert index.account("train")["aside"] == {"odd": [3, ["1", "101", "201"]]}
    assert [name for name, *_ in index.samples("train")] == [str(n) for n in range(300) if n % 100 != 1]
    assert (len(threads) > 1) == (wait > 0)
