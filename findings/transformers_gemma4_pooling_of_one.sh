#!/usr/bin/env bash
# transformers, Gemma 4: with pooling_kernel_size 1 the vision tower gives out the padding of an image and drops its patches.
#
# A good guess: a kernel of 1 pools nothing, so an image of 12 patches and 4 of padding gives the features of its 12 patches.
# What happens: the 4 padding places come out, all zero, and none of the 12 patches. An image without padding gives an empty
#   tensor. With a kernel of 2 or more it is the patches that stay.
# Source: transformers.models.gemma4.modeling_gemma4.Gemma4VisionPooler.forward: pooling makes a mask that is True for what is
#   there; where nothing is pooled, padding_positions, True for padding, is returned as it came. Gemma4VisionModel.forward
#   indexes with either.
# Who is hurt: whoever configures a finer resolution than the checkpoints' 3, or makes a small model of this class for tests.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from transformers import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

def features(kernel, rows, padding):
    """Of one image of `rows` rows of 4 patches of 4 x 4 pixels, behind which `padding` places are empty."""
    torch.manual_seed(0)
    tower = Gemma4VisionModel(Gemma4VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        patch_size=4, pooling_kernel_size=kernel, position_embedding_size=16)).eval()
    pixels = torch.rand(1, 4 * rows + padding, 3 * 4 * 4)
    pixels[:, 4 * rows:] = 0
    places = torch.tensor([[x, y] for y in range(rows) for x in range(4)] + [[-1, -1]] * padding)
    with torch.no_grad():
        return tower(pixel_values=pixels, pixel_position_ids=places[None]).last_hidden_state

seen = {}
for kernel, rows, padding in ((2, 4, 0), (2, 2, 8), (1, 4, 0), (1, 3, 4)):
    out = seen[kernel, padding] = features(kernel, rows, padding)
    print(f"kernel {kernel}: {4 * rows} patches and {padding} places of padding give {len(out)} features, "
          f"{4 * rows // kernel ** 2} expected, {int((out == 0).all(-1).sum())} of them zero")
assert len(seen[2, 0]) == 4 and len(seen[2, 8]) == 2, "a kernel of 2 keeps the patches"
assert len(seen[1, 0]) == 0 and len(seen[1, 4]) == 4 and not seen[1, 4].any()
PY
