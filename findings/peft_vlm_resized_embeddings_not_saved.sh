#!/usr/bin/env bash
# peft: embeddings of added tokens are saved with a language model's adapter, and left out with a vision-language model's.
#
# A good guess: after resize_token_embeddings, save_pretrained adds the resized embeddings (save_embedding_layers="auto" tells so in a
#   warning), as it does for Llama, GPT-2 or Qwen.
# What happens: the vocabulary's size is looked up as model.config.vocab_size. Configurations composed of a text and a vision part have
#   none at the top, so that nothing counts as resized: neither embeddings nor head are in the file, and nothing is said. Who loads the
#   adapter resizes again and gets new random rows for the new tokens.
# Source: peft.utils.save_and_load.get_peft_model_state_dict (vocab_size = getattr(model.config, "vocab_size", None)).
# Who is hurt: LLaVA, Qwen-VL, Gemma 3 and others with tokens of their own (<point>, <box>); save_embedding_layers=True helps.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import warnings
import torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
small = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
text = dict(vocab_size=50, initializer_range=0.5, tie_word_embeddings=False, **small)
vision = dict(model_type="clip_vision_model", image_size=32, patch_size=16, **small)
models = {"llama": (LlamaForCausalLM, LlamaConfig(**text)),
          "llava": (LlavaForConditionalGeneration, LlavaConfig(vision_config=vision, text_config=dict(model_type="llama", **text)))}


def with_new_tokens(kind, seed):
    base = models[kind][0].from_pretrained(kind)
    torch.manual_seed(seed)
    base.resize_token_embeddings(56, mean_resizing=False)
    return base


def of_the_vocabulary(folder):
    with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
        return sorted(name.split(".")[-2] for name in file.keys() if "lora" not in name)


seen = {}
ids = torch.tensor([[1, 52, 53, 2]])  # 52 and 53 are new
for kind, (model_class, config) in models.items():
    torch.manual_seed(0)
    model_class(config).save_pretrained(kind)
    model = get_peft_model(with_new_tokens(kind, 1), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(f"{kind}-adapter")
    said = any("has been resized" in str(warning.message) for warning in caught)
    model.save_pretrained(f"{kind}-asked", save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(with_new_tokens(kind, 2), f"{kind}-adapter").eval()
    with torch.no_grad():
        difference = float((loaded(input_ids=ids).logits - model(input_ids=ids).logits).abs().max())
    seen[kind] = of_the_vocabulary(f"{kind}-adapter"), said, difference > 0.1
    print(f"{kind}: saved {seen[kind][0]}, said so: {said}, outputs after loading differ by {difference:.2f}; "
          f"when asked for: {of_the_vocabulary(f'{kind}-asked')}")
    assert of_the_vocabulary(f"{kind}-asked") == ["embed_tokens", "lm_head"]
assert seen == {"llama": (["embed_tokens", "lm_head"], True, False), "llava": ([], False, True)}, seen
PY
