"""The table of docs/methods.md: every method on every backbone, attached, trained for a step, saved and loaded.

`python -m tests.helpers.method_table` regenerates it.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from torch import Tensor, nn

from mmpeft_ds import backbones, methods, registry
from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.assembly.resolve import check_kinds
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites import find_sites
from tests.helpers import ROOT, plain_methods
from tests.helpers.models import tiny_backbones, tiny_blip, tiny_clip, tiny_mllm, tiny_towers

PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
# Tried in this order until one can be attached; a method is tried with those whose fields it has.
OPTIONS: list[dict[str, Any]] = [{}, {"tower": ["text"]}]


def _blip(form: str) -> Any:
    entry = registry.load(backbones, "blip", "backbone.name")
    return lambda folder: entry(entry.Options(tiny_blip.write(folder, form), form=form), None)


def _mllm(family: str) -> Any:
    entry = registry.load(backbones, "mllm", "backbone.name")
    return lambda folder: entry(entry.Options(tiny_mllm.write(folder, family), condition="pooled"), None)


def _clip(folder: Path) -> Any:
    entry = registry.load(backbones, "clip", "backbone.name")
    return entry(entry.Options(tiny_clip.write(folder, "clip"), condition="pooled"), None)


# column -> maker; a backbone that reads several kinds of checkpoint has a column for each
COLUMNS: dict[str, Any] = {
    **{name: make for name, make in tiny_backbones.MAKERS.items() if name not in ("clip", "blip", "mllm")},
    "clip": _clip,
    "blip captioner": _blip("captioner"),
    "blip vqa": _blip("vqa"),
    "blip retrieval": _blip("retrieval"),
    "mllm LLaVA": _mllm("llava"),
    "mllm Qwen2-VL": _mllm("qwen2_vl"),
}


@dataclasses.dataclass
class Column:
    """A backbone with its frozen model, a batch, and what the frozen model says of it."""

    backbone: Any
    model: nn.Module
    batch: Any
    said: Tensor

    @classmethod
    def make(cls, name: str, folder: Path) -> Column:
        backbone = COLUMNS[name](folder)
        backbone.check()
        # copied once: loaded weights may lie where a matrix product rounds otherwise than for copies
        model = copy.deepcopy(backbone.build().eval())
        transform = backbone.image_transform(train=False)
        generator = torch.Generator().manual_seed(1)
        image = torch.randint(0, 256, (3, 9, 11), dtype=torch.uint8, generator=generator)
        texts = ["is there a red circle", "what color is it"]
        if backbone.generates:
            texts = [Prompted(text, "a red circle") for text in texts]
        sample = Sample("one", 1.0, [transform(image, torch.Generator())], texts, [0, 0])
        labels = lambda targets: {"label": torch.tensor(targets)}  # noqa: E731
        batch = pack([sample], backbone.collate_images, backbone.collate_texts, labels)
        with torch.no_grad():
            return cls(backbone, model, batch, say(backbone, model, batch))


def say(backbone: Any, model: nn.Module, batch: Any) -> Tensor:
    """What the model says, of whatever kind: losses of generated text, logits, or features."""
    outputs = forward(model, backbone, batch)
    if backbone.generates:
        return torch.stack(list(outputs.token_losses()), 1)
    found = [outputs[key] for key in ("logits", "text_features", "image_features") if outputs.get(key) is not None]
    return torch.cat([tensor.flatten() for tensor in found])


def cell(name: str, column: Column) -> str:
    """`yes`, the options that it takes, or the line in which it is refused."""
    fields = {f.name for f in dataclasses.fields(methods.get(name).Config)}
    refused = ""
    for options in OPTIONS:
        if set(options) <= fields:
            try:
                _try(name, column, _attach(name, column, options))
            except BadInput as error:
                refused = refused or str(error)
                continue
            return ", ".join(f"`{key}: {_yaml(value)}`" for key, value in options.items()) or "yes"
    return refused


def _yaml(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def _attach(name: str, column: Column, options: dict[str, Any]) -> peft.PeftModel:
    method, model = methods.get(name), copy.deepcopy(column.model)
    config, sites = method.Config(**copy.deepcopy(options)), find_sites(model)
    check_kinds(column.backbone, method, config)
    method.check(config, sites, column.backbone.condition_width)
    torch.manual_seed(2)
    return peft.get_peft_model(model, method.prepare(config, model, sites))


def _try(name: str, column: Column, model: peft.PeftModel) -> None:
    """Attached it starts, trains, leaves the base alone, and comes back from its file. Raises AssertionError."""
    trainables = [p for p in model.parameters() if p.requires_grad]
    assert trainables, name
    optimizer = torch.optim.Adam(trainables, 0.05)
    for _ in range(2):  # where `up` starts at zero, the rest has its first gradient in the second step
        say(column.backbone, model, column.batch).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = say(column.backbone, model, column.batch)
        assert trained.isfinite().all() and not torch.equal(trained, column.said), f"{name} changes nothing"
        with model.disable_adapter():
            assert torch.equal(say(column.backbone, model, column.batch), column.said), f"{name} changed the base"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = peft.PeftModel.from_pretrained(copy.deepcopy(column.model), folder).eval()
        assert torch.equal(say(column.backbone, again, column.batch), trained), f"{name} is not what was saved"


def cells_of(columns: Iterable[str]) -> dict[tuple[str, str], str]:
    """(method, column) -> what `cell` says."""
    found: dict[tuple[str, str], str] = {}
    # inner widths that are multiples of the outer ones, as everywhere at real size
    plain = {"intermediate_size": 32}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(tiny_towers.COMMON, plain),
        mock.patch.dict(tiny_mllm.CLIP, plain),
    ):
        for column in columns:
            (place := Path(folder) / column.replace(" ", "_")).mkdir()
            made = Column.make(column, place)
            for name in plain_methods.names(heads=False):
                found[name, column] = cell(name, made)
    return found


def table() -> str:
    """Markdown of the table and its notes."""
    cells, notes = cells_of(COLUMNS), []
    for at, text in cells.items():
        if text != "yes" and not text.startswith("`"):
            if text not in notes:
                notes.append(text)
            cells[at] = f"no ({notes.index(text) + 1})"
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in plain_methods.names(heads=False):
        lines.append(f"| `{name}` | {' | '.join(cells[name, column] for column in COLUMNS)} |")
    lines += ["", *(f"{at}. {note}" for at, note in enumerate(notes, 1))]
    return "\n".join(lines).rstrip()


def read(page: str) -> dict[tuple[str, str], str]:
    """What `page` says, as `cells_of` gives it."""
    lines = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    notes = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    (_, *columns), _, *rows = (
        [part.strip() for part in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    )
    said = {
        (name.strip("`"), column): text for name, *cells in rows for column, text in zip(columns, cells, strict=True)
    }
    return {at: notes[text[4:-1]] if text.startswith("no (") else text for at, text in said.items()}


def written(page: str, made: str) -> str:
    """`page` with `made` between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8"), table()), "utf-8")
    print(f"wrote {PAGE}")
