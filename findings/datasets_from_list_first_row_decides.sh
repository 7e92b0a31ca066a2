#!/usr/bin/env bash
# datasets: Dataset.from_list drops every key that the first row does not have.
#
# A good guess: columns are the union of the rows' keys, missing values are None, as in pandas; or rows that differ are refused.
# What happens: the first row decides. "answers" of the second row is gone, and what is left says None; nested dicts, in
#   contrast, are united.
# Source: datasets.arrow_dataset.Dataset.from_list.
# Who is hurt: rows of several annotation files in one list (answer, answers, caption): all of one kind lose their target.
. "$(dirname "$0")/_lib.sh"
pins datasets==5.2.0 pillow==13.0.0 numpy==2.4.6

observe <<'PY'
from datasets import Dataset

rows = [{"question": "what?", "answer": "a bus"}, {"question": "where?", "answers": ["street", "road"]}]
for order in (rows, rows[::-1]):
    data = Dataset.from_list(order)
    print(f"first row {list(order[0])}: columns {data.column_names}, second row {data[1]}")
    assert data.column_names == list(order[0]) and data[1][data.column_names[1]] is None
nested = Dataset.from_list([{"meta": {"a": 1}}, {"meta": {"b": 2}}])
print("nested dicts are united:", nested[1])
assert nested[1] == {"meta": {"a": None, "b": 2}}
PY
