#!/usr/bin/env bash
# transformers, CLIP: with the original checkpoints' eos_token_id, a token added to the vocabulary becomes the sentence vector.
#
# A good guess: CLIP's text vector is taken at the end-of-text token, wherever new tokens stand.
# What happens: configurations that say eos_token_id 2, as the first published CLIP files do, take the position of the
#   largest token id. That is the end of text until a token is added behind it: then the vector is taken at the added token,
#   and, attention being causal, ignores every word after it. With the true id in the configuration the end of text is taken.
# Source: transformers.models.clip.modeling_clip.CLIPTextModel.forward (argmax over input_ids if eos_token_id == 2).
# Who is hurt: textual inversion, learnt prompt tokens and <image> placeholders in CLIP's vocabulary.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging

logging.set_verbosity_error()

ADDED, EOS = 100, 97
seen = {}
for eos in (2, EOS):
    torch.manual_seed(0)
    model = CLIPTextModel(CLIPTextConfig(vocab_size=101, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                         num_attention_heads=2, max_position_embeddings=12, eos_token_id=eos)).eval()
    for name, ids in (("plain", [96, 5, 6, 7, EOS]), ("with an added token", [96, 5, ADDED, 7, EOS])):
        output = model(torch.tensor([ids]))
        position = (output.last_hidden_state[0] - output.pooler_output[0]).abs().sum(-1).argmin().item()
        print(f"eos_token_id {eos}, text {name}: the vector is that of position {position} (end of text: 4)")
        seen[eos, name] = position
assert list(seen.values()) == [4, 2, 4, 4], seen
PY
