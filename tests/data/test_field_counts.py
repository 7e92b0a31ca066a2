"""Statistics of fields: the same however values are put together, in one shard or several."""

import json

import pytest

from mmpeft_ds.data.field_counts import FieldCounts
from mmpeft_ds.data.writer import RawSample

RECORDS = [
    {"captions": ["a", "bcd"], "ids": [-7, -3], "score": -0.5, "box": [0.1, 0.2, 3]},
    {"captions": [], "ids": [-9], "score": -2, "box": [0.7, "x", None, True]},
    {"captions": ["é"], "turns": [{"from": "x", "ids": [1, 2]}, {"from": "yz", "ids": [2]}], "box": [1, 2, 3]},
]


def of(*records):
    counts = FieldCounts()
    for record in records:
        counts.add(RawSample("s", record=record))
    return counts


def test_numbers_of_fields_and_of_what_lists_hold():
    fields = of(*RECORDS).summary()
    assert fields["captions"] == {"type": "list", "present": 3, "min": 0, "mean": 1.0, "max": 2}
    assert fields["captions[]"] == {"type": "str", "present": 3, "min": 1, "mean": 1.6667, "max": 3}
    assert fields["ids[]"] == {"type": "int", "present": 3, "min": -9, "mean": -6.3333, "max": -3}
    assert fields["score"] == {"type": "float|int", "present": 2, "min": -2, "mean": -1.25, "max": -0.5}
    assert fields["box[]"]["type"] == "NoneType|bool|float|int|str" and fields["box[]"]["present"] == 10
    assert fields["turns[].ids[]"]["mean"] == 1.6667 and fields["images"]["max"] == 0


@pytest.mark.parametrize("cut", [1, 2])
def test_shards_add_up_to_the_whole(cut):
    together = FieldCounts()
    for part in (RECORDS[:cut], RECORDS[cut:]):
        together.merge(json.loads(json.dumps(of(*part).counts)))
    assert together.summary() == of(*RECORDS).summary()
