"""Forward and backward of methods and heads, on the stand-in for a GPU; for `launch.run_forked(..., ranks=0)`.

device_matrix OUT.json ROWS COLUMN...     rows joined by semicolons (none: all), columns of `matrix.COLUMNS`
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from mmpeft_ds.methods.p_adapter import attention_graph
from tests.helpers.device import matrix, reports, standin


def cell(made: matrix.Column, model: nn.Module) -> dict[str, Any]:
    """Reports of one row, and its largest relative distance from the CPU."""
    state = matrix.state_of(model)
    # On a CPU p-Adapter takes small maps another way, equal in float64 (tests/ops/test_p_laplacian_map.py). In float32
    # a unit of its ReLU that is nearly 0 may be on in one way and off in the other.
    with mock.patch.object(attention_graph, "fits", lambda *_: False):
        loss, gradients = matrix.passes(made, model, made.batch)
    expected = {"loss": loss, **{name: gradient.clone() for name, gradient in gradients.items()}}
    batch = matrix.to_cuda(made, model, state)
    matrix.passes(made, model, batch)  # what is kept from the first step on
    if any(not torch.equal(now.cpu(), state[name]) for name, now in matrix.state_of(model).items() if name in state):
        matrix.to_cuda(made, model, state)
    with reports.watching() as watch:
        loss, gradients = matrix.passes(made, model, batch)
    found = {"loss": loss, **gradients}
    assert found.keys() == expected.keys() and all(tensor.is_cuda for tensor in found.values())
    pairs = [(found[name].cpu(), tensor) for name, tensor in expected.items()]
    gaps = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs]
    return {"gap": max(gaps), "reports": [asdict(r) for r in watch.reports]}


def main() -> None:
    out, chosen, *columns = sys.argv[1:]
    standin.start()
    result: dict[str, dict[str, Any]] = {}
    for column in columns:
        with tempfile.TemporaryDirectory() as folder, matrix.column(column, Path(folder)) as made:
            rows = matrix.models(made, chosen.split(";") if chosen else ())
            result[column] = {name: cell(made, model) for name, model in rows if name != matrix.FROZEN}
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
