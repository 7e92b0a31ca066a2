#!/usr/bin/env python
"""The streaming p-Laplacian beside its dense formula: seconds and peak memory of one forward and backward pass.

    python benchmarks/p_laplacian.py                 N = 256 ... 4096, 3 runs; writes docs/benchmarks/p_laplacian.*
    python benchmarks/p_laplacian.py --tokens 256 512 --runs 1 --out runs
    python benchmarks/p_laplacian.py --device cuda --threads 8

Square graph of one sample, 12 heads of width 64, 8 channels per node, gradients of q, k, the nodes, p and mu. The
dense form holds the (B, H, N, N, b) differences, as the published code does, and lets autograd differentiate them.
Every measurement has its own process, the forms in turn. Memory is the peak of that process above the one it had with
its inputs, after a warm-up on 64 tokens; on a GPU that of torch's allocator.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402

HEADS, WIDTH, CHANNELS = 12, 64, 8
FORMS = {"dense": "dense", "two sweeps": "two sweeps, exact eps", "one sweep": "one sweep, eps 0"}
STREAMING = [form for form in FORMS if form != "dense"]
MIB = 2**20


# ------------------------------------------------------------------------------------------------ one measurement


def measure(form: str, tokens: int, device: str) -> dict:
    """Seconds, peak MiB and p's gradient of one forward and backward pass, in this process."""
    import torch

    _pass(form, _inputs(64, device))
    inputs = _inputs(tokens, device)
    before = _memory(device, reset=True)
    began = time.perf_counter()
    dp = _pass(form, inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mib": (_memory(device) - before) / MIB, "dp": dp}


def _inputs(tokens: int, device: str) -> tuple:
    import torch

    generator = torch.Generator().manual_seed(0)
    q, k, nodes = (
        torch.randn(1, HEADS, tokens, width, generator=generator).to(device).requires_grad_()
        for width in (WIDTH, WIDTH, CHANNELS)
    )
    return q, k, nodes, torch.tensor(1.5, device=device, requires_grad=True), torch.tensor(0.2, device=device)


def _pass(form: str, inputs: tuple) -> float:
    from mmpeft_ds.ops.p_laplacian import attention_probabilities, p_laplacian
    from mmpeft_ds.ops.p_laplacian_stream import p_laplacian_attention

    q, k, nodes, p, mu = inputs
    mu = mu.clone().requires_grad_()
    if form == "dense":
        U = p_laplacian(attention_probabilities(q, k), nodes, nodes, p, mu, self_term=True, square=True)
    else:
        U = p_laplacian_attention(q, k, nodes, nodes, p, mu, graph="square", exact=form == "two sweeps")
    U.square().sum().backward()
    return p.grad.item()


def _memory(device: str, reset: bool = False) -> int:
    """Peak bytes until now; `reset` returns what is in use and resets the peak."""
    if device == "cuda":
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if reset and status.exists():
        Path("/proc/self/clear_refs").write_text("5")
    if status.exists():
        return (
            next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -------------------------------------------------------------------------------------------------- the driver


def once(args: argparse.Namespace, form: str, tokens: int) -> dict:
    """One measurement in its own process."""
    command = [sys.executable, __file__, "--one", form, "--tokens", str(tokens), "--device", args.device]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        sys.exit(f"{form}, {tokens} tokens failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def drive(args: argparse.Namespace) -> None:
    """Everything in turn; print and write the table."""
    rows = []
    for tokens in sorted(args.tokens):
        row: dict = {"tokens": tokens, "runs": {form: [] for form in FORMS}}
        reason = _too_large(args, rows, tokens)
        if reason:
            print(f"N {tokens}, dense: left out, {reason}", flush=True)
            row["dense_left_out"] = reason
        for turn in range(args.runs):
            for form in STREAMING if reason else FORMS:
                run = once(args, form, tokens)
                row["runs"][form].append(run)
                print(
                    f"N {tokens}, {FORMS[form]}, run {turn + 1}: {run['seconds']:.3f} s, {run['mib']:.0f} MiB, "
                    f"dp {run['dp']:.5g}",
                    flush=True,
                )
        for form, runs in row["runs"].items():
            if runs:
                row[form] = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "mib")}
        rows.append(row)
    result = {"machine": _machine(args), "device": args.device, "rows": rows}
    _page.write("p_laplacian", _table(result), result, args.out)


def _too_large(args: argparse.Namespace, rows: list[dict], tokens: int) -> str:
    """Why the dense form is not tried, or nothing: the last measured peak grows with the square of the tokens."""
    if not rows:
        return ""
    if "dense" not in rows[-1]:
        return "a smaller one was"
    need = rows[-1]["dense"]["mib"] * (tokens / rows[-1]["tokens"]) ** 2
    free = _free_mib(args.device)
    return f"it needs about {need / 1024:.0f} GiB and {free / 1024:.0f} GiB are free" if need > 0.9 * free else ""


def _free_mib(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] / MIB
    import psutil

    return psutil.virtual_memory().available / MIB


def _table(result: dict) -> str:
    rows = result["rows"]
    lines = [
        "# p-Laplacian message passing: streaming and dense",
        "",
        f"Forward and backward on a square graph, B 1, {HEADS} heads of width {WIDTH}, {CHANNELS} channels per node,",
        f"float32, p 1.5. Median of {len(rows[0]['runs']['one sweep'])} runs, each in a process of its own, the forms",
        "in turn. Memory is the peak above the inputs.",
        f"Machine: {result['machine']}. `python benchmarks/p_laplacian.py` repeats it.",
        "",
        "| N | dense s | two sweeps s | one sweep s | dense MiB | two sweeps MiB | one sweep MiB "
        "| dense / two sweeps: time | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense, two, one = (row.get(form) for form in FORMS)
        cells = [f"{dense['seconds']:.2f}" if dense else "-", f"{two['seconds']:.2f}", f"{one['seconds']:.2f}"]
        cells += [f"{dense['mib']:.0f}" if dense else "-", f"{two['mib']:.0f}", f"{one['mib']:.0f}"]
        cells += [f"{dense[key] / two[key]:.1f}" if dense else "-" for key in ("seconds", "mib")]
        lines.append(f"| {row['tokens']} | " + " | ".join(cells) + " |")
    left_out = [
        f"N {row['tokens']}: dense left out, {row['dense_left_out']}." for row in rows if "dense_left_out" in row
    ]
    return "\n".join([*lines, *([""] if left_out else []), *left_out]) + "\n"


def _machine(args: argparse.Namespace) -> str:
    import torch

    gpu = f"{torch.cuda.get_device_name()}, " if args.device == "cuda" else ""
    return f"{gpu}{_page.machine()}, {args.threads} used"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="N to measure")
    parser.add_argument("--runs", type=int, default=3, help="processes for each N and form")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a measurement")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the page and the JSON"
    )
    parser.add_argument("--one", choices=list(FORMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is None:
        return drive(args)
    print(json.dumps(measure(args.one, args.tokens[0], args.device)))
    return None


if __name__ == "__main__":
    main()
