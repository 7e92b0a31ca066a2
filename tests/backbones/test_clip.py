"""The dual encoder: equal to the stock model, either side alone, conditions, adapters that load on the stock model."""

import peft
import pytest
import torch
from transformers import CLIPModel, SiglipModel

from mmpeft_ds import RoutedLoraConfig
from mmpeft_ds.backbones.clip.backbone import ENTRY, Options
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods import get
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.condition import Condition, conditioned
from tests.helpers.models import tiny_clip
from tests.helpers.packs import packed

STOCK = {"clip": CLIPModel, "siglip": SiglipModel}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: tiny_clip.write(tmp_path_factory.mktemp(family), family) for family in STOCK}


def made(folders, family="clip", **options):
    backbone = ENTRY(Options(folders[family], **options), None)
    backbone.check()
    return backbone, backbone.build().eval()


def attached(base, name, **options):
    """A PeftModel as the engine makes it, every weight of the adapter other than 0."""
    method = get(name)
    model = method.attach(method.prepare(method.Config(**options), base, find_sites(base)), base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def without_gradient(model, inputs):
    """Names of the trained parameters that the similarities of all pairs do not reach."""
    out = model(**inputs)
    (out.text_features @ out.image_features.T).square().sum().backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def image(seed):
    return torch.randint(0, 256, (3, 9, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch(backbone, *samples):
    return packed(backbone, image, samples)


PAIRS = [([1], ["a red circle"]), ([2], ["the big blue square", "what shape is it"]), ([3, 4], ["round"])]


@pytest.mark.parametrize("family", STOCK)
def test_it_is_the_stock_model(folders, family):
    backbone, model = made(folders, family)
    stock = STOCK[family].from_pretrained(folders[family]).eval()
    packed = batch(backbone, *PAIRS)
    with torch.no_grad():
        inputs = backbone.inputs(packed)
        got = model(**inputs)
        want = stock(**{k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "pixel_values")})
    assert got.image_features.shape == (4, tiny_clip.SHARED) and got.text_features.shape == (4, tiny_clip.SHARED)
    torch.testing.assert_close(got.image_features, want.image_embeds)
    torch.testing.assert_close(got.text_features, want.text_embeds)
    similarity = got.text_features @ got.image_features.T * got.logit_scale
    if got.logit_bias is not None:
        similarity = similarity + got.logit_bias
    torch.testing.assert_close(similarity, want.logits_per_text)


def test_pixels_are_normalised_as_the_checkpoint_was_trained(folders):
    backbone, _ = made(folders)
    packed = batch(backbone, ([1], ["a"]))
    assert packed.images["pixel_values"].dtype == torch.uint8
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (backbone._pixels["mean"], backbone._pixels["std"]))
    want = (packed.images["pixel_values"].float() / 255 - mean) / std
    torch.testing.assert_close(backbone.inputs(packed)["pixel_values"], want)
    middle = batch(backbone, ([1], ["a"])).images["pixel_values"]
    stretched = ENTRY(Options(folders["clip"], fit="stretch"), None)
    assert not torch.equal(middle, batch(stretched, ([1], ["a"])).images["pixel_values"])


@pytest.mark.parametrize("family", STOCK)
def test_either_side_alone_gives_its_own_features(folders, family):
    backbone, model = made(folders, family)
    with torch.no_grad():
        both = model(**backbone.inputs(batch(backbone, PAIRS[0])))
        texts = model(**backbone.inputs(batch(backbone, ([], PAIRS[0][1]))))
        images = model(**backbone.inputs(batch(backbone, (PAIRS[0][0], []))))
    assert texts.image_features is None and images.text_features is None
    torch.testing.assert_close(texts.text_features, both.text_features)
    torch.testing.assert_close(images.image_features, both.image_features)


def test_features_are_unit_vectors_in_float32_also_in_a_half_precision_base(folders):
    backbone = ENTRY(Options(folders["clip"]), None)
    backbone.dtype = torch.bfloat16
    with torch.no_grad():
        got = backbone.build()(**backbone.inputs(batch(backbone, *PAIRS)))
    for features in (got.image_features, got.text_features):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))


def test_a_prompted_text_is_read_whole(folders):
    backbone, _ = made(folders)
    one, other = backbone.collate_texts([Prompted("a red", "circle")]), backbone.collate_texts(["a red circle"])
    assert torch.equal(one["input_ids"], other["input_ids"])


def test_long_texts_keep_their_end_token(folders):
    backbone, _ = made(folders, max_text_length=5)
    ids = backbone.collate_texts(["a red circle is it a blue square"])["input_ids"]
    assert ids.shape == (1, 5) and ids[0, -1] == tiny_clip.VOCABULARY["[EOS]"]


def test_lora_that_siglips_pooling_head_would_never_read_is_refused_and_trains_without_it(folders):
    """`nn.MultiheadAttention` reads the weight of its out_proj and does not call the module."""
    backbone, base = made(folders, "siglip")
    inputs = backbone.inputs(batch(backbone, *PAIRS))
    config = peft.LoraConfig(target_modules=["q_proj", "out_proj"], r=2, init_lora_weights=False)
    idle = without_gradient(peft.get_peft_model(base, config), inputs)
    assert len(idle) == 2 and all("head.attention.out_proj" in name for name in idle), "peft attaches it all the same"
    with pytest.raises(BadInput, match=r"exclude_modules: \[head.attention.out_proj\]") as caught:
        attached(made(folders, "siglip")[1], "lora", target_modules=["q_proj", "out_proj"])
    assert "\n" not in str(caught.value)
    left_out = dict(target_modules=["q_proj", "out_proj"], exclude_modules=["head.attention.out_proj"], r=2)
    assert without_gradient(attached(made(folders, "siglip")[1], "lora", **left_out), inputs) == []


def test_lora_around_the_whole_attention_of_the_pooling_head_is_no_fault(folders):
    backbone, base = made(folders, "siglip")
    model = attached(base, "lora", target_modules=["head.attention"], r=2)
    assert without_gradient(model, backbone.inputs(batch(backbone, *PAIRS))) == []


def test_trained_biases_leave_out_what_the_pooling_head_never_calls(folders):
    backbone, base = made(folders, "siglip")
    model = attached(base, "bitfit", biases=["vision_model.*"])
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any(".head.mlp." in n for n in names) and not any("head.attention" in n for n in names)
    assert without_gradient(model, backbone.inputs(batch(backbone, *PAIRS))) == []


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("family", STOCK)
def test_an_adapter_trains_either_tower_and_loads_on_the_stock_model(folders, family, tower, tmp_path):
    backbone, base = made(folders, family)
    inputs = backbone.inputs(batch(backbone, *PAIRS))
    frozen = base(**inputs)
    targets = {p.path for s in find_sites(base).attention if s.modality == tower for p in (s.q, s.v)}
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    out = model(**inputs)
    (out.text_features @ out.image_features.T).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).text_features, frozen.text_features)
    other = {"text": "vision_model", "image": "text_model"}[tower]
    assert other in backbone.frozen_prefix(model.get_base_model())
    model.save_pretrained(tmp_path)
    stock = peft.PeftModel.from_pretrained(STOCK[family].from_pretrained(folders[family]), tmp_path).eval()
    stock_inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "pixel_values")}
    torch.testing.assert_close(stock(**stock_inputs).text_embeds, out.text_features)
    torch.testing.assert_close(stock(**stock_inputs).image_embeds, out.image_features)


def test_texts_can_be_routed_on_the_mean_image_of_their_slot(folders):
    backbone, base = made(folders, condition="pooled")
    method, config = get("routed_lora"), RoutedLoraConfig(route="mul", r=2)
    method.check(config, find_sites(base), backbone.condition_width)
    model = peft.get_peft_model(base, config)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    with torch.no_grad():
        packed = batch(backbone, *PAIRS)
        together = model(**backbone.inputs(packed)).text_features
        alone = torch.cat([model(**backbone.inputs(batch(backbone, pair))).text_features for pair in PAIRS])
        torch.testing.assert_close(together, alone)
        blind = model(**backbone.inputs(batch(backbone, *[([], texts) for _, texts in PAIRS]))).text_features
        assert (together - blind).abs().amax(1).min() > 1e-4
        with model.disable_adapter():
            frozen = model(**backbone.inputs(packed)).text_features
        assert (blind - frozen).abs().max() < 1e-6, "without an image the route is closed"
        own = Condition(torch.ones(4, 1, tiny_clip.SHARED))
        with conditioned(own):
            assert not torch.allclose(model(**backbone.inputs(packed)).text_features, together)


def test_without_a_condition_a_routed_method_is_refused(folders):
    backbone, base = made(folders)
    with pytest.raises(BadInput, match="condition"):
        get("routed_lora").check(RoutedLoraConfig(route="mul"), find_sites(base), backbone.condition_width)


def test_recomputed_layers_see_the_condition_of_their_forward(folders):
    backbone, base = made(folders, condition="pooled")
    model = peft.get_peft_model(base, RoutedLoraConfig(route="mul", r=2))
    inputs = backbone.inputs(batch(backbone, *PAIRS))

    def gradients():
        model.zero_grad()
        model.train()
        model(**inputs).text_features[:, 0].sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    assert plain and plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


def test_random_weights_are_the_same_every_time_and_on_meta_nothing_is_allocated(folders):
    backbone, first = made(folders, random_weights=True)
    second = backbone.build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    _, trained = made(folders)
    assert not torch.equal(first.text_projection.weight, trained.text_projection.weight)
    assert {p.device.type for p in backbone.build(on_meta=True).parameters()} == {"meta"}


@pytest.mark.parametrize(
    "family, options, said",
    [
        ("clip", {"image_size": 9}, "image_size"),
        ("clip", {"max_text_length": 13}, "max_text_length"),
        ("siglip", {"max_text_length": 6}, "SigLIP"),
    ],
)
def test_impossible_options_are_refused_in_one_line(folders, family, options, said):
    with pytest.raises(BadInput, match=said) as error:
        made(folders, family, **options)
    assert "\n" not in str(error.value)


def test_a_model_of_another_family_is_refused(tmp_path):
    from tests.helpers.models import tiny_towers

    with pytest.raises(BadInput, match="family 'bert'"):
        made({"clip": tiny_towers.write_text(tmp_path, "bert")})
    with pytest.raises(BadInput, match="no directory"):
        made({"clip": str(tmp_path / "nowhere")})
