"""Names of recipe keys in other trainers, for the message about an unknown key."""

from __future__ import annotations

from collections.abc import Collection

_BATCH = "data.global_batch (samples of an optimizer step over all ranks and micro-steps)"
_MICRO = "data.global_batch and optim.accumulation: a micro-step of a rank has global_batch / accumulation / ranks"
_DEVICE = "nothing in a recipe: GPUs are used where torch sees them; hide them by CUDA_VISIBLE_DEVICES="
_RANKS = "nothing in a recipe: the launcher says it, deepspeed --num_gpus N launchers/train.py ..."
_ZERO = "engine.deepspeed: ds_configs/zero0.json to zero3.json"

# name elsewhere -> the key here
KEYS = {
    "learning_rate": "optim.lr",
    "lr": "optim.lr",
    "base_lr": "optim.lr",
    "wd": "optim.weight_decay",
    "weight_decay": "optim.weight_decay",
    "optimizer": "optim.name",
    "optim_name": "optim.name",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "scheduler": "optim.schedule",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "schedule": "optim.schedule",
    "warmup_steps": "optim.warmup (a share below 1, else steps)",
    "warmup_ratio": "optim.warmup (a share below 1, else steps)",
    "epochs": "optim.epochs",
    "num_epochs": "optim.epochs",
    "num_train_epochs": "optim.epochs",
    "max_epochs": "optim.epochs",
    "steps": "optim.max_steps",
    "max_steps": "optim.max_steps",
    "num_steps": "optim.max_steps",
    "total_steps": "optim.max_steps",
    "clip_grad": "optim.clip",
    "grad_clip": "optim.clip",
    "gradient_clipping": "optim.clip",
    "max_grad_norm": "optim.clip",
    "accumulation": "optim.accumulation",
    "accumulate_grad_batches": "optim.accumulation",
    "gradient_accumulation_steps": "optim.accumulation",
    "batch": _BATCH,
    "batch_size": _BATCH,
    "global_batch": _BATCH,
    "train_batch_size": _BATCH,
    "micro_batch": _MICRO,
    "micro_batch_size": _MICRO,
    "per_device_train_batch_size": _MICRO,
    "per_device_eval_batch_size": _MICRO,
    "train_micro_batch_size_per_gpu": _MICRO,
    "num_workers": "data.workers",
    "dataloader_num_workers": "data.workers",
    "workers": "data.workers",
    "dataset": "data.sources.0.dir",
    "data_dir": "data.sources.0.dir",
    "train_data": "data.sources.0.dir",
    "train_dataset": "data.sources.0.dir",
    "eval_dataset": "data.validation.0.dir",
    "val_data": "data.validation.0.dir",
    "image_size": "backbone.image_size",
    "model": "backbone.model, or backbone.vision and backbone.text",
    "model_name_or_path": "backbone.model, or backbone.vision and backbone.text",
    "lora_r": "method.r",
    "rank": "method.r",
    "peft": "method",
    "adapter": "method",
    "bf16": "engine.dtype: bfloat16",
    "fp16": "engine.dtype: bfloat16 (float16 is not offered)",
    "precision": "engine.dtype",
    "mixed_precision": "engine.dtype",
    "torch_dtype": "engine.dtype",
    "attn_implementation": "engine.attention",
    "activation_checkpointing": "engine.gradient_checkpointing",
    "gradient_checkpointing": "engine.gradient_checkpointing",
    "deepspeed": "engine.deepspeed",
    "zero": _ZERO,
    "zero_stage": _ZERO,
    "stage": _ZERO,
    "fsdp": _ZERO,
    "device": _DEVICE,
    "accelerator": _DEVICE,
    "gpus": _RANKS,
    "num_gpus": _RANKS,
    "world_size": _RANKS,
    "eval_steps": "engine.eval_every",
    "evaluation_strategy": "engine.eval_every",
    "eval_strategy": "engine.eval_every",
    "save_steps": "engine.save_every",
    "save_total_limit": "engine.keep_last",
    "early_stopping_patience": "engine.patience",
    "logging_steps": "monitor.every",
    "report_to": "monitor.tensorboard",
    "log_dir": "run_dir",
    "logging_dir": "run_dir",
    "output_dir": "run_dir",
    "out_dir": "run_dir",
    "random_seed": "seed",
    "resume": "nothing in a recipe: the same command continues its run_dir, --fresh starts over",
    "resume_from_checkpoint": "nothing in a recipe: the same command continues its run_dir, --fresh starts over",
}


_PLACES = ("targets", "image_targets", "text_targets", "sublayers", "attention", "after", "biases", "norms", "tower",
           "towers", "layers")  # fmt: skip
_LENGTH = ("length", "context", "tokens")

# name of a method's option elsewhere -> those that stand for it here, where a method has them
OPTIONS = {
    "rank": ("r",),
    "lora_r": ("r",),
    "lora_rank": ("r",),
    "num_virtual_tokens": _LENGTH,
    "num_tokens": _LENGTH,
    "prompt_length": _LENGTH,
    "n_ctx": _LENGTH,
    "target_modules": _PLACES,
    "target": _PLACES,
    "modules": _PLACES,
    "layers_to_transform": ("layers",),
}


def hint(name: str, key: str, known: Collection[str]) -> str:
    """A sentence for the unknown key `key`, whose last part is `name`; empty where nothing is known of it.

    Args:
        known: names beside it.
    """
    here = KEYS.get(name.lower())
    of_method = key.startswith("method.")
    if of_method and (own := option_hint(name, known)):
        return own
    if not here or here == key or (of_method and here.startswith("method.")):
        return ""
    return f"Here that is {here}. "


def option_hint(name: str, known: Collection[str]) -> str:
    """A sentence for an option that a method does not know; empty where none of `known` stands for it."""
    options = [option for option in OPTIONS.get(name.lower(), ()) if option in known]
    if not options and name.lower() in OPTIONS and {"type", "options"} <= set(known):
        return f"Fields of the type stand below `options`: options.{name}, by the name that peft gives it. "
    if len(options) > 1:
        return f"Here the places are chosen by {', '.join(map(repr, options))}. "
    return f"Here that is {options[0]!r}. " if options else ""
