"""The ds_configs JSON: it owns zero_optimization, offload and communication; everything else belongs to the recipe.

A key may be set only where it is known that gradient norms, weights, checkpoints, adapters and resumed runs stay right
with it: tests/distributed/test_ds_keys_ranks.py trains with each. The default of DeepSpeed may be written out for any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import REPOSITORY
from mmpeft_ds.recipe import Recipe, where

# Keys a ds_configs JSON may set. Offload and ZeRO++ live inside zero_optimization.
OWNED = ("zero_optimization", "comms_logger")
# Further keys of DeepSpeed: the one value that may be written out, and what speaks against others.
FIXED = {
    "prescale_gradients": (False, "stages 2 and 3 end with an assertion, after the base was loaded"),
    "gradient_predivide_factor": (1.0, "stage 3 then scales gradients by another number than the rank count"),
    "communication_data_type": (None, "gradients would be rounded on their way between ranks"),
    "sparse_gradients": (False, "DeepSpeed no longer has it"),
    "disable_allgather": (False, "DeepSpeed ignores it"),
    "aio": (None, "only offload to NVMe reads it"),
}
# Keys of zero_optimization that may be set to anything that DeepSpeed accepts: they change what is sent when, how much
# at a time, and where it lies, but no number.
ZERO_KEYS = frozenset(
    (
        "stage",
        "contiguous_gradients",
        "overlap_comm",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "allgather_bucket_size",
        "ignore_unused_parameters",
        "sub_group_size",
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "use_all_reduce_for_fetch_params",
        "allgather_sequential",
        "gather_16bit_weights_on_model_save",  # of DeepSpeed's own saving, which is not used
        "memory_efficient_linear",
        "offload_param",
        "offload_optimizer",
        "zero_hpz_partition_size",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
    )
)
ZERO_REFUSED = {
    "round_robin_gradients": "DeepSpeed then hands out other parameters' numbers, and saves would hold those",
    "compute_grad_norm": "nothing would be clipped, and a gradient that is not finite would be stepped on",
    "zero_quantized_weights": "frozen weights would be rounded to 8 bits, so it would be another base",
    "zero_quantized_nontrainable_weights": "frozen weights would be rounded to 8 bits, so it would be another base",
    "zero_quantized_gradients": "gradients would be rounded to 4 bits on their way between ranks",
    "zenflow": "gradients would be applied some steps late",
    "module_granularity_threshold": "the trainer itself says which blocks are fetched as a whole",
    "leaf_module": "the trainer itself says which blocks are fetched as a whole",
}
# Keys of offload_param and offload_optimizer; those that are not tried may be set to DeepSpeed's default alone.
OFFLOAD_TRIED = frozenset(
    (
        *("device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"),
        *("pipeline_read", "pipeline_write", "fast_init"),
    )
)
OFFLOAD_REFUSED = {
    "ratio": (1.0, "DeepSpeed then takes no optimizer but its own, which is said after the base was loaded"),
    "super_offload": (False, "DeepSpeed then takes no optimizer but its own, and some GPUs alone"),
    "cpuadam_cores_perc": (0.8, "only super_offload reads it"),
}
NOT_TRIED = "nobody has shown that checkpoints and adapters stay right with it"
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
# Keys of zero_optimization that may be "auto": their sizes follow from the number of trainables,
AUTO_SIZES = ("reduce_bucket_size", "allgather_bucket_size")
# and the size of the groups that keep one more copy of the base from the ranks on each machine (node_groups.py).
AUTO = (*AUTO_SIZES, "zero_hpz_partition_size")


def check_ds_config(recipe: Recipe) -> dict[str, Any]:
    """The JSON that `engine.deepspeed` names, checked by us and by DeepSpeed. Raises BadInput as those do."""
    config = read_ds_config(recipe)
    check_by_deepspeed(recipe, config)
    return config


def read_ds_config(recipe: Recipe) -> dict[str, Any]:
    """The JSON that `engine.deepspeed` names, as far as it can be checked without DeepSpeed.

    Raises:
        BadInput: if there is none, it is no JSON object, or it sets a key that the recipe owns or nobody has tried.
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
        if key in FIXED and value not in (FIXED[key][0], "auto"):
            raise BadInput(f"{path}: {key}: {json.dumps(value)} is refused: {FIXED[key][1]}. Remove the key.")
        if key not in RECIPE_KEYS and key not in OWNED and key not in FIXED:
            raise BadInput(f"{path}: unknown key {key!r}. Remove it; a ds_configs JSON may set {', '.join(OWNED)}.")
    zero = config.get("zero_optimization", {"stage": 0})
    if not isinstance(zero, dict):
        raise BadInput(f'{path}: zero_optimization must be a JSON object, such as {{"stage": 3}}.')
    stage = zero.get("stage", 0)
    if type(stage) is not int:
        raise BadInput(f"{path}: zero_optimization.stage: {json.dumps(stage)} is no whole number. Use 0, 1, 2 or 3.")
    _check_offload(path, zero)
    return {**{k: v for k, v in config.items() if k in OWNED}, "zero_optimization": zero}


def find(path: str) -> Path | None:
    """`path` below the working directory, else below the repository, else None."""
    return next((p for p in (Path(path), REPOSITORY / path) if p.is_file()), None)


def is_shipped(recipe: Recipe) -> bool:
    """Whether the JSON is one of ds_configs/, all of which are known to suit DeepSpeed."""
    path = find(recipe.engine.deepspeed)
    return path is not None and path.resolve().parent == REPOSITORY / "ds_configs"


def check_by_deepspeed(recipe: Recipe, config: dict[str, Any]) -> None:
    """Refuse keys and values of `zero_optimization` that DeepSpeed does not know, or that we know to go wrong.

    Args:
        config: of `read_ds_config`.

    Raises:
        BadInput: naming the key.
    """
    path, zero = find(recipe.engine.deepspeed), config["zero_optimization"]
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # slow to import: only when a run is near

    fields = DeepSpeedZeroConfig.model_fields
    names = {name: name for name in fields} | {f.alias: name for name, f in fields.items() if f.alias}
    for key, value in zero.items():
        if key not in names:
            raise BadInput(
                f"{path}: zero_optimization.{key} is not known to DeepSpeed. Remove it or mend its spelling."
            )
        if value == "auto" and key not in AUTO:
            raise BadInput(f'{path}: zero_optimization.{key} cannot be "auto". Give a value or remove it.')
        name = names[key]
        if name not in ZERO_KEYS and value not in (fields[name].default, None):
            why = ZERO_REFUSED.get(name, NOT_TRIED)
            raise BadInput(f"{path}: zero_optimization.{key}: {json.dumps(value)} is refused: {why}. Remove the key.")
    gathered_at_a_time = zero.get("allgather_bucket_size", "auto")
    if isinstance(gathered_at_a_time, int) and gathered_at_a_time % 2:
        raise BadInput(
            f"{path}: zero_optimization.allgather_bucket_size: {gathered_at_a_time} is odd, which DeepSpeed cannot "
            "split. Give an even number or remove it."
        )
    try:
        DeepSpeedZeroConfig(**{k: v for k, v in zero.items() if v != "auto"})
    except AssertionError as error:  # an old name of a key beside its new one
        raise BadInput(f"{path}: zero_optimization: {' '.join(str(error).split())}. Mend it.") from error
    except ValueError as error:
        first = str(error).splitlines()
        raise BadInput(
            f"{path}: zero_optimization: {' '.join(line.strip() for line in first[1:3])}. Mend it."
        ) from error


def _check_offload(path: Path, zero: dict[str, Any]) -> None:
    for key in ("offload_param", "offload_optimizer"):
        section = zero.get(key)
        device = section.get("device", "none") if isinstance(section, dict) else "none"
        if device not in ("none", "cpu"):
            raise BadInput(f"{path}: zero_optimization.{key}.device: {device!r} is refused: {NOT_TRIED}. Use cpu.")
        for name, value in section.items() if isinstance(section, dict) else ():
            default, why = OFFLOAD_REFUSED.get(name, (None, NOT_TRIED))
            if name not in OFFLOAD_TRIED and value != default:
                raise BadInput(
                    f"{path}: zero_optimization.{key}.{name}: {json.dumps(value)} is refused: {why}. Remove the key."
                )
        if key == "offload_optimizer" and device == "cpu" and zero.get("stage", 0) != 3:
            raise BadInput(
                f"{path}: zero_optimization.{key} is refused below stage 3: DeepSpeed then shows no gradients, so "
                "that norms read 0 and EWC adds nothing. Use stage 3, or leave it out: adapters are small."
            )


def divisor(recipe: Recipe) -> int:
    """The number by which DeepSpeed divides the loss of each micro-batch.

    Where micro-batches are planned by tokens a step has as many as it needs, and the engine is told which one is the
    last. The number is then any above 1, with which DeepSpeed prepares to add gradients up.
    """
    return 2 if recipe.data.pack else recipe.optim.accumulation


def merge(config: dict[str, Any], recipe: Recipe, world_size: int, trainable: int) -> dict[str, Any]:
    """The configuration for DeepSpeed: the JSON and the recipe's part.

    Args:
        config: of `check_ds_config`, or of `node_groups.make`, which sets the size of the groups that keep copies.
        trainable: number of trainable elements; sizes the reduction buckets.
    """
    zero = dict(config["zero_optimization"])
    stage = zero.get("stage", 0)
    # The default of 5e8 elements would be a buffer of 2 GB for adapters of a few MB. With room for all trainables
    # there is one reduction per backward pass. DeepSpeed asserts that the size is even.
    for key in AUTO_SIZES:
        if zero.get(key, "auto") == "auto":
            zero[key] = max(trainable + trainable % 2, 1 << 16)
    # The slots may be uneven over ranks. DeepSpeed only prints these numbers, and checks that they are consistent.
    accumulation = divisor(recipe)
    micro = max(1, -(-recipe.data.global_batch // (world_size * accumulation)))
    return {
        **config,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world_size,
        "gradient_clipping": recipe.optim.clip,
        # Measured: with bf16 on, adapters stay float32 at stage 3 but are cast to bfloat16 at stages 1 and 2; with it
        # off, zero.Init builds a float32 base at stage 3. So it is on at stage 3 only; below, the base itself is cast.
        "bf16": {"enabled": recipe.engine.dtype == "bfloat16" and stage == 3},
        # Otherwise DeepSpeed adds up float32 gradients over ranks, and keeps the sum, in bfloat16 where bf16 is on.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        # It waits for the device before and after every step, for a rate that is printed nowhere.
        "timers": {"throughput": {"enabled": False}},
    }
