"""The ds_configs JSON: it owns zero_optimization, offload and communication; everything else belongs to the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import REPOSITORY
from mmpeft_ds.recipe import Recipe, where

# Keys a ds_configs JSON may set. Offload and ZeRO++ live inside zero_optimization.
OWNED = (
    "zero_optimization",
    "aio",
    "communication_data_type",
    "comms_logger",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "disable_allgather",
)
# DeepSpeed's name -> the recipe's key, for the message; the JSON may name these only as "auto".
RECIPE_KEYS = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.global_batch",
    "gradient_accumulation_steps": "optim.accumulation",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "engine.dtype",
    "fp16": "engine.dtype",
    "activation_checkpointing": "engine.gradient_checkpointing",
    "steps_per_print": "monitor.every",
    "tensorboard": "monitor.tensorboard",
}
# Inside zero_optimization: what `"auto"` becomes is known only once the trainables are.
AUTO_SIZES = ("reduce_bucket_size", "allgather_bucket_size")


def check_ds_config(recipe: Recipe) -> dict[str, Any]:
    """The JSON that `engine.deepspeed` names.

    Raises:
        BadInput: if there is none, it is no JSON object, sets a key that the recipe owns, or DeepSpeed refuses it.
    """
    here = where(recipe, "engine.deepspeed")
    path = find(recipe.engine.deepspeed)
    if path is None:
        raise BadInput(
            f"{here}: no file {recipe.engine.deepspeed}. Take one of ds_configs/ or give a path that exists."
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error}). Mend it or take one of ds_configs/.") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path}: holds a {type(config).__name__}, expected a JSON object. Take one of ds_configs/.")
    for key, value in config.items():
        if key in RECIPE_KEYS and value != "auto":
            raise BadInput(
                f'{path}: {key} belongs to the recipe\'s {RECIPE_KEYS[key]} and may only be "auto" here. '
                f"Remove it and set {RECIPE_KEYS[key]} in the recipe."
            )
        if key not in RECIPE_KEYS and key not in OWNED:
            raise BadInput(f"{path}: unknown key {key!r}. Remove it; a ds_configs JSON may set {', '.join(OWNED)}.")
    zero = config.get("zero_optimization", {"stage": 0})
    _check_zero(path, zero)
    return {**{k: v for k, v in config.items() if k in OWNED}, "zero_optimization": zero}


def find(path: str) -> Path | None:
    """`path` below the working directory, else below the repository, else None."""
    return next((p for p in (Path(path), REPOSITORY / path) if p.is_file()), None)


def _check_zero(path: Path, zero: Any) -> None:
    if not isinstance(zero, dict):
        raise BadInput(f'{path}: zero_optimization must be a JSON object, such as {{"stage": 3}}.')
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # slow to import: only when a run is near

    fields = DeepSpeedZeroConfig.model_fields
    known = {name for name in fields} | {f.alias for f in fields.values() if f.alias}
    for key, value in zero.items():
        if key not in known:
            raise BadInput(
                f"{path}: zero_optimization.{key} is not known to DeepSpeed. Remove it or mend its spelling."
            )
        if value == "auto" and key not in AUTO_SIZES:
            raise BadInput(f'{path}: zero_optimization.{key} cannot be "auto". Give a value or remove it.')
    try:
        DeepSpeedZeroConfig(**{k: v for k, v in zero.items() if v != "auto"})
    except ValueError as error:
        first = str(error).splitlines()
        raise BadInput(
            f"{path}: zero_optimization: {' '.join(line.strip() for line in first[1:3])}. Mend it."
        ) from error


def merge(config: dict[str, Any], recipe: Recipe, world_size: int, trainable: int) -> dict[str, Any]:
    """What DeepSpeed gets: the JSON plus the recipe's part.

    Args:
        config: of `check_ds_config`.
        trainable: number of trainable elements; sizes the reduction buckets.
    """
    zero = dict(config["zero_optimization"])
    stage = zero.get("stage", 0)
    # The default of 5e8 elements would be a buffer of 2 GB for adapters of a few MB. With room for all trainables
    # there is one reduction a backward.
    for key in AUTO_SIZES:
        if zero.get(key, "auto") == "auto":
            zero[key] = max(2 * trainable, 1 << 16)
    # The stream's slots may be uneven over ranks; DeepSpeed only prints these numbers and wants them consistent.
    accumulation = recipe.optim.accumulation
    micro = max(1, -(-recipe.data.global_batch // (world_size * accumulation)))
    return {
        **config,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world_size,
        "gradient_clipping": recipe.optim.clip,
        # Measured: on keeps fp32 adapters at stage 3 but casts them to bf16 at stages 1-2; off makes zero.Init build a
        # float32 base at stage 3. So on at stage 3 only; below it the base itself is cast.
        "bf16": {"enabled": recipe.engine.dtype == "bfloat16" and stage == 3},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
