"""One system of a benchmark in its own launch of two ranks with a thread each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.launch import free_port

ROOT = Path(__file__).resolve().parents[1]


def launch(script: str, arguments: list[str], out: Path, ranks: int = 2, timeout: int = 3000) -> Any:
    """What rank 0 of `script` writes as JSON to `out`, which it gets as `--out`. Ends the benchmark where it fails."""
    out.parent.mkdir(exist_ok=True, parents=True)
    out.unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    command += ["--master_port", str(free_port()), script, *arguments, "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if done.returncode or not out.exists():
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def close(result: dict[str, Any], out: str) -> None:
    """Write the result of rank 0, and leave the group together."""
    import torch

    if result.pop("rank") == 0:
        Path(out).write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
