"""Result file of one row, in the form of the method comparison of Hugging Face peft: `run_info`, `train_info` and
`meta_info` with the keys that its table reads.

On a CPU the memory is the resident set of the process, under the keys that peft has for an accelerator's.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.adapter_files import CONFIG, WEIGHTS
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.files import sha256
from mmpeft_ds.redaction import named
from mmpeft_ds.runs.comparison.rows import Fitted

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch", "deepspeed", "mmpeft_ds")
MIB = 1 << 20
LAST = 10  # steps of which the training loss is the mean


def now() -> str:
    """Date and time as peft writes them."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def make(
    row: Fitted,
    recipe: recipes.Recipe,
    run: Path,
    *,
    created_at: str,
    total_time: float,
    test: dict[str, Any] | None,
    second: dict[str, Any] | None,
    budget: dict[str, Any],
) -> dict[str, Any]:
    """The result of a finished run.

    Args:
        recipe: of the run.
        run: its directory.
        total_time: seconds of this row, with starts and evaluations.
        test: what launchers/evaluate.py reported of a split; None: the best validation score takes its place.
        second: of `forgetting.measure`; None if it was not measured.
        budget: `parameters` and `tolerance`.
    """
    metrics = json.loads((run / "finished.json").read_text("utf-8"))["metrics"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    memory = [max(step.get("device_mib") or step["rss_mib"]) * MIB for step in steps]
    last = {
        "step": metrics["steps"],
        "test accuracy": test["scores"][metrics["best_metric"]] if test else metrics["best"],
        "split": test["split"] if test else "val",
        "metric": metrics["best_metric"],
        "scored": _scored(test) if test else metrics.get("best_counted"),
        "train loss": statistics.mean(step["loss"] for step in steps[-LAST:]),
        "train samples": sum(step["samples"] for step in steps),
        "train total tokens": 0,  # not counted; peft's reader asks for a whole number
        "step time": statistics.median(step["step_seconds"] for step in steps),
    }
    if second is not None:
        last |= {"forgetting": second["forgetting"], "second task": second}
    return {
        "run_info": {
            **run_info(row, recipe, created_at, total_time),
            "peft_branch": "main",
            "peft_config": json.loads((run / "adapter" / CONFIG).read_text("utf-8")),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(statistics.mean(memory)),
            "accelerator_memory_max": int(max(memory)),
            "accelerator_memory_reserved_99th": int(sorted(memory)[math.ceil(0.99 * len(memory)) - 1]),
            "train_time": metrics["train_seconds"],
            "file_size": (run / "adapter" / WEIGHTS).stat().st_size,
            "num_trainable_params": metrics["trainable_parameters"],
            "num_total_params": metrics["total_parameters"],
            "num_method_params": row.trained,
            "budget": {**budget, "width": row.width, "within": row.within},
            "status": "success",
            "metrics": [*evaluations(run, steps), last],
        },
        "meta_info": meta_info(recipe, run, None if second is None else second["data"]),
    }


def _scored(test: dict[str, Any]) -> str:
    """Number of scored items of a split as text, such as `72 of 72 questions`."""
    return f"{test['scored']:,} of {test['there']:,} {test['unit']}"


def failed(row: Fitted, recipe: recipes.Recipe, *, created_at: str, total_time: float, error: str) -> dict[str, Any]:
    """The result of a row whose training ended with an error."""
    return {
        "run_info": {**run_info(row, recipe, created_at, total_time), "peft_config": None, "error_msg": error},
        "train_info": {"status": "failed", "metrics": []},
        "meta_info": {},
    }


def run_info(row: Fitted, recipe: recipes.Recipe, created_at: str, total_time: float) -> dict[str, Any]:
    """Entries about a run, however it ended."""
    return {
        "created_at": created_at,
        "total_time": total_time,
        "experiment_name": f"{row.method['name']}/{row.name}-seed{recipe.seed}",
        "row": row.name,
        "train_config": train_config(recipe),
    }


def train_config(recipe: recipes.Recipe) -> dict[str, Any]:
    """Training settings of the row: peft's keys, and the whole recipe."""
    whole = named(recipes.to_dict(recipe))
    optim = whole["optim"]
    models = [str(value) for key, value in whole["backbone"].items() if key in ("model", "vision", "text")]
    return {
        "model_id": " + ".join(models) or whole["backbone"]["name"],
        "dtype": whole["engine"]["dtype"],
        "batch_size": whole["data"]["global_batch"],
        "max_steps": optim["max_steps"],
        "eval_steps": whole["engine"]["eval_every"],
        "seed": whole["seed"],
        "grad_norm_clip": optim["clip"],
        "optimizer_type": optim["name"],
        "optimizer_kwargs": {"lr": optim["lr"], "weight_decay": optim["weight_decay"]},
        "lr_scheduler": optim["schedule"],
        "recipe": whole,
    }


def evaluations(run: Path, steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry an evaluation of training, from the run's TensorBoard events: validation scores, loss, time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    scores: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith("eval/"):
            for event in events.Scalars(tag):
                scores.setdefault(event.step, {}).setdefault(f"valid {tag.rsplit('/', 1)[1]}", event.value)
    entries, before = [], 0
    for step, found in sorted(scores.items()):
        part = [row for row in steps if before < row["step"] <= step]
        before = step
        entries.append(
            {
                "step": step,
                **found,
                "train loss": statistics.mean(row["loss"] for row in part),
                "train samples": sum(row["samples"] for row in part),
                "train time": sum(row["step_seconds"] for row in part),
                "elapsed time": part[-1]["elapsed"],
            }
        )
    return entries


def meta_info(recipe: recipes.Recipe, run: Path, second: str | None) -> dict[str, Any]:
    """Versions, machine without its name, and what base and data were."""
    fingerprint = (run / "adapter" / "base_fingerprint.json").read_bytes()
    data = {}
    for source in recipe.data.sources:
        manifest = Manifest.load(source.dir)
        data[manifest.name] = {"sha": sha256(Path(source.dir) / "manifest.json"), "created_at": None}
    if second:
        data[second] = {"sha": None, "created_at": None}
    cuda = torch.cuda.is_available()
    return {
        "model_info": {"sha": hashlib.sha256(fingerprint).hexdigest(), "created_at": None},
        "dataset_info": data,
        "package_info": {
            f"{name.replace('_', '-')}-{what}": value
            for name in PACKAGES
            for what, value in (("version", _version(name)), ("commit-hash", None))
        },
        "system_info": {
            "system": platform.system(),
            "release": platform.release(),
            "version": platform.version(),
            "machine": platform.machine(),
            "processor": platform.processor(),
            "accelerator": torch.cuda.get_device_name(0) if cuda else "cpu",
            "memory": "of the accelerator" if cuda else "resident set of the process",
        },
        "pytorch_info": torch.__config__.show(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
