#!/usr/bin/env bash
# transformers, GLM-4V to GLM-5: with beams, or several sequences a prompt, a prompt with two images is answered for one image seen twice.
#
# A good guess: before the first step all sequences of a prompt are equal, so num_beams or num_return_sequences start from the logits
#   that forward() has, with two images as with one.
# What happens: the features are repeated image by image (A, A, B, B), and the sequences read them in order: the first sees A twice, the
#   second B twice. Where the images differ in size, they are cut in the wrong places. Nothing is said, since the number of
#   features fits. Qwen2-VL and the shared code repeat the images of a prompt as a group (A, B, A, B), as a comment there explains.
# Source: Glm4vForConditionalGeneration._expand_multimodal_outputs (repeat_interleave), an override that glm46v, glm4v_moe, glm_ocr and
#   glm5_next copy, and granite4_vision for its own features; against transformers.generation.utils.GenerationMixin._expand_multimodal_outputs.
# Who is hurt: beam search and pass@k on questions about several images or pages; greedy answers of the same model are right.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0

observe <<'PY'
import torch
from transformers import (Glm4vConfig, Glm4vForConditionalGeneration, Glm46VConfig, Glm46VForConditionalGeneration,
                          Qwen2VLConfig, Qwen2VLForConditionalGeneration)

IMAGE, START, END, VIDEO = 90, 91, 92, 93
text = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
            vocab_size=100, pad_token_id=0, eos_token_id=None,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0})
patches = dict(depth=2, num_heads=2, patch_size=4, temporal_patch_size=2, spatial_merge_size=2)
glm = dict(text_config=text, image_token_id=IMAGE, image_start_token_id=START, image_end_token_id=END, video_token_id=VIDEO,
           video_start_token_id=94, video_end_token_id=95,
           vision_config=dict(patches, hidden_size=16, intermediate_size=24, out_hidden_size=32, image_size=16))
qwen = dict(text_config=text, image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END, video_token_id=VIDEO,
            vision_config=dict(patches, embed_dim=16, hidden_size=32, mlp_ratio=2))


def first_logits(model, images, **options):
    """Logits of the first new token: one row for each sequence."""
    ids = torch.tensor([[5] + [START, IMAGE, IMAGE, IMAGE, IMAGE, END] * images + [6, 7]])  # 16 patches of an image make 4 features
    pixels = torch.randn(16 * images, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int(), pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, 4, 4]] * images), max_new_tokens=1, return_dict_in_generate=True, output_logits=True, **options)
    return made.logits[0]


for name, kind, config, right in (("GLM-4V", Glm4vForConditionalGeneration, Glm4vConfig(**glm), False),
                                  ("GLM-4.6V", Glm46VForConditionalGeneration, Glm46VConfig(**glm), False),
                                  ("Qwen2-VL", Qwen2VLForConditionalGeneration, Qwen2VLConfig(**qwen), True)):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    for images in (1, 2):
        greedy = first_logits(model, images, do_sample=False)
        seen = {}
        for case, options in (("2 beams", dict(num_beams=2, do_sample=False)), ("2 sequences", dict(num_return_sequences=2, do_sample=True))):
            seen[case] = round(((first_logits(model, images, **options) - greedy).abs().max() / greedy.abs().max()).item(), 3)
        print(f"{name}, {images} image(s): largest difference of the first logits from greedy ones, as a share of the largest: {seen}")
        assert (max(seen.values()) < 1e-3) if images == 1 or right else (min(seen.values()) > 0.05)
PY
