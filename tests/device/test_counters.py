"""Counts of kernels, reads and waits: the counter itself, and the tables of docs/device_counts.md."""

import pytest
import torch

from tests.helpers.device import counters_models, counters_steps, counters_table, matrix
from tests.helpers.device.counters import counted
from tests.helpers.device.counters_table import differences

QUICK_COLUMN, QUICK_METHODS = "vision_text_encoder", ("lora", "p_adapter")
MATRIX, MASK = torch.ones(3, 4), torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("program", "kernels", "reads"),
    [
        (lambda: MATRIX + 1, 1, 0),
        (lambda: MATRIX.view(4, 3).t()[1:].unsqueeze(0).expand(3, 2, 4), 0, 0),
        (lambda: torch.empty(7), 0, 0),
        (lambda: MATRIX @ MATRIX.t(), 1, 0),
        (lambda: MATRIX.clone().mul_(2), 2, 0),
        (lambda: MATRIX.sum().item(), 1, 1),
        (lambda: bool(MATRIX[0, 0] > 2), 1, 1),
        (lambda: MATRIX[0].tolist(), 0, 1),
        (lambda: MATRIX[MASK], 0, 1),
        (lambda: MATRIX[torch.tensor([0, 2])], 1, 0),
        (lambda: MASK.nonzero(), 0, 1),
        (lambda: MATRIX.repeat_interleave(torch.tensor([1, 0, 2]), 0, output_size=3), 2, 0),
        (lambda: MATRIX.repeat_interleave(torch.tensor([1, 0, 2]), 0), 1, 1),
    ],
)
def test_operations_that_are_no_views_and_values_that_are_read_are_counted(program, kernels, reads):
    with counted() as counts:
        program()
    assert (counts.kernels, counts.reads, counts.calls) == (kernels, reads, 0), counts.names


def test_the_backward_pass_is_counted_too():
    weight = torch.ones(4, 4, requires_grad=True)
    with counted() as forward:
        loss = (MATRIX @ weight).sum()
    with counted() as both:
        loss.backward()
    assert forward.kernels == 2 and both.kernels >= 2


def test_a_number_that_grew_by_more_than_a_tenth_or_shrank_a_lot_is_told_with_the_command_that_writes_it_anew():
    page = {"lora": {"clip": (100, 3), "blip": (100, 0)}}
    assert differences({"lora": {"clip": (110, 3), "blip": (80, 0)}}, page) == []
    for numbers, word in (((111, 3), "grew"), ((100, 4), "grew"), ((74, 3), "shrank"), ((100, 2), "shrank")):
        (line,) = differences({"lora": {"clip": numbers}}, page)
        assert f"lora, clip: {word} from (100, 3)" in line and "tests.helpers.device.counters_table" in line
    (line,) = differences({"lora": {"mllm": (1, 0)}}, page)
    assert "not on the page" in line


def test_a_table_is_read_back_as_it_was_written(monkeypatch, tmp_path):
    table = {"lora": {"clip": (100, 3)}, "aurora": {"clip": (5, 0), "blip": (7, 1)}}
    text = counters_table.markdown(table, ["clip", "blip"])
    monkeypatch.setattr(counters_table, "PAGE", tmp_path / "page.md")
    counters_table.PAGE.write_text(f"<!-- table 0: begin -->\n{text}\n<!-- table 0: end -->\n")
    assert counters_table.written(0) == table


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with matrix.column(QUICK_COLUMN, tmp_path_factory.mktemp("column")) as column:
        yield column


def kernels_of(made) -> dict:
    """Rows of the page without its waits, which take a process of their own."""
    rows = matrix.models(made, QUICK_METHODS)
    return {row: {QUICK_COLUMN: (counters_models.kernels(made, model),)} for row, model in rows}


def page_of(rows) -> dict:
    page = counters_table.written(0)
    return {row: {QUICK_COLUMN: page[row][QUICK_COLUMN][:1]} for row in rows}


def test_some_rows_of_the_page_are_what_is_counted(made):
    found = kernels_of(made)
    assert len(found) == 3 and differences(found, page_of(found)) == []


def test_an_operation_more_in_every_layer_of_a_method_would_be_told(made, monkeypatch):
    """Negative control: a method that does a little work more in each of its layers."""
    plain = torch.nn.functional.linear

    def with_more(*args):
        return plain(*args) + 0 + 0

    monkeypatch.setattr(torch.nn.functional, "linear", with_more)
    found = kernels_of(made)
    lines = differences(found, page_of(found))
    assert any(line.startswith("lora, vision_text_encoder: grew") for line in lines)


def same_cells(table) -> dict:
    return {row: set(cells) for row, cells in table.items()}


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="the stand-in for a GPU needs a torch without CUDA")
@pytest.mark.parametrize("number", [0, 1])
def test_all_rows_of_models_and_heads_are_what_is_counted(tmp_path, number):
    columns = (counters_table.MODELS, counters_table.HEADS)[number]
    found, page = counters_table.of_models(columns, tmp_path), counters_table.written(number)
    assert differences(found, page) == [] and same_cells(found) == same_cells(page)


@pytest.mark.slow
@pytest.mark.distributed
def test_all_rows_of_steps_are_what_is_counted(tmp_path):
    cases = [*counters_steps.quickstart(tmp_path), *counters_steps.TINY]
    found, page = counters_table.of_steps(counters_steps.run(cases, tmp_path)), counters_table.written(2)
    assert differences(found, page) == [] and same_cells(found) == same_cells(page)
