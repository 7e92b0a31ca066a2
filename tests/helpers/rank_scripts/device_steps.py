"""Steps of the engine on the stand-in for a GPU; for `launch.run_forked(..., ranks=N)`, 0 or 1 rank alone.

device_steps CASES.json OUT     cases as of rank_scripts/pairs.py; rank 0 writes OUT/NAME.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine.assembly.build import build
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.engine.train_state import TrainState
from tests.helpers.device import accelerator, reports
from tests.helpers.runs import tiny_pairs

FIRST = 2  # steps in which constants are made and DeepSpeed records the order of modules


def run(case: dict[str, Any], sections: dict[str, Any], folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Losses and gradient norms of the steps, and what the last one waits for and copies."""
    parts = tiny_pairs.resolved(case, sections, folder)
    backbone, task = parts.backbone, parts.train[0].task
    built = build(parts, ranks)
    stepper = Stepper(parts, built, ranks, tiny_pairs.STEPS, TrainState(), BadBudget(1.0, 1000))
    rows, watched = [], []
    for step in range(FIRST + 1):
        slots = tiny_pairs.slots_of(step, backbone)
        mine = slots[ranks.rank * len(slots) // ranks.world_size : (ranks.rank + 1) * len(slots) // ranks.world_size]
        batch = tiny_pairs.packed(mine, backbone, task)
        with reports.watching() as watch:
            rows.append(stepper.train_step(Step(0, step, [batch]), 0.0))
        watched = watch.reports
    devices = sorted({p.device.type for p in built.model.parameters()})
    built.engine.destroy()
    return {
        "losses": [row["loss"] for row in rows],
        "norms": [row["grad_norm"] for row in rows],
        "devices": devices,
        "reports": [asdict(report) for report in watched],
    }


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = accelerator.start()
    sections = tiny_pairs.write_backbones(out / f"models-{ranks.rank}", {case["backbone"] for case in cases})
    for case in cases:
        result = run(case, sections, out, ranks)
        if ranks.rank == 0:
            (out / f"{case['name']}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
