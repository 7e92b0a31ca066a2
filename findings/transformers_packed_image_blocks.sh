#!/usr/bin/env bash
# transformers, Gemma 3 and PaliGemma: texts with images packed into one row do not stay apart, though packed text does.
#
# A good guess: position_ids that begin anew mark the texts of a packed row, as transformers documents; each text then has the
#   logits that it has alone, with images as without.
# What happens: packed text is exact. With images, Gemma 3's sliding layers look up which tokens are of one image at the place
#   within the text, so every text but the first gets the images of the first; PaliGemma joins the prefixes of all texts into
#   one block, so texts read each other. No word of either.
# Source: transformers.models.gemma3.modeling_gemma3.create_masks_for_vision_model passes blockwise_overlay as
#   or_mask_function, which masking_utils.packed_sequence_compatibility_function moves to places within a text;
#   transformers.models.paligemma.modeling_paligemma gives block 0 to all prefixes (block_sequence_ids), and create_causal_mask
#   applies it behind the mask that tells texts apart.
# Who is hurt: whoever tunes these models on packed rows (padding-free collators): the losses are of other masks than
#   those at inference.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PaliGemmaConfig, PaliGemmaForConditionalGeneration

IMAGE, TOWER = 60, dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, initializer_range=0.5)
torch.manual_seed(0)
gemma = Gemma3ForConditionalGeneration(Gemma3Config(
    text_config=dict(TEXT, sliding_window=64), vision_config=TOWER, mm_tokens_per_image=4, image_token_id=IMAGE,
    boi_token_index=61, eoi_token_index=62)).eval()
pali = PaliGemmaForConditionalGeneration(PaliGemmaConfig(
    text_config=dict(TEXT, model_type="gemma"), vision_config=dict(TOWER, projection_dim=32), projection_dim=32,
    image_token_id=IMAGE)).eval()
pixels = torch.randn(2, 3, 8, 8)

def logits(model, texts, types, pixels=None):
    """Of texts in one row; `types` gives token_type_ids."""
    ids, places = torch.tensor([sum(texts, [])]), torch.cat([torch.arange(len(text)) for text in texts])[None]
    images = {} if pixels is None else {"pixel_values": pixels}
    with torch.no_grad():
        return model(input_ids=ids, position_ids=places, token_type_ids=types(ids), **images).logits[0]

def apart(model, texts, types, pixels=None):
    """Relative distance of each packed text's logits to those that it has alone."""
    packed, found, begin = logits(model, texts, types, pixels), [], 0
    for i, text in enumerate(texts):
        alone = logits(model, [text], types, None if pixels is None else pixels[i:i + 1])
        found.append(((packed[begin:begin + len(text)] - alone).norm() / alone.norm()).item())
        begin += len(text)
    return found

is_image = lambda ids: (ids == IMAGE).int()
is_answer = lambda ids: ((ids >= 40) & (ids < 50)).int()  # PaliGemma: 0 is image and question, 1 the answer
image = [IMAGE] * 4
seen = {
    "Gemma 3, text alone": apart(gemma, [[2, 5, 6, 7, 8], [2, 9, 10, 11]], is_image),
    "Gemma 3, an image each": apart(gemma, [[2, 5, 6, 61, *image, 62, 7], [2, 9, 61, *image, 62, 10, 11]], is_image, pixels),
    "PaliGemma, an image each": apart(pali, [[*image, 2, 5, 41, 42], [*image, 2, 6, 7, 43]], is_answer, pixels),
}
for name, distances in seen.items():
    print(f"{name}: first text {distances[0]:.1e}, second text {distances[1]:.1e} from its logits alone")
text, *images = seen.values()
assert max(text) < 1e-5 and all(second > 1e-2 for _, second in images)
PY
