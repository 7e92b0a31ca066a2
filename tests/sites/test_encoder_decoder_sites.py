"""Sites of encoder-decoder families: both towers, cross-attention, where a sublayer ends."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from mmpeft_ds.sites import find_sites

D, N = 16, 2


def bart(config=BartConfig, model=BartForConditionalGeneration):
    sizes = dict(vocab_size=23, d_model=D, encoder_layers=N, decoder_layers=N, encoder_ffn_dim=24, decoder_ffn_dim=32)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=4, max_position_embeddings=16)
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
    return model(config(**sizes, **heads, **ids, activation_function="gelu"))


def mbart():
    return bart(MBartConfig, MBartForConditionalGeneration)


def t5(act="relu"):
    ids = dict(pad_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=23, d_model=D, d_kv=4, d_ff=24, num_layers=N, num_heads=2, feed_forward_proj=act, **ids)
    )


MODELS = {
    "bart": (bart, "model.encoder", "model.decoder", False),
    "mbart": (mbart, "model.encoder", "model.decoder", True),
    "t5": (t5, "encoder", "decoder", True),
    "t5_gated": (lambda: t5("gated-gelu"), "encoder", "decoder", True),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_both_towers_and_their_cross_attention_are_found(name, device):
    build, encoder, decoder, pre_norm = MODELS[name]
    with torch.device(device):
        model = build()
    sites = find_sites(model)
    assert sites.towers == {encoder: "text", decoder: "text"}
    kinds = [(s.tower, s.layer, s.cross, s.causal) for s in sites.attention]
    encoders = [(encoder, i, False, False) for i in range(N)]
    assert kinds == encoders + [(decoder, i, *k) for i in range(N) for k in ((False, True), (True, False))]
    for site in sites.attention:
        for p in (site.q, site.k, site.v, site.out):
            linear = model.get_submodule(p.path)
            assert (linear.in_features, linear.out_features) == (p.in_width, p.width)
        assert model.get_submodule(site.q.path).in_features == site.in_width == D
        assert site.pre_norm == pre_norm and "norm" in type(model.get_submodule(site.norm)).__name__.lower()
        assert site.path.startswith(site.block) and site.block.startswith(site.tower)
    assert [(s.tower, s.layer) for s in sites.ffn] == [(t, i) for t in (encoder, decoder) for i in range(N)]
    for site in sites.ffn:
        assert model.get_submodule(site.up.path).in_features == model.get_submodule(site.down.path).out_features == D
        assert (site.gate is not None) == (name == "t5_gated")
    assert sites.ffn[0].activation == {"t5": "relu", "t5_gated": "gelu_new"}.get(name, "gelu")


@pytest.mark.parametrize("silenced", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_what_leaves_the_end_of_a_sublayer_is_all_that_it_adds_to_the_residual(name, silenced):
    model = MODELS[name][0]().eval()
    sites = find_sites(model)
    every = [*sites.attention, *sites.ffn]
    seen = {}
    for path in {s.block for s in every}:
        keep = lambda m, a, out, p=path: seen.update({p: (a[0], out[0] if isinstance(out, tuple) else out)})  # noqa: E731
        model.get_submodule(path).register_forward_hook(keep)
    for site in every if silenced else []:
        model.get_submodule(site.end).register_forward_hook(lambda m, a, out: torch.zeros_like(out))
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids)
        for path, (before, after) in seen.items():
            for site in every:  # with nothing added, only the norms of a post-norm block are left
                if site.block == path and not site.pre_norm:
                    before = model.get_submodule(site.norm)(before)
            assert torch.equal(before, after) == silenced
    assert len(seen) == 2 * N
