#!/usr/bin/env python
"""A save and a resume of ours beside DeepSpeed's own, HF Trainer's and torch DCP's: processor time and bytes.

    python benchmarks/checkpoint.py          1 and 2 ranks, ZeRO-1 and 3; writes docs/benchmarks/checkpoint.*
    python benchmarks/checkpoint.py --runs 1 --ranks 1 --stages 3 --out runs

All systems save and resume the same engine in turn: stock LoRA on a small random language model, AdamW, float32, after
a step of HF Trainer. CPU time is that of all ranks, in user and system mode, so it hardly depends on what else
runs. The targets: a fifth of a peer's time, and 16 bytes a trained element.
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _checkpoint_systems, _launch, _page  # noqa: E402

TARGET_RATIO, TARGET_BYTES = 5, 16
FIGURES = ("save_wait", "save_own", "save_cpu", "resume_cpu", "save_wall", "resume_wall", "bytes")


def table(result: dict) -> str:
    """Markdown: a table of every setting, ratios as the peer's time through ours."""
    lines = [
        "# Checkpoints: save and resume compared with DeepSpeed, HF Trainer and torch DCP",
        "",
        f"The same engine saved and resumed by each in turn, medians of {result['runs']} rounds. LoRA of rank "
        f"{result['r']} on a random Llama, float32, AdamW; ranks of one thread. CPU seconds of all ranks together.",
        f"Machine: {result['machine']}.",
        "`python benchmarks/checkpoint.py` repeats it.",
    ]
    for setting in result["settings"]:
        elements, systems = setting["elements"], setting["systems"]
        own, beside = systems["ours"], systems["ours, in the background"]
        lines += [
            "",
            f"## ZeRO-{setting['stage']}, {setting['ranks']} rank{'s' if setting['ranks'] > 1 else ''}",
            "",
            f"{elements:,} trained elements in {setting['tensors']} tensors, {setting['frozen']:,} frozen.",
            "",
            "| system | training waits, ms | ratio | computing, ms | ratio | saved after, ms | save, CPU s | ratio "
            "| resume, CPU s | ratio | resume, ms | bytes an element |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for title, of in systems.items():
            lines.append(
                f"| {title} | {of['save_wait'] * 1e3:.0f} | {of['save_wait'] / beside['save_wait']:.1f} "
                f"| {of['save_own'] * 1e3:.1f} | {of['save_own'] / beside['save_own']:.1f} "
                f"| {of['save_wall'] * 1e3:.0f} "
                f"| {of['save_cpu']:.3f} | {of['save_cpu'] / own['save_cpu']:.2f} "
                f"| {of['resume_cpu']:.3f} | {of['resume_cpu'] / own['resume_cpu']:.2f} "
                f"| {of['resume_wall'] * 1e3:.0f} | {of['bytes'] / elements:.2f} |"
            )
    lines += [
        "",
        "A ratio is that system's time through ours: of the waiting, and of what the training's own thread computes "
        "meanwhile (on the rank with most), through ours in the background; of CPU time through ours in the "
        "foreground. "
        f"Targets: {TARGET_RATIO}, and {TARGET_BYTES} bytes. `The bytes alone` is one "
        "write and one sync of as many bytes, and one read of them.",
    ]
    return "\n".join(lines) + "\n"


def launch(ranks: int, stage: int, args: argparse.Namespace) -> dict:
    """All systems in one launch; medians of the rounds beside the rounds."""
    arguments = ["--in-ranks", "--stage", str(stage), "--runs", str(args.runs), "--r", str(args.r)]
    run = _launch.launch(__file__, arguments, ROOT / "runs" / "benchmark-checkpoint.json", ranks)
    run["systems"] = {
        title: {key: statistics.median(entry[key] for entry in rounds) for key in FIGURES}
        for title, rounds in run["rounds"].items()
    }
    return {"ranks": ranks, "stage": stage, **run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="rounds in turn, after one that does not count")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3], help="ZeRO stages")
    parser.add_argument("--r", type=int, default=32, help="of LoRA; 32 trains a million elements")
    parser.add_argument("--out", default=str(_page.FOLDER), help="folder of the page and the JSON")
    parser.add_argument("--in-ranks", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, default=3, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_ranks:
        return _launch.close(_checkpoint_systems.measure(args), args.out)
    settings = [launch(ranks, stage, args) for stage in args.stages for ranks in args.ranks]
    result = {"machine": _page.machine(), "runs": args.runs, "r": args.r, "settings": settings}
    _page.write("checkpoint", table(result), result, Path(args.out))


if __name__ == "__main__":
    main()
