#!/usr/bin/env bash
# peft on LLaVA: LoRA on the vision tower puts adapters into a last layer whose output nobody reads.
#
# A good guess: every adapter that is attached and counted as trainable takes part in the loss.
# What happens: LLaVA reads the layer before the last (vision_feature_layer -2), but the tower keeps and runs all layers.
#   Adapters matched by name ("q_proj", "all-linear") land in the last one too, never get a gradient, and stay at their
#   initial values: 1 of 24 layers of adapters in LLaVA-1.5, saved and served like the others.
# Source: transformers.models.llava.modeling_llava.LlavaModel.get_image_features (vision_feature_layer).
# Who is hurt: parameter counts in tables, DDP (unused parameters), engines that wait for the gradient of every parameter.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaConfig, LlavaForConditionalGeneration

small = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2)
config = LlavaConfig(vision_config=dict(model_type="clip_vision_model", num_hidden_layers=3, image_size=32, patch_size=16, **small),
                     text_config=dict(model_type="llama", num_hidden_layers=1, vocab_size=50, **small), image_token_id=40)
model = get_peft_model(LlavaForConditionalGeneration(config), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
ids = torch.tensor([[1, 40, 40, 40, 40, 2, 3]])
model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32), labels=ids).loss.backward()
layers = {}
for name, parameter in model.named_parameters():
    if parameter.requires_grad and "vision_tower" in name:
        layers.setdefault(int(name.split("layers.")[1].split(".")[0]), set()).add(parameter.grad is not None)
print(f"vision_feature_layer {config.vision_feature_layer}; vision layer: whether its adapters got a gradient:", layers)
assert layers == {0: {True}, 1: {True}, 2: {False}}, layers
PY
