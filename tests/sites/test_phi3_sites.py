"""Phi-3's fused projections: their parts are those of a Llama that says the same."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from mmpeft_ds.sites import find_sites
from tests.helpers.models.randomise import randomise
from tests.helpers.models.tiny_mllm import TEXT

IDS = torch.tensor([[5, 3, 6, 7, 5, 4], [9, 4, 5, 3, 2, 8]])


@torch.no_grad()
def test_the_parts_of_fused_maps_are_those_of_separate_ones():
    phi = Phi3ForCausalLM(Phi3Config(**TEXT, pad_token_id=0, rms_norm_eps=1e-6)).eval()
    randomise(phi)
    weights, sites = phi.state_dict(), find_sites(phi)
    for attention, ffn in zip(sites.attention, sites.ffn, strict=True):
        assert attention.fused and attention.kv_heads == TEXT["num_key_value_heads"] and attention.causal
        parts = {"self_attn.q": attention.q, "self_attn.k": attention.k, "self_attn.v": attention.v}
        for name, part in {**parts, "mlp.gate": ffn.gate, "mlp.up": ffn.up}.items():
            whole = weights[f"{part.path}.weight"]
            weights[f"{attention.block}.{name}_proj.weight"] = whole[part.start : part.start + part.width]
        del weights[f"{attention.q.path}.weight"], weights[f"{ffn.up.path}.weight"]
    llama = LlamaForCausalLM(LlamaConfig(**TEXT, pad_token_id=0, rms_norm_eps=1e-6)).eval()
    llama.load_state_dict(weights)
    torch.testing.assert_close(phi(IDS).logits, llama(IDS).logits, rtol=0, atol=1e-5)
