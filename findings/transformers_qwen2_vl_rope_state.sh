#!/usr/bin/env bash
# transformers, Qwen2-VL: the model remembers a position offset between calls, so two cached decodings disturb each other.
#
# A good guess: with past_key_values passed in, everything that a decoding step needs is in its arguments.
# What happens: the offset between text position and cache length (pictures take fewer positions than tokens) is kept on the
#   model and belongs to the last prompt that was read. Reading prompt B between prompt A and A's next token shifts that
#   token's position: other logits, no error.
# Source: transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLModel.rope_deltas (and its relatives in later families).
# Who is hurt: servers and samplers that interleave requests, speculative decoding, evaluation hooks inside a decoding loop.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

torch.manual_seed(0)
IMAGE = 60
model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(
    text_config=dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.5, bos_token_id=0, eos_token_id=1,
                     pad_token_id=2,
                     rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0}),
    vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2,
                       temporal_patch_size=2, in_channels=3),
    image_token_id=IMAGE, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)).eval()

def prompt(rows, columns, *more):
    ids = torch.tensor([[5, 62] + [IMAGE] * (rows * columns // 4) + [63, 7, 8, *more]])
    pixels = torch.randn(rows * columns, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(rows))
    return dict(input_ids=ids, pixel_values=pixels, image_grid_thw=torch.tensor([[1, rows, columns]]),
                mm_token_type_ids=(ids == IMAGE).int())

with torch.no_grad():
    whole = model(**prompt(8, 8, 9)).logits[:, -1]
    seen = {}
    for between in (False, True):
        cache = model(**prompt(8, 8), use_cache=True).past_key_values
        if between:
            model(**prompt(2, 2), use_cache=True)
        step = model(input_ids=torch.tensor([[9]]), past_key_values=cache, use_cache=True).logits[:, -1]
        seen[between] = ((step - whole).norm() / whole.norm()).item()
        print(f"next token of A from its cache, prompt B read in between: {between!s:5}: relative distance to A read whole "
              f"{seen[between]:.1e}")
assert seen[False] < 1e-4 and seen[True] > 1e-2
PY
