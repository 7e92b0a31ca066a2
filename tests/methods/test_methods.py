"""Every registered method: the contract, its checks on sites, and parameter counts of the published models."""

import dataclasses

import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2Model, RobertaConfig, RobertaModel, ViTConfig, ViTModel

import mmpeft_ds
from mmpeft_ds import RoutedLoraConfig, methods
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.condition import MEDIA, QUESTION, Condition, conditioned
from tests.helpers import plain_methods
from tests.helpers.models import tiny_feature_model
from tests.helpers.models.tiny_stock import IDS, bert, gpt2, image


# moka takes causal language models alone
@pytest.mark.parametrize(
    ("name", "build"),
    [(n, b) for n in plain_methods.names(heads=False) for b in (bert, gpt2) if (n, b) != ("moka", bert)],
)
def test_every_method_attaches_trains_and_sorts_its_parameters(name, build, tmp_path):
    method = methods.get(name)
    assert issubclass(method, SiteMethod)
    assert methods.of(method.Config()) is method
    model = build()
    sites = find_sites(model)
    config = method.Config()
    method.check(config, sites, 16)
    wrapped = peft.get_peft_model(model, method.prepare(config, model, sites))
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    kinds = method.kinds(trained)
    assert sorted(n for names in kinds.values() for n in names) == sorted(trained)
    assert set(kinds) == {"peft", "norm", "bias", "head"} and trained and not kinds["head"]
    assert all(method.prefix in n for n in trained)
    published = Condition(image(), kinds=torch.tensor([[MEDIA, QUESTION]]).expand(2, -1))
    with conditioned(published):
        wrapped(IDS)[0].square().sum().backward()
        out = wrapped(IDS)[0]
    assert any(p.grad is not None and p.grad.any() for p in wrapped.parameters())
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(), tmp_path)
    with conditioned(published):
        assert torch.equal(again(IDS)[0], out)


@pytest.mark.parametrize("name", plain_methods.names(heads=True))
def test_every_head_attaches_trains_and_sorts_its_parameters(name, tmp_path):
    method = methods.get(name)
    assert issubclass(method, SiteMethod)
    assert methods.of(method.Config()) is method
    config, z = method.Config(), tiny_feature_model.rows()
    given = {"image_features": z.image, "text_features": z.text}
    model = tiny_feature_model.model()
    if name in LIVE_TEXT:
        with pytest.raises(BadInput, match=name):
            method.check(config, find_sites(model), None)
        return
    method.check(config, find_sites(model), None)
    with torch.no_grad():
        before = model(**given).logits
    wrapped = peft.get_peft_model(model, method.prepare(config, model, find_sites(model)))
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    kinds = method.kinds(trained)
    assert sorted(kinds["peft"]) == sorted(trained) and bool(trained) != config.gradient_free
    assert all(method.prefix in n for n in trained)
    assert all(p.dtype == torch.float32 for p in wrapped.parameters() if p.requires_grad)
    out = wrapped(**given)
    assert out.logits.shape == (7, 5) and out.logits.isfinite().all()
    if trained and not config.gradient_free:
        loss = sum(w * cross_entropy(t, torch.arange(7) % 5) for w, t in out.terms or [(1.0, out.logits)])
        loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in wrapped.parameters())
    with torch.no_grad():
        for p in wrapped.parameters():
            p += 0.01 * p.requires_grad
        out = wrapped.eval()(**given).logits
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(**given).logits, before)
        wrapped.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_feature_model.model(), tmp_path).eval()
        assert torch.equal(again(**given).logits, out)
    with pytest.raises(BadInput, match="needs a model of features"):
        method.check(config, find_sites(bert()), None)


# learn inside the towers, so they need some; see their own tests
LIVE_TEXT = {"coop", "mmrl"}


def test_registered_with_peft_and_exported():
    for name in plain_methods.names():
        method = methods.get(name)
        assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type] is method.Config
        assert getattr(mmpeft_ds, method.Config.__name__) is method.Config
    with pytest.raises(AttributeError):
        _ = mmpeft_ds.NoSuchConfig
    with pytest.raises(BadInput, match="Did you mean 'routed_lora'"):
        methods.get("routed_lor")


@pytest.mark.parametrize("name", plain_methods.names())
def test_every_field_has_its_help(name):
    config = methods.get(name).Config
    inherited = {f.name for f in dataclasses.fields(peft.PeftConfig)}
    own = [f for f in dataclasses.fields(config) if f.name not in inherited]
    assert own
    if config.__module__.startswith("mmpeft_ds"):
        assert [f.name for f in own if not f.metadata.get("help")] == []


def test_checks_work_from_sites_and_a_width_alone():
    with torch.device("meta"):
        sites = find_sites(bert())
    method = methods.get("routed_lora")
    method.check(RoutedLoraConfig(), sites, 16)
    with pytest.raises(BadInput, match="width 16 and the condition has 24"):
        method.check(RoutedLoraConfig(), sites, 24)
    with pytest.raises(BadInput, match="needs a condition"):
        method.check(RoutedLoraConfig(), sites, None)
    for free in (RoutedLoraConfig(route="none"), RoutedLoraConfig(condition="self")):
        method.check(free, sites, None)


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))


def test_the_text_tower_is_the_default_and_any_other_can_be_named():
    def trained(model, **options):
        wrapped = peft.get_peft_model(model, RoutedLoraConfig(route="none", **options))
        names = [n.removeprefix("base_model.model.") for n, p in wrapped.named_parameters() if p.requires_grad]
        return {n.split(".")[0] for n in names}

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.eye, self.mouth = vit(), bert()

    assert trained(Pair()) == {"mouth"}
    assert trained(Pair(), tower="image") == {"eye"}
    assert trained(Pair(), tower="eye") == {"eye"}
    assert trained(vit()) == {"layers"}
    two = nn.ModuleDict({"a": bert(), "b": bert()})
    with pytest.raises(BadInput, match="several towers"):
        trained(two)


def test_norms_can_be_named_by_pattern():
    patterns = ["embeddings.LayerNorm", "*.1.output.LayerNorm"]
    wrapped = peft.get_peft_model(bert(), RoutedLoraConfig(train_norms=patterns))
    norms = methods.get("routed_lora").kinds([n for n, p in wrapped.named_parameters() if p.requires_grad])["norm"]
    assert {n.split(".routed_lora_norm")[0].removeprefix("base_model.model.") for n in norms} == {
        "embeddings.LayerNorm",
        "encoder.layer.1.output.LayerNorm",
    }


def roberta(size: str) -> nn.Module:
    wide = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return RobertaModel(RobertaConfig(vocab_size=50265, **(wide if size == "large" else {})))


def gpt(size: str) -> nn.Module:
    return GPT2Model(GPT2Config(**({"n_embd": 1024, "n_layer": 24, "n_head": 16} if size == "medium" else {})))


@pytest.mark.parametrize(
    ("build", "size", "options", "counts"),
    [
        (roberta, "large", {"r": 128}, (12_582_912, 98_304, 49_152)),
        (roberta, "large", {"r": 64}, (6_291_456, 98_304, 49_152)),
        (roberta, "large", {"r": 128, "variant": "split", "train_bias": False}, (9_830_400, 98_304, 0)),
        (roberta, "base", {"r": 128}, (4_718_592, 36_864, 18_432)),
        (gpt, "medium", {"r": 128}, (12_582_912, 98_304, 73_728)),
        (gpt, "small", {"r": 128}, (4_718_592, 36_864, 27_648)),
    ],
)
def test_parameter_counts_of_the_published_models(build, size, options, counts):
    with torch.device("meta"):
        wrapped = peft.get_peft_model(
            build(size), RoutedLoraConfig(**{"train_bias": True, "train_norms": True, **options})
        )
    sizes = {n: p.numel() for n, p in wrapped.named_parameters() if p.requires_grad}
    kinds = methods.get("routed_lora").kinds(list(sizes))
    assert tuple(sum(sizes[n] for n in kinds[k]) for k in ("peft", "norm", "bias")) == counts
    assert not kinds["head"]
