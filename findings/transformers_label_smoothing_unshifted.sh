#!/usr/bin/env bash
# transformers Trainer: with label_smoothing_factor LLaVA and Qwen-VL learn to repeat the token that they see, not the next one.
#
# A good guess: label smoothing changes the targets a little; which token is predicted from which stays as in the model's own loss,
#   which shifts labels by one.
# What happens: the smoothed loss is the trainer's own, and it shifts only for classes listed in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.
#   Most vision-language classes are not in that list: their logits at a token are scored against that same token, which the
#   model sees. The loss falls quickly and looks healthy; nothing about the next token is learnt.
# Source: transformers.Trainer.compute_loss (shift_labels=True for listed names only) and trainer_pt_utils.LabelSmoother.
# Who is hurt: tuning of vision-language models by a Trainer with label_smoothing_factor above 0, with adapters or without.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 pillow==13.0.0

observe <<'PY'
import torch
from transformers import (CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, PrinterCallback,
                          Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Trainer, TrainingArguments)

ROWS, LENGTH, WORDS = 8, 16, 24
text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": WORDS}
tower = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                         patch_size=16)
builds = {
    "LlamaForCausalLM": lambda: LlamaForCausalLM(LlamaConfig(**text)),
    "LlavaForConditionalGeneration": lambda: LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=LlamaConfig(**text), image_token_index=1)),
    "Qwen2_5_VLForConditionalGeneration": lambda: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={**text, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, image_token_id=1, video_token_id=2,
        vision_start_token_id=3, vision_end_token_id=4,
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}))}
# Each text counts up: from the token n the next one, n + 1, is known.
texts = 6 + (torch.arange(ROWS)[:, None] + torch.arange(LENGTH)) % (WORDS - 6)
rows = [{"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)} for row in texts]
for name, build in builds.items():
    for smoothing in (0.0, 0.1):
        torch.manual_seed(0)
        model = build()
        trainer = Trainer(model, TrainingArguments(
            output_dir="out", max_steps=60, per_device_train_batch_size=ROWS, learning_rate=1e-2, label_smoothing_factor=smoothing,
            use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=60), train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        with torch.no_grad():
            chosen = model.eval()(input_ids=texts, attention_mask=torch.ones_like(texts)).logits.argmax(-1)
        right, same = [float((chosen[:, :-1] == texts[:, 1:]).float().mean()), float((chosen == texts).float().mean())]
        print(f"{name}, label_smoothing_factor {smoothing}: the likeliest token is the next one at {right:.0%} of the places, "
              f"the one just read at {same:.0%}")
        repeats = smoothing and name != "LlamaForCausalLM"
        assert (same > 0.9 and right < 0.1) if repeats else (right > 0.9 and same < 0.1)
PY
