#!/usr/bin/env bash
# peft with transformers: prompt tuning of Qwen2-VL takes the rows and columns of the pictures away.
#
# A good guess: virtual tokens are put before the text, and everything behind them keeps its position plus their number.
# What happens: peft hands the model embeddings in the place of token numbers. Qwen2-VL finds out of the numbers where pictures are, and
#   gives patches a time, a row and a column; without them all tokens, patches too, are counted one after the other. No warning. The number
#   it begins with is that of the text before, if the same model has read one without the adapter.
# Source: peft.PeftModelForCausalLM.forward (prompt learning: inputs_embeds), transformers.models.qwen2_vl.modeling_qwen2_vl,
#   compute_3d_position_ids.
# Who is hurt: prompt tuning and p-tuning of Qwen2-VL and its relatives: the frozen model reads pictures as it never did in training, so
#   the method looks worse than it is. position_ids passed by hand are ignored by peft, with a warning.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2

observe <<'PY'
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

IMAGE, START, END = 100, 102, 103
config = Qwen2VLConfig(
    text_config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, vocab_size=128,
                     bos_token_id=None, eos_token_id=None, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)),
    vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2),
    image_token_id=IMAGE, video_token_id=101, vision_start_token_id=START, vision_end_token_id=END)
ids = torch.tensor([[5, START] + [IMAGE] * 8 + [END, 7, 8]])
batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int(), pixel_values=torch.randn(32, 96),
             image_grid_thw=torch.tensor([[1, 8, 4]]))

def positions(virtual, read_before=False):
    """Time, row and column of every token, as the rotary embedding gets them."""
    model = Qwen2VLForConditionalGeneration(config).eval()
    seen = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True)
    with torch.no_grad():
        if read_before:
            model(**batch)
        if virtual:
            model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual))
        model(**batch)
    return seen[-1][-3:, 0] if seen[-1].dim() == 3 else seen[-1].expand(3, -1)

base, tuned, after = positions(0), positions(2), positions(2, read_before=True)
print("the model alone, row and column:   ", base[1].tolist(), base[2].tolist())
print("with two virtual tokens:           ", tuned[1].tolist(), tuned[2].tolist())
print("the same after a text without them:", after[1].tolist())
assert base[1].tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8] and base[2].tolist() == [0, 1] + [2, 3] * 4 + [6, 7, 8]
assert all(row.tolist() == list(range(15)) for row in tuned)
assert all(row.tolist() == list(range(-4, 11)) for row in after)
PY
