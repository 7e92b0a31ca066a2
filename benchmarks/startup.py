#!/usr/bin/env python
"""CPU seconds and peak memory of commands that have little to do: --help, a refused recipe, a missing file, --check.

    python benchmarks/startup.py                 3 runs of each command; writes docs/benchmarks/startup.*
    python benchmarks/startup.py --runs 1 --out runs

CPU time is that of the process and its children, in user and system mode, so it hardly depends on what else runs; the
first run of each command, which compiles Python files, does not count. The targets: --help 1 s and 80 MiB, a refusal
1.5 s, --check without weights 4 s.
"""

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402

QUICKSTART = ("--recipe", "recipes/quickstart.yaml")
STUDY = ("--recipe", "recipes/few_shot_emoji.yaml")
NOWHERE = "no/such/place"
# CPU seconds, and MiB where there is a target.
TARGETS = {"help": (1.0, 80), "refusal": (1.5, None), "check": (4.0, None)}


@dataclass(frozen=True)
class Command:
    """A command line and what is expected of it.

    Attributes:
        kind: `help`, `refusal` or `check`.
        args: script below the repository, and its arguments.
        code: exit code.
    """

    kind: str
    args: tuple[str, ...]
    code: int

    @property
    def title(self) -> str:
        script, *rest = self.args
        return " ".join((Path(script).name, *rest)).replace("recipes/", "")


def scripts() -> list[str]:
    """Every command of launchers/ and data_prep/."""
    paths = [path for folder in ("launchers", "data_prep") for path in (ROOT / folder).glob("[!_]*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in paths if '__name__ == "__main__"' in path.read_text())


def commands() -> list[Command]:
    """What is measured, and what a test holds against the list of heavy modules."""
    wrong = [
        ("launchers/train.py", "--recipe", f"{NOWHERE}.yaml"),
        ("launchers/train.py", *QUICKSTART, "--set", "optim.lrr=1"),
        ("launchers/train.py", *QUICKSTART, "--set", "backbone.image_sise=70"),
        ("launchers/train.py", *QUICKSTART, "--set", "method.rank=8"),
        ("launchers/train.py", *QUICKSTART, "--set", "method.route=mull"),
        ("launchers/train.py", *QUICKSTART, "--set", "data.sources.0.task.los=ce"),
        (
            "launchers/train.py",
            *QUICKSTART,
            "--check",
            "--samples",
            "9",
            "--set",
            "data.sources.0.task={name: retrieval}",
        ),
        ("launchers/train.py", *QUICKSTART, "--set", f"data.sources.0.dir={NOWHERE}"),
        ("launchers/train.py", *QUICKSTART, "--set", "engine.deepspeed=zero9.json", "--check"),
        ("launchers/train.py", *QUICKSTART, "--check", "--samples", "1000", "--set", "run_dir=/dev/null/run"),
        ("launchers/plan.py", *QUICKSTART, "--nodes", "0", "--gpus-per-node", "8"),
        ("launchers/plan.py", "--recipe", f"{NOWHERE}.yaml", "--nodes", "1", "--gpus-per-node", "8"),
        ("launchers/few_shot.py", *STUDY, "--set", "methods.0.method.alphaa=1"),
        ("launchers/few_shot.py", *STUDY, "--methods", "nobody"),
        ("launchers/evaluate.py", "--run", NOWHERE),
        ("launchers/fisher.py", "--run", NOWHERE, "--out", "f.safetensors"),
        ("launchers/graph_report.py", "--run", NOWHERE),
        ("launchers/merge.py", "--adapter", NOWHERE, "--out", "merged"),
        ("launchers/preflight.py", "--recipe", f"{NOWHERE}.yaml"),
        ("launchers/supervise.py", "--recipe", f"{NOWHERE}.yaml"),
        ("launchers/predict.py", "--adapter", NOWHERE, "--images", "docs/images"),
        ("launchers/search.py", "--adapter", NOWHERE, "--images", "docs/images", "--text", "a", "--out", "found"),
        ("launchers/features.py", "--data", NOWHERE, "--out", "made", "--backbone", "clip"),
        ("launchers/features.py", "--data", NOWHERE, "--out", "made", "--backbone", "clap"),
        ("launchers/describe.py", "--data", NOWHERE, "--out", "made", "--backbone", "blip"),
        ("data_prep/prepare.py", "easy-vqb", "--out", "made"),
        ("data_prep/prepare.py", "jsonl", "--out", "made", "--train", f"{NOWHERE}.jsonl"),
        ("data_prep/verify.py", NOWHERE),
        ("data_prep/show.py", NOWHERE),
        ("data_prep/few_shot.py", NOWHERE),
        ("data_prep/feature_stats.py", NOWHERE, *QUICKSTART),
    ]
    free = ("--set", "run_dir=runs/nobody-trains-here")  # a run that is there would be compared with
    check = (*QUICKSTART, "--check", "--samples", "1000", "--set", "backbone.feature_norm=none", *free)
    return [
        *(Command("help", (script, "--help"), 0) for script in scripts()),
        *(Command("refusal", args, 2) for args in wrong),
        Command("check", ("launchers/train.py", *check), 0),
    ]


def measure(command: Command) -> tuple[float, float]:
    """CPU seconds and peak MiB of one run."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *command.args], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != command.code:
        raise SystemExit(f"{command.title}: exit code {process.returncode}, expected {command.code}\n{said}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def table(rows: list[dict]) -> str:
    """Markdown: the largest of each kind beside its target, then every command."""
    lines = ["# Start of commands", "", f"{_page.machine()}. CPU seconds (user and system) and peak MiB, medians.", ""]
    lines += ["`python benchmarks/startup.py` repeats it.", ""]
    lines += ["| | commands | slowest | most memory | target |", "|---|---|---|---|---|"]
    for kind, (seconds, mib) in TARGETS.items():
        of_kind = [row for row in rows if row["kind"] == kind]
        worst, largest = max(row["seconds"] for row in of_kind), max(row["mib"] for row in of_kind)
        wanted = f"{seconds} s" + (f", {mib} MiB" if mib else "")
        lines.append(f"| {kind} | {len(of_kind)} | {worst:.2f} s | {largest:.0f} MiB | {wanted} |")
    lines += ["", "| command | CPU s | MiB |", "|---|---|---|"]
    lines += [f"| `{row['command']}` | {row['seconds']:.2f} | {row['mib']:.0f} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of each command, after one that does not count")
    parser.add_argument("--out", type=Path, default=_page.FOLDER, help="folder of the page and the JSON")
    args = parser.parse_args()
    rows = []
    for command in commands():
        measure(command)
        runs = [measure(command) for _ in range(args.runs)]
        seconds, mib = (statistics.median(values) for values in zip(*runs, strict=True))
        rows.append({"kind": command.kind, "command": command.title, "seconds": seconds, "mib": mib})
        print(f"{seconds:6.2f} s {mib:5.0f} MiB  {command.title}", file=sys.stderr, flush=True)
    _page.write("startup", table(rows), {"machine": _page.machine(), "targets": TARGETS, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
