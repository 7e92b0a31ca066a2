#!/usr/bin/env bash
# transformers and DeepSpeed ZeRO-3: a Qwen3-VL-MoE checkpoint that transformers itself wrote cannot be read at stage 3.
#
# A good guess: from_pretrained reads at ZeRO-3 what it reads without; stages differ in where weights lie, not in their values.
# What happens: published checkpoints have the experts' projections turned, save_pretrained writes them as the model has them, and
#   from_pretrained turns those whose shape is not the model's. At stage 3 the model's parameters are split, so each has the shape (0,):
#   every projection is turned. Published checkpoints come out right, those of save_pretrained end in an error about shapes; with
#   experts as wide as the model the shapes would agree, and nothing would be said.
# Source: transformers.core_model_loading.Transpose.convert (check_dims), called by
#   transformers.integrations.deepspeed._apply_weight_conversions_to_state_dict.
# Who is hurt: whoever tunes mixture-of-experts vision-language models on several nodes.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 deepspeed==0.19.8 accelerate==1.15.0 pillow==13.0.0

in_ranks 1 <<'PY'
import tempfile, torch, deepspeed
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.integrations import HfDeepSpeedConfig

deepspeed.init_distributed("gloo", verbose=False)
config = Qwen3VLMoeConfig(
    text_config=dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                     rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 100.0}),
    vision_config=dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=24, patch_size=4, out_hidden_size=32,
                       num_position_embeddings=16, deepstack_visual_indexes=[0]),
    image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
folder = tempfile.mkdtemp()
model = Qwen3VLMoeForConditionalGeneration(config)
model.save_pretrained(folder)
again = Qwen3VLMoeForConditionalGeneration.from_pretrained(folder)
name = "model.language_model.layers.0.mlp.experts.down_proj"
print("without ZeRO-3: read, the same weights:", torch.equal(again.state_dict()[name], model.state_dict()[name]))
kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
try:
    Qwen3VLMoeForConditionalGeneration.from_pretrained(folder)
    said = "read"
except RuntimeError as error:
    said = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
print("at ZeRO-3:", said)
assert said.startswith("size mismatch for " + name)
PY
