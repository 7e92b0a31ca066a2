"""docs/methods.md says what is so: each pair is attached, trained, saved and loaded again here."""

import pytest

from mmpeft_ds import backbones, registry
from tests.helpers.method_table import COLUMNS, PAGE, cells_of, read, table, written

QUICK = ("vision_text_decoder", "blip captioner", "mllm LLaVA")


def test_columns_of_the_table_are_what_really_attaches():
    page = read(PAGE.read_text("utf-8"))
    found = cells_of(QUICK)
    assert found == {at: text for at, text in page.items() if at[1] in QUICK}
    assert len(set(found.values())) > 2, "some are refused, for several reasons"


@pytest.mark.slow
def test_the_table_of_methods_and_backbones_is_what_really_attaches():
    # heads alone go on `features`; test_methods.py tries each of them there
    assert {column.split()[0] for column in COLUMNS} == set(registry.names(backbones)) - {"features"}
    page = PAGE.read_text("utf-8")
    assert written(page, table()) == page, "stale: run python -m tests.helpers.method_table"
