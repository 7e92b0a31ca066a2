#!/usr/bin/env bash
# transformers: a composed model saved in float32 may say bfloat16 for its parts, and a tower loaded alone is bfloat16.
#
# A good guess: save_pretrained writes the dtype of what it writes; loading a part of the folder gives the stored precision.
# What happens: model.float() (or .to(...)) after loading is noted for the whole model at saving, and not in the
#   configurations of its parts. CLIPModel comes back in float32, CLIPVisionModel from the same folder in bfloat16, although
#   the file holds float32.
# Source: transformers.modeling_utils.PreTrainedModel.save_pretrained (sets the dtype of the top configuration) and
#   from_pretrained, whose default dtype "auto" believes the part's configuration.
# Who is hurt: merged checkpoints of bfloat16 runs, two-tower models taken apart for feature extraction.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import json, pathlib, torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

part = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
config = CLIPConfig(text_config=dict(vocab_size=110, **part), vision_config=dict(image_size=32, patch_size=16, **part),
                    projection_dim=8)
CLIPModel(config).to(torch.bfloat16).save_pretrained("half")
CLIPModel.from_pretrained("half").float().save_pretrained("whole")
stored = {t.dtype for t in load_file("whole/model.safetensors").values()}
saved = json.loads(pathlib.Path("whole/config.json").read_text())
model, tower = CLIPModel.from_pretrained("whole").dtype, CLIPVisionModel.from_pretrained("whole").dtype
print(f"tensors in the file: {stored}; config.json says {saved['dtype']}, its vision_config {saved['vision_config']['dtype']}")
print(f"CLIPModel.from_pretrained: {model}; CLIPVisionModel.from_pretrained of the same folder: {tower}")
assert stored == {torch.float32} and model == torch.float32 and tower == torch.bfloat16
PY
