#!/usr/bin/env bash
# transformers Trainer: accumulated batches count by token for Qwen2-VL and LLaVA, and by batch for Qwen2.5-VL and Qwen3-VL.
#
# A good guess: since the repair of gradient accumulation in 2024 four batches of two samples give the step of one batch of
#   eight, however long the answers; the more so for models whose forward passes its keyword arguments to the same loss function.
# What happens: the classes of the later models say accepts_loss_kwargs = False. The trainer then takes the mean over batches of
#   each batch's mean: a batch with short answers weighs as much as one with long ones, so that the step depends on how
#   samples fell into batches, and differs between models of one family. With answers of 3 and of 19 tokens the gradient is more than
#   a third away from that of the whole. The same holds for ranks. One batch without accumulation is right.
# Source: `accepts_loss_kwargs` in transformers.models.qwen2_5_vl and qwen3_vl (also Gemma 3, PaliGemma, GLM-4V), read by
#   transformers.Trainer.__init__.
# Who is hurt: whoever moves a recipe from Qwen2-VL to its successors, or changes the accumulation to fit another GPU.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 pillow==13.0.0

observe <<'PY'
import torch
from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PrinterCallback, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig,
                          Qwen3VLForConditionalGeneration, Trainer, TrainingArguments)

SAMPLES, LENGTH, RATE = 8, 20, 0.1
text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 20}
turned = {**text, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
eye = {"depth": 1, "hidden_size": 16, "num_heads": 2}
marks = {"image_token_id": 2, "video_token_id": 3, "vision_start_token_id": 4, "vision_end_token_id": 5}
tower = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                         patch_size=16)
builds = {
    "LLaVA": lambda: LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=LlamaConfig(**text),
                                                              image_token_index=2)),
    "Qwen2-VL": lambda: Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=turned, vision_config={**eye, "embed_dim": 16}, **marks)),
    "Qwen2.5-VL": lambda: Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=turned, vision_config={**eye, "intermediate_size": 16, "out_hidden_size": 16}, **marks)),
    "Qwen3-VL": lambda: Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config={**turned, "head_dim": 8}, **marks,
                      vision_config={**eye, "intermediate_size": 16, "out_hidden_size": 16, "deepstack_visual_indexes": []}))}
torch.manual_seed(0)
texts = torch.randint(6, 20, (SAMPLES, LENGTH))
labels = texts.clone()
for i, row in enumerate(labels):
    row[:1 if i % 4 == 0 else LENGTH - 3] = -100
rows = [{"input_ids": texts[i], "labels": labels[i], "attention_mask": torch.ones_like(texts[i])} for i in range(SAMPLES)]
flat = lambda tensors: torch.cat([tensor.detach().flatten().clone() for tensor in tensors])

def build_same(name):
    torch.manual_seed(1)
    return builds[name]()

def step(model, accumulation):
    before = flat(model.parameters())
    arguments = TrainingArguments(
        output_dir="out", max_steps=1, gradient_accumulation_steps=accumulation, max_grad_norm=0, optim="sgd", learning_rate=RATE,
        per_device_train_batch_size=SAMPLES // accumulation, lr_scheduler_type="constant", use_cpu=True, save_strategy="no",
        report_to=[], disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return (before - flat(model.parameters())) / RATE

for name in builds:
    model = build_same(name)
    loss = model(input_ids=texts, labels=labels, attention_mask=torch.ones_like(texts)).loss
    right = flat(torch.autograd.grad(loss, model.parameters(), allow_unused=True, materialize_grads=True))
    errors = {count: float((step(build_same(name), count) - right).norm() / right.norm()) for count in (1, 4)}
    print(f"{name}: relative distance from the gradient of the {SAMPLES} samples as a whole, by accumulation steps:",
          {count: round(error, 3) for count, error in errors.items()})
    assert errors[1] < 0.01 and (errors[4] > 0.3 if name in ("Qwen2.5-VL", "Qwen3-VL") else errors[4] < 0.01)
PY
