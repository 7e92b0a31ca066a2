"""docs/methods.md says what is so: each pair is attached, trained, saved and loaded again here."""

from mmpeft_ds import backbones, registry
from tests.helpers.method_table import COLUMNS, PAGE, table, written


def test_the_table_of_methods_and_backbones_is_what_really_attaches():
    # heads alone go on `features`; test_methods.py tries each of them there
    assert {column.split()[0] for column in COLUMNS} == set(registry.names(backbones)) - {"features"}
    page = PAGE.read_text("utf-8")
    assert written(page, table()) == page, "stale: run python -m tests.helpers.method_table"
