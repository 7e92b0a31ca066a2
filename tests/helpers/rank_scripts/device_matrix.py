"""Forward and backward of methods on backbones, on the stand-in for a GPU; for `launch.run_forked(..., ranks=0)`.

device_matrix OUT.json METHODS COLUMN...     methods joined by commas (none: all), columns of `method_table`
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds import methods
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput
from tests.helpers import method_table
from tests.helpers.device import reports, standin


def run(backbone: Any, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients of the trainables, as a step of the engine has them."""
    model.zero_grad()
    outputs = forward(model, backbone, batch, scores=True)
    if backbone.generates:
        loss = outputs.token_losses()[0].sum()
    else:
        names = ("logits", "text_features", "image_features")
        loss = sum(outputs[n].float().square().mean() for n in names if outputs.get(n) is not None)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def cell(name: str, column: method_table.Column) -> dict[str, Any] | None:
    """Reports of one method, and its largest relative distance from the CPU; None where it does not fit."""
    for options in method_table.OPTIONS:
        try:
            model = method_table._attach(name, column, options)
            break
        except (BadInput, TypeError):
            continue
    else:
        return None
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    column.backbone.inputs(column.batch)
    expected, wanted = run(column.backbone, model, column.batch)
    wanted = {n: g.clone() for n, g in wanted.items()}
    model.to("cuda")
    batch = column.batch.to("cuda")
    run(column.backbone, model, batch)  # what is kept from the first step on
    with reports.watching() as watch:
        loss, gradients = run(column.backbone, model, batch)
    assert loss.is_cuda and gradients.keys() == wanted.keys() and all(g.is_cuda for g in gradients.values())
    pairs = [(loss, expected), *((gradients[n], wanted[n]) for n in wanted)]
    gaps = [float((a.cpu() - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs]
    return {"gap": max(gaps), "reports": [asdict(r) for r in watch.reports]}


def main() -> None:
    out, chosen, *columns = sys.argv[1:]
    standin.start()
    result: dict[str, dict[str, Any]] = {}
    for column in columns:
        with tempfile.TemporaryDirectory() as folder:
            made = method_table.Column.make(column, Path(folder))
            names = chosen.split(",") if chosen else methods.names(heads=False)
            cells = {name: cell(name, made) for name in names}
        result[column] = {name: found for name, found in cells.items() if found is not None}
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
