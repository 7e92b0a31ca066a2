#!/usr/bin/env python
"""The main job on this machine: prepare easy-VQA, train the quickstart recipe under ZeRO-3, evaluate, print a table.

make demo runs it. A second start continues where the first stopped, or only prints again.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(ROOT)

from launchers._run import counted, launch, output, python, rows_of  # noqa: E402
from mmpeft_ds import console  # noqa: E402
from mmpeft_ds.files import write_json  # noqa: E402

RECIPE, DATA, RUN = "recipes/quickstart.yaml", "data/easy-vqa", Path("runs/quickstart")
ZERO1, ZERO1_STEPS, SKIP = Path("runs/quickstart-zero1"), 16, 4  # a median step time; first steps warm up caches


def main() -> int:
    """All phases in turn, each timed."""
    console.Parser(description=__doc__).parse_args()
    os.chdir(ROOT)
    seconds = {}
    phases = {
        "prepare": lambda: python("data_prep/prepare.py", "easy-vqa", "--out", DATA),
        "statistics": lambda: python("data_prep/feature_stats.py", DATA, "--recipe", RECIPE),
        "train": lambda: launch("launchers/train.py", "--recipe", RECIPE),
        # more images at a time than in training: scores do not depend on it
        "evaluate": lambda: launch("launchers/evaluate.py", "--run", str(RUN), "--set", "data.global_batch=64"),
        "zero1": measure_zero1,
    }
    for name, phase in phases.items():
        print(f"\n--- {name}", flush=True)
        began = time.perf_counter()
        if code := phase():
            print(f"{name} ended with exit code {code}; the same command continues from here", file=sys.stderr)
            return code
        seconds[name] = time.perf_counter() - began
    plan = json.loads(output("launchers/train.py", "--recipe", RECIPE, "--check", "--json", "-"))
    (report,) = json.loads((RUN / "evaluation-test.json").read_text())
    metrics = collect(plan, report, seconds)
    write_json(RUN / "metrics.json", metrics)
    show(report, metrics)
    return 0


def measure_zero1() -> int:
    """A few steps of the same recipe under ZeRO-1, to see what sharding the frozen base costs here."""
    if len(rows_of(ZERO1)) >= ZERO1_STEPS:
        return 0
    changes = ["engine.deepspeed=ds_configs/zero1.json", f"run_dir={ZERO1}", f"optim.max_steps={ZERO1_STEPS}"]
    changes += ["data.validation=[]", "monitor.tensorboard=false"]
    return launch("launchers/train.py", "--recipe", RECIPE, *(a for c in changes for a in ("--set", c)))


def collect(plan: dict, report: dict, seconds: dict) -> dict:
    """Everything the table shows, with the stable names."""
    rows, zero1 = rows_of(RUN), rows_of(ZERO1)
    scores, baselines = report["scores"], report["baselines"]
    return {
        "test_accuracy": scores["accuracy"],
        "test_accuracy_yes_no": scores["accuracy_yes_no"],
        "majority": baselines["majority"],
        "question_only": baselines["question_only"],
        "question_only_yes_no": baselines["question_only_yes_no"],
        "trainable_parameters": plan["trainable_parameters"],
        "total_parameters": plan["total_parameters"],
        "samples_per_second": sum(r["samples"] for r in rows) / sum(r["step_seconds"] for r in rows),
        "world_size": len(rows[-1]["rss_mib"]),
        "zero_stage": plan["zero_stage"],
        "train_seconds": rows[-1]["elapsed"],
        "step_seconds": statistics.median(r["step_seconds"] for r in rows[SKIP:]),
        "step_seconds_zero1": statistics.median(r["step_seconds"] for r in zero1[SKIP:]),
        "peak_rss_mib": [max(column) for column in zip(*(r["rss_mib"] for r in rows), strict=True)],
        "phase_seconds": {name: round(value, 1) for name, value in seconds.items()},
    }


def show(report: dict, m: dict) -> None:
    """The table, then one line a fact."""
    title = f"easy-VQA, official test split, {counted(report)}"
    console.score_table(report["scores"], report["baselines"], title)
    print(f"parameters       {m['trainable_parameters']:,} trained of {m['total_parameters']:,}")
    print(f"speed            {m['samples_per_second']:.0f} questions/s; ", end="")
    print(f"{m['step_seconds']:.2f} s a step at ZeRO-{m['zero_stage']}, {m['step_seconds_zero1']:.2f} s at ZeRO-1")
    print("phases           " + ", ".join(f"{name} {value:.0f} s" for name, value in m["phase_seconds"].items()))
    print("peak memory      " + ", ".join(f"rank {i} {mib:,} MiB" for i, mib in enumerate(m["peak_rss_mib"])))
    print(f"adapter          {RUN / 'adapter'}\nmetrics          {RUN / 'metrics.json'}")
    print("curves           .venv/bin/tensorboard --logdir runs")


if __name__ == "__main__":
    console.run(main)
