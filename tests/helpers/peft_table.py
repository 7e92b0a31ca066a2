"""The table of docs/peft_types.md: every type of peft on every backbone, attached, trained, saved and loaded.

`python -m tests.helpers.peft_table` regenerates it, in some minutes.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mmpeft_ds import methods
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.peft.kinds import KINDS
from mmpeft_ds.recipe.components import Section
from mmpeft_ds.recipe.parse import Origin
from mmpeft_ds.sites import find_sites
from tests.helpers import ROOT, peft_alone
from tests.helpers.method_table import COLUMNS, Column, say, written
from tests.helpers.models import tiny_mllm, tiny_towers
from tests.helpers.models.tiny_stock import fill

PAGE = ROOT / "docs" / "peft_types.md"
OFFERED = [name for name, kind in KINDS.items() if not kind.refused]
# Where the defaults of peft are too large for widths of 16 and 32, or a field is required.
SMALL: dict[str, dict[str, Any]] = {
    "adamss": {"r": 8},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 10},
    "gralora": {"r": 4, "alpha": 4},
    "hira": {"r": 4},
    "lily": {"r": 4, "num_B": 2},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4},
    "peanut": {"r": 4},
    "psoft": {"r": 4},
    "pvera": {"r": 4},
    "randlora": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "trainable_tokens": {"token_indices": [1, 2, 3, 4, 5, 6, 7, 8]},
    "unilora": {"theta_d_length": 32},
    "vblora": {"vector_length": 8, "num_vectors": 8},
    "vera": {"r": 4},
    "waveft": {"n_frequency": 10},
}


def section(name: str, **more: Any) -> Section:
    """The `method` section of a recipe for a type."""
    given = {"name": "peft", "type": name, "options": dict(SMALL.get(name, {})), **more}
    return Section.read(methods, given, "method", Origin())


def attach(name: str, column: Column) -> tuple[peft.PeftModel, Any]:
    """The type in a copy of the column's model, and its method. Raises BadInput."""
    chosen, model = section(name), copy.deepcopy(column.model)
    chosen.options.check_training("float32", 0)
    method, config = resolve.make_method(chosen)
    sites = find_sites(model)
    method.check(config, sites, column.backbone.condition_width)
    torch.manual_seed(2)
    return method.attach(method.prepare(config, model, sites), model), method


def try_on(name: str, column: Column) -> None:
    """Attached it starts, trains, leaves the base alone, and comes back from its file by peft alone.

    Raises:
        BadInput: it is refused.
        AssertionError: one of these does not hold.
    """
    model, method = attach(name, column)
    trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainables:
        raise BadInput("it leaves nothing to train.")
    before = {n: p.detach().clone() for n, p in trainables.items()}
    optimizer = torch.optim.Adam(trainables.values(), 0.05)
    for _ in range(2):  # where one factor starts at zero, the rest has its first gradient in the second step
        say(column.backbone, model, column.batch).float().square().mean().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in trainables.values()), "gradient"
        optimizer.step()
        optimizer.zero_grad()
    moved = [n for n, p in trainables.items() if not torch.equal(p, before[n])]
    assert moved, f"{name} trains nothing"
    model.eval()
    with torch.no_grad():
        trained = say(column.backbone, model, column.batch)
        assert trained.isfinite().all() and not torch.equal(trained, column.said), f"{name} changes nothing"
        with model.disable_adapter():
            assert torch.equal(say(column.backbone, model, column.batch), column.said), f"{name} changed the base"
        saved = method.saved_tensors(model, {n: p.detach() for n, p in trainables.items()})
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, state_dict=saved, save_embedding_layers=False)
            torch.manual_seed(3)
            again = peft.PeftModel.from_pretrained(copy.deepcopy(column.model), folder).eval()
        assert torch.equal(say(column.backbone, again, column.batch), trained), f"{name} is not what was saved"


def alone(names: list[str], folder: Path) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Types with values of their own over a stock LLaVA, opened by peft in a process that never imports this package.

    Returns:
        name -> logits of stock model and adapter there, those here, and those of the frozen model.
    """
    with small_towers():
        model = LlavaForConditionalGeneration.from_pretrained(tiny_mllm.write(folder / "llava", "llava")).eval()
    inputs = {"input_ids": torch.tensor([[5, 3, 6, 7, 5, 4], [9, 4, 5, 3, 2, 8]])}
    peft_alone.write_base(folder, "llava", model, inputs)
    column = SimpleNamespace(model=model, backbone=SimpleNamespace(condition_width=None))
    here = {}
    for name in names:
        wrapped, method = attach(name, column)
        trained = {n: p for n, p in fill(wrapped, scale=0.1).eval().named_parameters() if p.requires_grad}
        saved = method.saved_tensors(wrapped, {n: p.detach() for n, p in trained.items()})
        wrapped.save_pretrained(folder / f"lora-llava-{name}", state_dict=saved, save_embedding_layers=False)
        here[name] = peft_alone.said(wrapped, inputs)
    there, frozen = peft_alone.ask(folder), peft_alone.said(model, inputs)
    return {name: (there[f"llava-{name}"], expected, frozen) for name, expected in here.items()}


def assert_equal(found: Tensor, expected: Tensor, frozen: Tensor, name: str) -> None:
    """Raise AssertionError unless logits are equal to rounding and others than those of the frozen model."""
    scale = expected.abs().max()
    assert (expected - frozen).abs().max() > 1e-3 * scale, f"{name} changes nothing"
    assert (found - expected).abs().max() <= 1e-6 * max(1.0, scale), name


def table() -> str:
    """Markdown: a row for each type, a column for each backbone, one for the ZeRO stages, one for peft alone."""
    notes: list[str] = []
    cells: dict[tuple[str, str], str] = {}
    for name, kind in KINDS.items():
        cells[name, "ZeRO"] = "" if kind.refused else "0-2" if kind.stage3 else "0-3"
    with tempfile.TemporaryDirectory() as folder, small_towers():
        for number, column in enumerate(COLUMNS):
            (place := Path(folder) / str(number)).mkdir()
            made = Column.make(column, place)
            for name, kind in KINDS.items():
                text = f"{kind.refused[0].upper()}{kind.refused[1:]}." if kind.refused else cell(name, made)
                if text != "yes":
                    if text not in notes:
                        notes.append(text)
                    text = f"({notes.index(text) + 1})"
                cells[name, column] = text
    installed = [name for name in OFFERED if any(cells[name, column] == "yes" for column in COLUMNS)]
    cells |= {(name, "peft alone"): "" for name in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for name, logits in alone(installed, Path(folder)).items():
            assert_equal(*logits, name)
            cells[name, "peft alone"] = "yes"
    for name in KINDS:
        if not any(cells[name, column] == "yes" for column in COLUMNS):
            cells[name, "ZeRO"] = ""  # nowhere tried
    heads = ["ZeRO", "peft alone", *COLUMNS]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| `{name}` | {' | '.join(cells[name, head] for head in heads)} |" for name in KINDS]
    return "\n".join([*lines, "", *(f"{at}. {note}" for at, note in enumerate(notes, 1))])


def cell(name: str, column: Column) -> str:
    """`yes`, or the line in which the type is refused."""
    try:
        try_on(name, column)
    except BadInput as error:
        return str(error).removeprefix("recipe: ").replace(f"type: {name} ", "").replace("`", "")
    return "yes"


@contextlib.contextmanager
def small_towers() -> Iterator[None]:
    """Inner widths that are multiples of the outer ones, as everywhere at real size."""
    plain = {"intermediate_size": 32}
    with mock.patch.dict(tiny_towers.COMMON, plain), mock.patch.dict(tiny_mllm.CLIP, plain):
        yield


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8"), table()), "utf-8")
    print(f"wrote {PAGE}")
