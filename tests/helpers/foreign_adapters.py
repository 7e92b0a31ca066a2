"""Adapters of other programs, made in a process that never imports this package."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from tests.helpers import peft_alone

# transformers' Trainer around peft, and an adapter at the places that ms-swift writes as one pattern.
_FOREIGN = textwrap.dedent("""
    import pathlib, sys, torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration, Trainer, TrainingArguments

    folder = pathlib.Path(sys.argv[1])
    swift = r"^(model\\.language_model(?=\\.).*\\.(q_proj|v_proj))$"
    for name, targets in (("trainer", ["q_proj", "v_proj"]), ("swift", swift)):
        torch.manual_seed(1)
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder / "model")
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=targets))
        ids = torch.randint(2, 20, (8, 6))
        arguments = TrainingArguments(
            output_dir=folder / name, max_steps=3, save_steps=3, learning_rate=0.05, report_to=[], use_cpu=True,
            disable_tqdm=True, per_device_train_batch_size=4,
        )
        rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert "mmpeft_ds" not in sys.modules
""")


def make(folder: Path) -> None:
    """FOLDER/trainer/checkpoint-3 and FOLDER/swift/checkpoint-3, over FOLDER/model."""
    peft_alone.run(_FOREIGN, folder)
    for name, value in (
        ("args", {"model": "qwen2_vl", "train_type": "lora"}),
        ("additional_config", {"lora_dtype": None}),
    ):
        (folder / "swift" / "checkpoint-3" / f"{name}.json").write_text(json.dumps(value))
