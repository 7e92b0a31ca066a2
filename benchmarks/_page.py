"""The page of a benchmark in docs/benchmarks: the table that was measured, and below it what a person has to say."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
NOTES = "\n## Notes\n"


def machine() -> str:
    """Processor, cores and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"{os.cpu_count()} cores {name}, Python {platform.python_version()}, torch {metadata.version('torch')}"


def write(name: str, table: str, result: dict, folder: Path = FOLDER) -> None:
    """Print the table, and write NAME.md, whose notes stay as they are, and NAME.json."""
    print(table)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{name}.md"
    _, found, notes = page.read_text("utf-8").partition(NOTES) if page.exists() else ("", "", "")
    page.write_text(table.rstrip() + "\n" + found + notes, "utf-8")
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
