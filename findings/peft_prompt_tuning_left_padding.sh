#!/usr/bin/env bash
# peft: what a model with prompt tuning or P-tuning generates depends on how much padding its batch put before the text.
#
# A good guess: padding on the left with an attention mask changes nothing, as for the base model, LoRA and prefix tuning.
# What happens: the virtual tokens are put before the padding, so they stand further from a shorter text, and the positions that
#   generate() counts from the mask are not passed on. The first logits differ by as much as they are large, and other texts come out.
# Source: peft.peft_model.PeftModelForCausalLM.prepare_inputs_for_generation and forward (prompts concatenated to inputs_embeds,
#   position_ids set to None).
# Who is hurt: scores over generated answers: they change with the batch size and with which questions share a batch.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2

observe <<'PY'
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

common = {"vocab_size": 64, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
bases = {
    "llama": (LlamaForCausalLM, LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                            num_key_value_heads=2, **common), ["q_proj"]),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=2, **common), ["c_attn"]),
}
torch.manual_seed(1)
text = torch.randint(1, 64, (1, 5))
padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), text], 1)

def written(model, ids):
    out = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), max_new_tokens=8, do_sample=False,
                         output_logits=True, return_dict_in_generate=True)
    return out.sequences[0, -8:].tolist(), out.logits[0]

for name, (kind, config, targets) in bases.items():
    methods = {"base": None, "LoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)}
    for method in (PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig):
        methods[method.__name__] = method(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for label, method in methods.items():
        torch.manual_seed(0)
        model = kind(config).eval()
        if method is not None:
            model = get_peft_model(model, method).eval()
            for parameter in model.parameters():
                if parameter.requires_grad and label != "LoRA":
                    torch.nn.init.normal_(parameter)
        (alone, first), (among, second) = written(model, text), written(model, padded)
        difference = (first - second).abs().max().item()
        print(f"{name}, {label}: logits up to {first.abs().max():.1f} differ by {difference:.2g}, same text: {alone == among}")
        if label.startswith("Prompt"):
            assert difference > 0.3 and alone != among
        else:
            assert difference < 1e-3 and alone == among
PY
