"""Driver of `trainer.py --instruction`: every system in its own launch, in turn, and the page of the results."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _instruction, _page, _talks
from benchmarks._launch import launch

STEPS = {1: 4, 9: 16}  # of a timed epoch on two ranks, by how much lengths are divided
SYSTEMS = {"ours": ["--system", "ours"], "peer": ["--system", "peer"], "grouped": ["--system", "peer", "--group"]}
PARTS = ("forward", "backward", "optimizer", "pixels", "host", "fetch", "deepspeed")


def drive(args: argparse.Namespace, script: str) -> None:
    """Run everything in turn, print and write the table."""
    load = os.getloadavg()[0]
    result: dict[str, Any] = {"machine": _page.machine(), "load_before": load, "repeats": args.runs, "rows": []}
    result["host"] = []
    with tempfile.TemporaryDirectory() as temporary:
        for family in args.families:
            for shorter in args.shorter:
                setting = _talks.Setting(family, shorter)
                steps = args.steps or STEPS[shorter]
                folder = Path(temporary) / f"{family}-{shorter}"
                lengths = _talks.write(folder, setting, 2 * _instruction.PER_RANK * steps)
                (folder / "lengths.json").write_text(json.dumps(lengths))
                runner = _Runner(script, folder, steps, args.pack)
                for stage in args.stages:
                    result["rows"].append({**vars(setting), "stage": stage, **runner.compare(stage, args.runs)})
                    if shorter == max(args.shorter):
                        result["host"].append({**vars(setting), "stage": stage, **runner.host(stage)})
    result["load_after"] = os.getloadavg()[0]
    _page.write("instruction", table(result, args), result, Path(args.out) if args.out else _page.FOLDER)


class _Runner:
    """Launches of one setting."""

    def __init__(self, script: str, folder: Path, steps: int, pack: int):
        self.script, self.folder = script, folder
        self.common = ["--instruction", "--folder", str(folder), "--steps", str(steps), "--pack", str(pack)]

    def run(self, stage: int, arguments: list[str], ranks: int = 2) -> Any:
        out = self.folder / "result.json"
        return launch(self.script, [*self.common, "--stage", str(stage), *arguments], out, ranks, 1200)

    def compare(self, stage: int, repeats: int) -> dict[str, Any]:
        """Losses on the same samples, then all systems in turn."""
        same = self.run(stage, [*SYSTEMS["ours"], "--same"])
        order = self.folder / "order.json"
        order.write_text(json.dumps(same["order"]))
        other = self.run(stage, [*SYSTEMS["peer"], "--same", "--order", str(order)])
        apart = max(abs(a - b) / b for a, b in zip(same["losses"], other["losses"], strict=True))
        name = f"{self.folder.name} ZeRO-{stage}"
        print(f"{name}: losses differ by {apart:.1e} of themselves: {same['losses']} {other['losses']}", flush=True)
        runs: dict[str, list[Any]] = {system: [] for system in SYSTEMS}
        for turn in range(repeats):
            for system, arguments in SYSTEMS.items():
                runs[system].append(run := self.run(stage, arguments))
                print(
                    f"{name} {system} run {turn + 1}: {run['tokens_per_second']:.0f} tokens/s, step "
                    f"{run['step_seconds']:.3f} s, padding {run['padding']:.0%}, {run['tokens']:.0f} tokens of "
                    f"{run['samples']} samples, load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
        return {"losses_apart": apart, **{system: _medians(of_system) for system, of_system in runs.items()}}

    def host(self, stage: int) -> dict[str, Any]:
        """Medians of the parts of a step on one rank."""
        steps = self.run(stage, ["--system", "host"], ranks=1)["steps"]
        found = {part: statistics.median(step[part] for step in steps) for part in steps[0]}
        print(f"{self.folder.name} ZeRO-{stage}, one rank:", {k: f"{1e3 * v:.2f} ms" for k, v in found.items()})
        return found


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]} | {
        "all": [run["tokens_per_second"] for run in runs]
    }


def table(result: dict[str, Any], args: argparse.Namespace) -> str:
    """The page."""
    lines = [
        "# Instruction tuning: our engine and HF Trainer + peft + accelerate + deepspeed",
        "",
        f"Tiny LLaVA and Qwen2-VL (language model of width {_talks.TEXT['hidden_size']}, "
        f"{_talks.TEXT['num_hidden_layers']} layers, {_talks.VOCABULARY} words), LoRA r {_instruction.RANK} in all "
        f"its linears, float32, {_instruction.PER_RANK} samples per step and rank, 2 ranks x 1 thread, ours with "
        f"`data.pack: {args.pack}`. Lengths are drawn as in [packing](packing.md), or divided by 9. Tokens are those "
        f"that carry loss; medians of {result['repeats']} runs of one epoch in turn, the same samples for all. "
        f"{result['machine']}; load {result['load_before']:.1f} before and {result['load_after']:.1f} after. "
        "`python benchmarks/trainer.py --instruction` repeats it.",
        "",
        "| model | lengths | ZeRO | ours, tokens/s | Trainer | grouped by length | ratio | to grouped | the same two "
        "by processor time | step s | padding | losses differ by |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        three = [row[system] for system in SYSTEMS]
        rates = [system["tokens_per_second"] for system in three]
        cells = [row["family"], "drawn" if row["shorter"] == 1 else f"1/{row['shorter']}", row["stage"]]
        cells += [f"{rate:.0f}" for rate in rates] + [f"{rates[0] / rate:.2f}" for rate in rates[1:]]
        by_cpu = [system["tokens_per_cpu_second"] for system in three]
        cells.append(" / ".join(f"{by_cpu[0] / rate:.2f}" for rate in by_cpu[1:]))
        cells.append(" / ".join(f"{system['step_seconds']:.2f}" for system in three))
        cells.append(" / ".join(f"{system['padding']:.0%}" for system in three))
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['losses_apart']:.1e}"])) + " |")
    lines += [
        "",
        "Three numbers in a cell: ours, Trainer, Trainer grouped by length. Processor time is that of the ranks "
        "and their loader processes; other programs disturb it less. Losses: the largest relative difference in "
        f"{_instruction.CHECKED} steps on the same samples in the same order.",
        "",
        "Milliseconds of processor time of a step on one rank, medians (`benchmarks/_host_time.py` says how they are "
        "measured); host is everything but the first four. Of it, fetch is where DeepSpeed brings and releases "
        "parameters around modules, and deepspeed what its engine and optimizer do besides:",
        "",
        "| model | ZeRO | " + " | ".join(PARTS) + " | step |",
        "|---|---|" + "---|" * (len(PARTS) + 1),
    ]
    for row in result["host"]:
        cells = [row["family"], row["stage"], *(f"{1e3 * row[part]:.1f}" for part in (*PARTS, "step"))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
