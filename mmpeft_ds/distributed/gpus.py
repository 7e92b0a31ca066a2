"""NVIDIA GPUs that are there while torch does not see them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

DRIVER = Path("/proc/driver/nvidia/version")


def driver() -> str:
    """Version of the NVIDIA driver, empty without one."""
    try:
        text = DRIVER.read_text()
    except OSError:
        return ""
    match = re.search(r"Kernel Module.*?\s(\d+[\d.]+)\s", text)
    return match[1] if match else ""


def unseen() -> str:
    """A line about a machine with an NVIDIA driver on which torch sees no GPU and nobody has hidden them; else empty.

    torch itself says nothing then, and the run goes on on the CPU.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1", "NoDevFiles")  # the last by Slurm
    if hidden or os.environ.get("DS_ACCELERATOR") == "cpu" or torch.cuda.is_available() or not (version := driver()):
        return ""
    why = (
        f"its torch {torch.__version__} is built for the CPU: make setup DEVICE=cuda"
        if torch.version.cuda is None
        else f"its torch is built for CUDA {torch.version.cuda}: see that the driver is new enough (docs/gpu.md), "
        "that the container was given the GPUs (--gpus all), and what nvidia-smi says"
    )
    return (
        f"this machine has the NVIDIA driver {version}, but torch sees no GPU, so this rank uses the CPU; {why}. If "
        "that is wanted: CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu."
    )
