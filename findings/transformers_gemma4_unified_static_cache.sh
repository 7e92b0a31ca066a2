#!/usr/bin/env bash
# transformers, Gemma 4 unified: with a static cache generate() sees images otherwise than in training, and than without it.
#
# A good guess: cache_implementation="static" is a matter of speed; the first step has the logits of forward() on the same
#   inputs, with images as without.
# What happens: the logits differ once a prompt has an image. forward(), and generate() with its usual cache, let the tokens of
#   an image see each other in all layers; with a static cache they do so in sliding layers only, and full layers are causal.
# Source: transformers.models.gemma4_unified.modeling_gemma4_unified: Gemma4UnifiedModel.forward gives block_sequence_ids to
#   masking_utils.create_masks_for_generate, which uses them in every mask; Gemma4UnifiedForConditionalGeneration has a
#   create_masks_for_generate of its own ("Gemma 4 explicitly disables bidirectional attention on global attention layers"),
#   which generate() calls for caches that can be compiled.
# Who is hurt: whoever tunes or scores with forward() and serves with a static cache: the model then works under another mask.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

IMAGE, START, END = 60, 61, 62

def model(layers):
    torch.manual_seed(0)
    return Gemma4UnifiedForConditionalGeneration(Gemma4UnifiedConfig(
        text_config=dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, global_head_dim=8, sliding_window=16, layer_types=layers,
                         initializer_range=0.5, use_bidirectional_attention="vision"),
        vision_config=dict(patch_size=4, pooling_kernel_size=2, mm_embed_dim=16, mm_posemb_size=16, output_proj_dims=16),
        image_token_id=IMAGE, boi_token_id=START, eoi_token_id=END, video_token_id=59, audio_token_id=58)).eval()

ids = torch.tensor([[2, 5, START, IMAGE, IMAGE, IMAGE, IMAGE, END, 6, 7]])
types = (ids == IMAGE).int()
pixels, places = torch.rand(1, 4, 3 * 8 * 8), torch.tensor([[[x, y] for y in range(2) for x in range(2)]])
image = dict(pixel_values=pixels, image_position_ids=places)

def distance(cache, **image):
    """Relative distance between the logits of forward and those that generate's first step takes."""
    m = model(["full_attention", "sliding_attention", "full_attention"])
    inputs = dict(input_ids=ids if image else torch.where(types.bool(), 9, ids), attention_mask=torch.ones_like(ids),
                  mm_token_type_ids=types if image else torch.zeros_like(types), **image)
    with torch.no_grad():
        forward = m(**inputs).logits[:, -1]
        steps = m.generate(**inputs, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True,
                           cache_implementation=cache, disable_compile=True)
    return ((steps.logits[0] - forward).norm() / forward.norm()).item()

seen = {(what, cache): distance(cache, **given)
        for what, given in (("text alone", {}), ("an image", image)) for cache in ("dynamic", "static")}
for (what, cache), value in seen.items():
    print(f"{what}, {cache} cache: first step of generate and forward differ by {value:.1e} of the logits")
assert seen.pop(("an image", "static")) > 1e-3 and max(seen.values()) < 1e-5
PY
