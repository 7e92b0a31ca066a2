#!/usr/bin/env python
"""Eight LoRA runs of a study beside one run alone, on a task whose vision tower is most of the work, without a cache.

    python benchmarks/study.py                        writes docs/benchmarks/study.*
    python benchmarks/study.py --steps 4 --batch 2 --rounds 1 --out runs

ViT-L/16 with GPT-2 medium writes one caption per image; random weights, JPEGs of 640 x 480. Eight learning rates train
by launchers/study.py, one of them by launchers/train.py, in turn, each a command of its own on one rank and one thread
at ZeRO-1. Times are those of the processor, start and checkpoints included, which other programs disturb less than the
clock; and the clock's of the optimizer steps alone. The target: at most 2.5 times the time of one run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402
from benchmarks.frozen_cache import write_data, write_towers  # noqa: E402

TARGET, MEMBERS = 2.5, 8
RATES = ["1e-4", "2e-4", "3e-4", "5e-4", "7e-4", "1e-3", "2e-3", "3e-3"]


def write_recipe(args: argparse.Namespace, folder: Path) -> Path:
    """The recipe of all runs."""
    import yaml

    towers = {"vision": str(folder / "vision"), "text": str(folder / "captions"), "random_weights": True}
    recipe = {
        "run_dir": str(folder / "run"),
        "backbone": {"name": "vision_text_decoder", **towers},
        "method": {"name": "lora", "r": 8},
        "data": {
            "sources": [{"dir": str(folder / "data"), "task": {"name": "captioning"}}],
            "global_batch": args.batch,
            "workers": 0,
        },
        "optim": {"max_steps": args.steps, "warmup": 0.0, "schedule": "constant", "lr": float(RATES[0])},
        "engine": {"deepspeed": "ds_configs/zero1.json", "threads": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def measure(recipe: Path, run: Path, launcher: str, *more: str) -> dict:
    """Processor seconds and peak memory of one command, and the seconds of its optimizer steps by the clock."""
    command = [sys.executable, launcher, "--recipe", str(recipe), "--set", f"run_dir={run}", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    files = sorted(run.rglob("metrics.jsonl"))
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return {
        "runs": len(files),
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "seconds": time.perf_counter() - began,
        "step_seconds": sum(row["step_seconds"] for own in rows for row in own),
        "peak_mib": used.ru_maxrss / 1024,
        "losses": [[row["loss"] for row in own] for own in rows],
    }


def table(rounds: list[dict], args: argparse.Namespace) -> str:
    """The page."""
    lines = [
        "# Studies: eight LoRA runs over one frozen base",
        "",
        f"`python benchmarks/study.py --steps {args.steps} --batch {args.batch} --rounds {args.rounds}` on "
        f"{_page.machine()}, {time.strftime('%Y-%m-%d')}; other work ran beside it, load {rounds[0]['load']:.1f} "
        f"at the beginning and {rounds[-1]['load']:.1f} before the last round. ViT-L/16 + GPT-2 medium, one "
        "caption per image, one rank, one thread, float32, no cache. Medians of the rounds; both kinds in turn.",
        "",
        f"| | one run | study of {MEMBERS} | ratio (each round) | target |",
        "|---|---|---|---|---|",
    ]
    for title, key, target in (
        ("processor seconds of the command", "cpu_seconds", f"{TARGET}"),
        ("seconds of the optimizer steps, by the clock", "step_seconds", f"{TARGET}"),
        ("seconds of the command, by the clock", "seconds", ""),
        ("peak resident memory, MiB", "peak_mib", ""),
    ):
        one, many = ([r[kind][key] for r in rounds] for kind in ("one", "study"))
        each = [b / a for a, b in zip(one, many, strict=True)]
        ratio = f"**{statistics.median(each):.2f}** ({', '.join(f'{x:.2f}' for x in each)})"
        lines.append(
            f"| {title} | {statistics.median(one):,.1f} | {statistics.median(many):,.1f} | {ratio} | {target} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each run")
    parser.add_argument("--batch", type=int, default=8, help="pictures of a step")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--out", type=Path, default=_page.FOLDER)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="study-"))
    try:
        write_data(folder / "data", args.batch * args.steps)
        write_towers(folder)
        recipe, rounds = write_recipe(args, folder), []
        for _ in range(args.rounds):
            load = os.getloadavg()[0]
            one = measure(recipe, folder / "one", "launchers/train.py")
            study = measure(recipe, folder / "many", "launchers/study.py", "--vary", f"optim.lr={','.join(RATES)}")
            assert study["runs"] == MEMBERS and one["losses"][0] in study["losses"]
            rounds.append({"load": load, "one": one, "study": study})
            for name in ("one", "many"):
                shutil.rmtree(folder / name)
        _page.write("study", table(rounds, args), {"machine": _page.machine(), "rounds": rounds}, args.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
