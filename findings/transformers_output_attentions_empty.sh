#!/usr/bin/env bash
# transformers: output_attentions=True gives an empty tuple with the default attention.
#
# A good guess: one attention map a layer, or a fall back to eager attention as in earlier versions, or an error.
# What happens: models are built with sdpa, which has no maps; `attentions` is () for image and text models alike, with a
#   warning among others. A loop over layers (`for map in outputs.attentions`) runs zero times, `if outputs.attentions is not
#   None` is true. attn_implementation="eager" gives the maps.
# Source: transformers.utils.output_capturing / generic, the capturing of outputs by hooks, and PreTrainedModel's default.
# Who is hurt: attention roll-outs, token pruning, losses on attention maps, adapters that route by attention.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2

observe <<'PY'
import torch
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
image = dict(image_size=32, patch_size=16)
for model, config in ((CLIPVisionModel, CLIPVisionConfig(**small, **image)), (ViTModel, ViTConfig(**small, **image)),
                      (BertModel, BertConfig(**small))):
    x = torch.arange(4)[None] if model is BertModel else torch.randn(1, 3, 32, 32)
    maps = {}
    for kind in (None, "eager"):
        built = model._from_config(config, **({"attn_implementation": kind} if kind else {})).eval()
        maps[kind or "default"] = built(x, output_attentions=True).attentions
    print(f"{model.__name__}: attention maps by default {maps['default']!r}, with eager {len(maps['eager'])}")
    assert maps["default"] == () and len(maps["eager"]) == 2
PY
