#!/usr/bin/env bash
# transformers, HunYuan-VL: in a batch the answer to one prompt depends on which prompts stand above it.
#
# A good guess: rows of a batch do not see each other, so a prompt has the same logits alone and in the second row.
# What happens: one of the rotary axes is the number of the image, and it is counted through all rows of the batch instead of
#   from the first image of each row. The second row's image is "image 1" although its prompt has a single one.
# Source: transformers.models.hunyuan_vl.modeling_hunyuan_vl.HunYuanVLModel.get_rope_index (`image_index` outlives a row).
# Who is hurt: whoever evaluates or trains in batches; scores change with batch size and order.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from transformers import HunYuanVLConfig, HunYuanVLForConditionalGeneration

torch.manual_seed(0)
IMAGE, START, END = 60, 61, 62
model = HunYuanVLForConditionalGeneration(HunYuanVLConfig(
    text_config=dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, initializer_range=0.5,
                     rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 1, 1]}),
    vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                       patch_size=4, out_hidden_size=32, text_hidden_size=32, max_image_size=64, min_image_size=8,
                       img_max_token_num=64),
    image_token_id=IMAGE, im_start_id=START, im_end_id=END)).eval()

# A grid of 4 x 4 patches becomes 2 rows of 2 tokens with a separator each, and a token at both ends.
row = torch.tensor([[START] + [IMAGE] * 8 + [END, 5, 6, 7]])
both = torch.cat([row, torch.tensor([[START] + [IMAGE] * 8 + [END, 8, 9, 10]])])
patches = torch.randn(16, 3 * 4 * 4, generator=torch.Generator().manual_seed(0))

def logits(ids):
    images = len(ids)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int(),
                     pixel_values=patches.repeat(images, 1), image_grid_thw=torch.tensor([[1, 4, 4]] * images)).logits[:, -1]

together = logits(both)
for i, alone in enumerate((logits(both[:1]), logits(both[1:]))):
    print(f"row {i}: relative distance of its last logits to those of the same prompt alone "
          f"{((together[i] - alone[0]).norm() / alone.norm()).item():.1e}")
first, second = ((together[i] - logits(both[i:i + 1])[0]).norm() / together[i].norm() for i in (0, 1))
assert first < 1e-4 and second > 1e-4
PY
