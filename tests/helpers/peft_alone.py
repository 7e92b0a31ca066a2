"""Adapters opened by stock peft in a process that never imports this package.

A folder holds `base-NAME/` with a stock checkpoint and `inputs.safetensors`, and adapters `lora-NAME-*`; what the
model says with each adapter comes back.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_ALONE = textwrap.dedent("""
    import pathlib, sys, torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    import transformers

    folder = pathlib.Path(sys.argv[1])
    for base in sorted(folder.glob("base-*")):
        kind = base.name.removeprefix("base-")
        inputs = load_file(base / "inputs.safetensors")
        for adapter in sorted(folder.glob(f"lora-{kind}-*")):
            torch.manual_seed(0)
            cls = getattr(transformers, transformers.AutoConfig.from_pretrained(base).architectures[0])
            model = PeftModel.from_pretrained(cls.from_pretrained(base).eval(), adapter).eval()
            with torch.no_grad():
                out = model(**inputs)
            out = out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
            save_file({"out": out.contiguous()}, adapter / "said.safetensors")
    assert "mmpeft_ds" not in sys.modules
""")


def write_base(folder: Path, name: str, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Add a stock model, and the inputs with which its adapters are asked."""
    model.save_pretrained(folder / f"base-{name}")
    save_file(inputs, folder / f"base-{name}" / "inputs.safetensors")


def ask(folder: Path) -> dict[str, Tensor]:
    """Name of each adapter, without `lora-` -> logits, or hidden states, of stock model and adapter."""
    run(_ALONE, folder)
    adapters = folder.glob("lora-*")
    return {p.name.removeprefix("lora-"): load_file(p / "said.safetensors")["out"] for p in adapters}


def run(program: str, folder: Path) -> None:
    """Run a program with a folder as its argument, in a process that finds no source of this repository."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(folder)],
        capture_output=True, text=True, timeout=600, env=environment, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@torch.no_grad()
def said(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The same of a model in this process."""
    out = model(**inputs)
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
