"""Kernels on the CPU, and waits on the stand-in for a GPU, of methods on a backbone; for `launch.run_forked(ranks=0)`.

device_counts OUT.json COLUMN ROWS     a column of `matrix.COLUMNS`, rows joined by semicolons or none for all
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.helpers.device import counters_models, matrix, reports, standin


def main() -> None:
    out, name, chosen = sys.argv[1:]
    standin.start()
    result = {}
    with tempfile.TemporaryDirectory() as folder, matrix.column(name, Path(folder)) as made:
        for row, model in matrix.models(made, chosen.split(";") if chosen else ()):
            kernels = counters_models.kernels(made, model)
            batch = matrix.to_cuda(made, model, matrix.state_of(model))
            matrix.passes(made, model, batch)  # constants reach the device once
            with reports.watching() as watch:
                matrix.passes(made, model, batch)
            result[row] = {"kernels": kernels, "waits": len(watch.of("wait"))}
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
