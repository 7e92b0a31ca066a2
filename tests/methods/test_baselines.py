"""The baselines: outputs, trained parameters, and refusals."""

import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import BartConfig, BartModel, BlipConfig, BlipForConditionalGeneration

from mmpeft_ds import AdapterConfig, BitFitConfig, LayerNormConfig, UniAdapterConfig, methods
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites import find_sites
from tests.helpers.models.tiny_stock import bert, fill, gpt2
from tests.helpers.models.tiny_zoo import ZOO, output

ACTIVATION = {"bert": F.gelu, "gpt2": lambda x: F.gelu(x, approximate="tanh")}


def wrap(family, config, filled=True):
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(ZOO[family].build().double(), config)
    return fill(wrapped, scale=0.3) if filled else wrapped


def count(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def names(model) -> list[str]:
    return [n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("style", ["sequential", "parallel"])
@pytest.mark.parametrize("kind", ["self", "ffn"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_an_adapter_adds_what_the_equation_says(family, kind, style):
    wrapped = wrap(family, AdapterConfig(r=3, style=style, after=[kind], scale=0.5, layers=[0]))
    base = wrapped.get_base_model()
    sites = find_sites(base)
    site = sites.ffn[0] if kind == "ffn" else sites.attention[0]
    layer, seen = base.get_submodule(site.end), {}
    first = base.get_submodule((site.up if kind == "ffn" else site.q).path)
    first.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    layer.base_layer.register_forward_hook(lambda m, a, out: seen.update(y=out))
    layer.register_forward_hook(lambda m, a, out: seen.update(out=out))
    output(wrapped, ZOO[family])
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    t = seen["y"] if style == "sequential" else seen["x"]
    want = seen["y"] + 0.5 * up(ACTIVATION[family](down(t)))
    torch.testing.assert_close(seen["out"], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("style", ["sequential", "parallel"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "blip", "llama", "dinov2"])
def test_an_adapter_starts_as_the_frozen_model_or_not(family, style):
    frozen = output(ZOO[family].build().double(), ZOO[family])
    near = wrap(family, AdapterConfig(r=3, style=style), filled=False)
    assert torch.equal(output(near, ZOO[family]), frozen)
    far = wrap(family, AdapterConfig(r=3, style=style, near_identity=False), filled=False)
    assert not torch.equal(output(far, ZOO[family]), frozen)
    output(far, ZOO[family]).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in far.parameters() if p.requires_grad)


def bart_base():
    with torch.device("meta"):
        half = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", 6), ("attention_heads", 12))}
        return BartModel(BartConfig(d_model=768, encoder_ffn_dim=3072, decoder_ffn_dim=3072, **half))


def test_the_single_adapter_of_vl_adapter_has_the_published_size():
    config = AdapterConfig(tower=["text"], r=96, activation="gelu_new", near_identity=False, train_norms=["*"])
    with torch.device("meta"):
        wrapped = peft.get_peft_model(bart_base(), config)
    kinds = methods.get("adapter").kinds(names(wrapped))
    sizes = {n.removeprefix("base_model.model."): p.numel() for n, p in wrapped.named_parameters()}
    assert sum(sizes[n] for n in kinds["peft"]) == 4_449_600
    assert sum(sizes[n] for n in kinds["norm"]) == 49_152
    assert len({n.split(".bottleneck_")[0] for n in kinds["peft"]}) == 30


def test_uni_adapter_shares_down_within_a_layer_over_all_towers():
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    with torch.device("meta"):
        blip = BlipForConditionalGeneration(BlipConfig(text_config=sizes, vision_config=sizes))
        wrapped = peft.get_peft_model(blip, UniAdapterConfig(r=512))
    down, up = 768 * 512 + 512, 512 * 768 + 768
    assert count(wrapped) == 12 * (down + 3 * up)  # 18.9 million: vision, text and cross

    one = wrap("blip", UniAdapterConfig(r=3, share="all"))
    downs = [n for n in names(one) if "_down." in n]
    assert len(downs) == 2 and all(n.startswith("vision_model.encoder.layers.0.") for n in downs)
    output(one, ZOO["blip"]).square().sum().backward()
    gradients = {n: p.grad for n, p in one.named_parameters() if p.requires_grad}
    assert all(g.abs().max() > 0 for g in gradients.values())
    # the shared one gets the sum of what every place would give it
    own = wrap("blip", AdapterConfig(r=3, tower=["text", "image"], after=["self", "cross"]), filled=False)
    shared, parameters = dict(one.named_parameters()), dict(own.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                wanted = name.replace("bottleneck_", "uni_adapter_")
                if "_down." in name:
                    wanted = "base_model.model." + next(d for d in downs if d.endswith(name.rpartition(".")[2]))
                parameter.copy_(shared[wanted])
    output(own, ZOO["blip"]).square().sum().backward()
    total = sum(p.grad for n, p in parameters.items() if "_down." in n and n.endswith("weight"))
    mine = next(g for n, g in gradients.items() if n.endswith("_down.default.weight"))
    torch.testing.assert_close(mine, total, rtol=1e-9, atol=1e-12)


def test_bitfit_trains_every_bias_of_the_layers_and_nothing_else():
    model = bert()
    biases = {n for n, _ in model.named_parameters() if n.startswith("encoder.") and n.endswith("bias")}
    wrapped = peft.get_peft_model(model, BitFitConfig())
    assert {n.replace(".bitfit_bias.default", "") for n in names(wrapped)} == biases
    some = peft.get_peft_model(bert(), BitFitConfig(biases=["*.query", "embeddings.LayerNorm"]))
    assert {n.split(".bitfit_bias")[0].rpartition(".")[2] for n in names(some)} == {"query", "LayerNorm"}
    assert len(names(some)) == 3


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_trained_biases_are_those_of_a_model_with_these_biases(family):
    wrapped = wrap(family, BitFitConfig(biases=["*"]))
    model = ZOO[family].build().double()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                name = name.removeprefix("base_model.model.").replace(".bitfit_bias.default", "")
                model.get_parameter(name).copy_(parameter)
    torch.testing.assert_close(output(wrapped, ZOO[family]), output(model, ZOO[family]), rtol=0, atol=1e-10)


def test_layer_norm_trains_the_norms_of_the_chosen_layers():
    wrapped = peft.get_peft_model(gpt2(), LayerNormConfig(layers=[1]))
    found = {n.split(".norm_tuning_norm")[0] for n in names(wrapped)}
    assert found == {"transformer.h.1.ln_1", "transformer.h.1.ln_2"} and len(names(wrapped)) == 4
    last = peft.get_peft_model(gpt2(), LayerNormConfig(norms=["*.ln_f"]))
    assert len(names(last)) == 2


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_pefts_own_take_both_halves_of_an_encoder_decoder(name):
    model, method = ZOO["bart"].build(), methods.get(name)
    wrapped = peft.get_peft_model(model, method.prepare(method.Config(), model, find_sites(model)))
    places = {n.rpartition(".lora_")[0] or n.rpartition(".ia3_")[0] for n in names(wrapped)}
    # q and v, or k and v, of 2 + 2 x 2 attention blocks; and fc2 of 4 layers
    assert len(places) == {"lora": 12, "ia3": 16}[name]


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        ("bert", lambda: AdapterConfig(r=0), "1 or more"),
        ("bert", lambda: AdapterConfig(style="beside"), "style"),
        ("bert", lambda: AdapterConfig(after=["cross"]), "no 'cross' sublayer"),
        ("bert", lambda: AdapterConfig(after=["self", "self"]), "each once"),
        ("bert", lambda: AdapterConfig(after=[]), "at least one"),
        ("bert", lambda: AdapterConfig(activation="gelv"), "activation"),
        ("bert", lambda: AdapterConfig(layers=[5]), "not in tower"),
        ("bert", lambda: AdapterConfig(train_norms=["*.nothing"]), "train_norms"),
        ("bert", lambda: AdapterConfig(r="64"), "r: expected an integer, got '64'"),
        ("bert", lambda: AdapterConfig(layers=1), "layers: expected a list"),
        ("bert", lambda: AdapterConfig(train_norms="*.LayerNorm"), "train_norms: expected true or false or a list"),
        ("bert", lambda: AdapterConfig(tower=[]), "tower: the list is empty"),
        ("bert", lambda: UniAdapterConfig(share="tower"), "share"),
        ("bert", lambda: UniAdapterConfig(tower="image"), "no tower"),
        ("bert", lambda: BitFitConfig(biases=["*.nothing"]), "biases"),
        ("bert", lambda: BitFitConfig(biases="*.query"), "biases: expected a list"),
        ("bert", lambda: BitFitConfig(biases=[]), "biases: the list is empty"),
        ("bert", lambda: BitFitConfig(biases=["*"], layers=[0]), "Leave out"),
        ("bert", lambda: LayerNormConfig(norms=["*.nothing"]), "norms"),
        ("bert", lambda: LayerNormConfig(norms=["*"], tower="text"), "Leave out"),
        ("llama", lambda: BitFitConfig(), "have none"),
        ("bart", lambda: AdapterConfig(), "several towers"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(family, config, says):
    with pytest.raises(BadInput, match=says) as refused:
        wrap(family, config())
    assert "\n" not in str(refused.value)
