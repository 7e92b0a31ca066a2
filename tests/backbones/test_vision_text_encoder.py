"""The composed vision-text encoder: wiring, options, modes, refusals."""

import copy
import dataclasses

import peft
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModel, RobertaConfig, ViTConfig

import mmpeft_ds
from mmpeft_ds import methods
from mmpeft_ds.backbones.common import packaged
from mmpeft_ds.backbones.vision_text_encoder.backbone import ENTRY, Options
from mmpeft_ds.backbones.vision_text_encoder.model import VisionTextEncoder, VisionTextEncoderConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites.condition import current
from tests.helpers.models import tiny_towers
from tests.helpers.models.tiny_composed_encoder import LABELS, entry, inputs, write_towers


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return write_towers(tmp_path_factory.mktemp("towers"))


@pytest.mark.parametrize(
    "feature, norm", [("pooler", True), ("cls", True), ("cls", False), ("mean", True), ("mean", False)]
)
@pytest.mark.parametrize("family", tiny_towers.VISION)
def test_features_are_those_of_the_stock_tower(towers, family, feature, norm):
    if family == "siglip" and feature == "cls":
        pytest.skip("SigLIP has no class token")
    backbone = entry(towers, family, vision_feature=feature, vision_norm=norm)
    backbone.check()
    batch = inputs(backbone)
    stock = AutoModel.from_pretrained(towers[family]).eval()
    with torch.no_grad():
        mean, std = (torch.tensor(backbone._pixels[k]).view(3, 1, 1) for k in ("mean", "std"))
        out = stock((batch["pixel_values"] / 255 - mean) / std, output_hidden_states=True)
        last = out.hidden_states[-1]
        if norm:
            last = (stock.post_layernorm if family in ("clip", "siglip") else stock.layernorm)(last)
        patches = last if family == "siglip" else last[:, 1:]
        want = {"pooler": out.pooler_output, "cls": last[:, 0], "mean": patches.mean(1)}[feature]
        got = backbone.build()(**batch).image_features
    torch.testing.assert_close(got[:, 0], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.build_vision()(batch), want, atol=1e-5, rtol=1e-5)


def test_the_first_layers_give_the_hidden_state_of_the_whole_tower(towers):
    backbone = entry(towers, "dinov2", vision_layers=2, vision_feature="cls", vision_norm=False)
    batch = inputs(backbone)
    whole = entry(towers, "dinov2", vision_feature="cls").build().vision_model
    model = backbone.build()
    assert len(model.vision_model.encoder.layer) == 2
    with torch.no_grad():
        pixels = model.pixel_norm(batch["pixel_values"])
        want = whole(pixels, output_hidden_states=True).hidden_states[2][:, 0]
        torch.testing.assert_close(model(**batch).image_features[:, 0], want)


@pytest.mark.parametrize("prefix", ["none", "pooled", "tokens"])
@pytest.mark.parametrize("condition", ["none", "pooled", "tokens"])
@pytest.mark.parametrize("head_input", ["pooler", "raw", "mean"])
def test_every_wiring_runs_and_the_image_matters_where_it_is_used(towers, prefix, condition, head_input):
    backbone = entry(towers, text="bert", prefix=prefix, condition=condition, head_input=head_input, head_layers=1)
    backbone.check()
    batch = inputs(backbone)
    config = mmpeft_ds.RoutedLoraConfig(r=4, route="mul" if condition == "pooled" else "none")
    model = peft.get_peft_model(backbone.build(), config)
    for name, parameter in model.named_parameters():
        if name.endswith("B"):
            torch.nn.init.normal_(parameter)
    other = {**batch, "pixel_values": 255 - batch["pixel_values"]}
    with torch.no_grad():
        change = (model(**batch).logits - model(**other).logits).abs().max()
    assert (change > 1e-5) == (prefix != "none" or condition == "pooled")


@pytest.mark.parametrize("prefix", ["none", "pooled", "tokens"])
@pytest.mark.parametrize("condition, route", [("none", "none"), ("pooled", "mul"), ("tokens", "matmul1")])
@pytest.mark.parametrize("text", ["bert", "roberta"])
def test_in_every_wiring_a_text_with_or_without_images_is_answered_as_if_alone(towers, text, prefix, condition, route):
    backbone = entry(towers, text=text, prefix=prefix, condition=condition, head_input="raw")
    model = peft.get_peft_model(backbone.build(), mmpeft_ds.RoutedLoraConfig(r=4, route=route))
    for name, parameter in model.named_parameters():
        if name.endswith("B"):
            torch.nn.init.normal_(parameter)
    pixels = inputs(backbone, images=3)["pixel_values"]
    seen, unseen = "is it red", "what color is there big"

    @torch.no_grad()
    def ask(texts, images):
        images = {"pixel_values": pixels} if images else {}
        owner = torch.zeros(3 if images else 0, dtype=torch.int64)
        place = dict(image_owner=owner, text_owner=torch.arange(len(texts)), num_slots=len(texts))
        return model(**backbone.collate_texts(texts), **images, **place).logits

    both = ask([seen, unseen], images=True)
    torch.testing.assert_close(both[:1], ask([seen], images=True), atol=1e-6, rtol=0)
    torch.testing.assert_close(both[1:], ask([unseen], images=False), atol=1e-6, rtol=0)


def test_the_embedding_module_is_applied_twice_only_if_asked(towers):
    batch = inputs(entry(towers))
    once = entry(towers, embed_twice=False).build()
    twice = entry(towers).build()
    once.head.load_state_dict(twice.head.state_dict())
    with torch.no_grad():
        assert (once(**batch).logits - twice(**batch).logits).abs().max() > 1e-3
        # RoBERTa's own path for input embeddings, with one image a text: sequential positions over prefix and text
        prefix = twice.encode_images(batch["pixel_values"])[:, 0]
        e = twice.text_model.embeddings(batch["input_ids"][:2])
        mask = torch.cat([torch.ones(2, 1), batch["attention_mask"][:2]], 1)
        stock = twice.text_model(inputs_embeds=torch.cat([prefix[:, None], e], 1), attention_mask=mask)
        got = twice(
            **{
                **batch,
                "input_ids": batch["input_ids"][:2],
                "attention_mask": batch["attention_mask"][:2],
                "text_owner": None,
            },
            return_last_hidden_state=True,
        )
    torch.testing.assert_close(got.last_hidden_state, stock.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.logits, twice.head(stock.pooler_output), atol=1e-5, rtol=1e-5)


def test_the_condition_is_the_mean_over_the_images_of_a_slot_and_zero_without(towers):
    model = entry(towers).build()
    seen = []
    hook = model.text_model.encoder.register_forward_pre_hook(lambda *_: seen.append(current().tokens))
    batch = inputs(entry(towers))
    with torch.no_grad():
        out = model(**{**batch, "image_owner": torch.tensor([1, 1])})
    hook.remove()
    torch.testing.assert_close(seen[0][1], out.image_features[:, 0].mean(0, keepdim=True))
    assert not seen[0][0].any() and current() is None


def test_stored_features_replace_pixels_exactly(towers):
    backbone = entry(towers, feature_norm="zscore")
    backbone.use_statistics({"mean": [0.5] * 16, "std": [2.0] * 15 + [0.0]})
    model, batch = backbone.build(), inputs(backbone)
    with torch.no_grad():
        seen = []
        model.text_model.encoder.register_forward_pre_hook(lambda *_: seen.append(current().tokens))
        out = model(**batch)
        raw = backbone.build_vision()(batch)
        assert torch.equal(out.image_features[:, 0], raw)
        # a dimension that never varied is centred only
        want = (raw - 0.5) / torch.tensor([2.0] * 15 + [1.0])
        torch.testing.assert_close(seen[0][:, 0], want[batch["text_owner"]])
        pixels = batch.pop("pixel_values")
        assert pixels.dtype == torch.uint8
        assert torch.equal(model(**batch, **backbone.collate_images(list(raw))).logits, out.logits)
    with pytest.raises(ValueError, match="all tokens"):
        entry(towers, prefix="tokens").build()(**batch, image_features=raw)


def test_the_vision_tower_runs_once_per_image_without_autograd(towers):
    model = entry(towers).build()
    seen = []
    model.vision_model.register_forward_hook(
        lambda m, a, k, out: seen.append((len(k["pixel_values"]), out[0].requires_grad)), with_kwargs=True
    )
    model(**inputs(entry(towers)))
    assert seen == [(2, False)]


def test_frozen_towers_stay_in_eval_mode_but_adapters_and_head_follow(towers):
    model = peft.get_peft_model(
        entry(towers, head_dropout=0.5).build(), mmpeft_ds.RoutedLoraConfig(r=4, dropout=0.5, modules_to_save=["head"])
    ).train()
    base = model.get_base_model()
    dropouts = [
        m for t in (base.vision_model, base.text_model) for m in t.modules() if isinstance(m, torch.nn.Dropout)
    ]
    assert dropouts and not any(m.training for m in dropouts)
    assert base.head.modules_to_save["default"].dropout.training
    adapters = [m for n, m in base.named_modules() if n.endswith("routed_lora.default")]
    assert adapters and all(m.training for m in adapters)
    assert not any(m.training for m in model.eval().modules())


def test_train_dropout_drops_in_the_text_encoder_only(towers):
    backbone = entry(towers)
    backbone.train_dropout = True
    model = backbone.build().train()
    assert model.text_model.embeddings.dropout.training and not model.vision_model.training


def test_recomputed_layers_see_the_condition_of_their_own_forward(towers):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = peft.get_peft_model(entry(towers).build(), mmpeft_ds.RoutedLoraConfig(r=4, route="mul"))
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(parameter)
        calls = []
        layer = model.get_base_model().text_model.encoder.layer[0].attention
        layer.register_forward_hook(lambda *_: calls.append(1))
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        model.train()
        batch = inputs(entry(towers))
        other = {**batch, "pixel_values": 255 - batch["pixel_values"]}
        # two forwards before one backward: each must be recomputed under its own image
        (model(**batch).logits.square().sum() + model(**other).logits.square().sum()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(calls)

    (plain, once), (recomputed, twice) = gradients(False), gradients(True)
    assert (once, twice) == (2, 4)  # else nothing was recomputed
    assert any("routed_lora" in n for n in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


def test_the_random_pooler_of_a_masked_language_model_is_the_same_in_every_run(towers):
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = entry(towers, text="roberta_without_pooler").build()
        weights.append((model.text_model.pooler.dense.weight, model.head.out.weight))
    assert torch.equal(weights[0][0], weights[1][0])
    assert not torch.equal(weights[0][1], weights[1][1])  # the head follows the run's seed


def test_unused_poolers_are_not_built(towers):
    model = entry(towers, vision_feature="cls", head_input="raw").build()
    assert model.vision_model.pooler is None and model.text_model.pooler is None


def test_a_head_starts_normal_with_deviation_0_02_and_zero_bias(towers):
    model = entry(towers, head_multiple=64).build()
    assert model.head.dense.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.head.out.bias.any() and (model.head.norm.weight == 1).all()


def test_a_bfloat16_base_keeps_statistics_exact_and_a_float32_head(towers):
    backbone = entry(towers, feature_norm="zscore")
    backbone.dtype = torch.bfloat16
    backbone.use_statistics({"mean": [100.001] * 16, "std": [1e-3] * 16})
    model = backbone.build()
    model.head.float()
    assert model.text_model.dtype == torch.bfloat16
    assert model.feature_norm(torch.full((1, 1, 16), 100.002)).mean().item() == pytest.approx(1.0, abs=0.05)
    assert model(**inputs(backbone)).logits.dtype == torch.float32


def test_the_statistics_key_follows_weights_transform_and_feature(towers):
    key = entry(towers).statistics_key()
    assert key == entry(towers, text="bert", prefix="none", head_layers=1).statistics_key()
    for change in ({"vision_feature": "cls"}, {"vision_layers": 2}, {"fit": "crop"}, {"vision": "dinov2"}):
        assert entry(towers, **change).statistics_key() != key
    backbone = entry(towers)
    backbone._vision_config.hidden_act = "relu"  # the same weights compute something else
    assert backbone.statistics_key() != key and backbone.statistics_key().split("-")[0] == key.split("-")[0]


def test_the_transform_resizes_and_names_the_least_size_it_needs(towers):
    square = entry(towers).image_transform(True)
    assert square.min_size == (8, 8)
    wide = torch.zeros(3, 10, 30, dtype=torch.uint8)
    wide[:, :, :10] = 255
    assert square(wide, None).shape == (3, 8, 8) and square(wide, None).any()
    assert not dataclasses.replace(square, fit="crop")(wide, None).any()  # the centre is black


@pytest.mark.parametrize(
    "change, says",
    [
        ({"vision": "wide"}, "32 wide and text .* 16"),
        ({"image_size": 10}, "multiple of the patch size 4"),
        ({"vision_layers": 9}, "has 3 layers"),
        ({"vision_norm": False}, "pooler reads the normed"),
        ({"vision": "siglip", "vision_feature": "cls"}, "no class token"),
        ({"max_text_length": 99}, "positions"),
        ({"max_text_length": 2}, "at least 3"),
        ({"vision": "bert"}, "no vision tower"),
        ({"text": "vit"}, "no text tower"),
        ({"num_labels": 1}, "3 labels"),
        ({"head_layers": 3}, "1 or 2"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(towers, change, says):
    options = {"image_size": 8, **change}
    options |= {k: towers[options.get(k, d)] for k, d in (("vision", "vit"), ("text", "roberta"))}
    with pytest.raises(BadInput, match=says) as error:
        ENTRY(Options(**options), LABELS).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/dir", "packaged:nothing", "no-such/model-on-the-hub"])
def test_a_tower_that_is_not_there_is_refused_in_one_line(towers, name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # otherwise huggingface_hub tries for 23 s
    with pytest.raises(BadInput, match="backbone.vision") as error:
        ENTRY(Options(vision=name, text=towers["bert"], image_size=8), LABELS).check()
    assert "\n" not in str(error.value)


def test_other_refusals(towers):
    with pytest.raises(BadInput, match="num_labels"):
        ENTRY(Options(vision=towers["vit"], text=towers["bert"], image_size=8), None).check()
    with pytest.raises(BadInput, match="feature_stats"):
        entry(towers, feature_norm="zscore").build()
    with pytest.raises(BadInput, match="width 3"):
        entry(towers).use_statistics({"mean": [0.0] * 3, "std": [1.0] * 3})


def test_a_checkpoint_without_the_weights_it_needs_is_refused(towers, tmp_path):
    model = AutoModel.from_pretrained(towers["vit"], add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="pooler.dense"):
        ENTRY(Options(vision=str(tmp_path), text=towers["bert"], image_size=8), LABELS).build()


def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MMPEFT_MODELS", str(tmp_path))
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    for name in packaged.names():
        with pytest.raises(BadInput, match="pip install"):
            packaged.ensure(name)


def test_copies_and_flags(towers):
    model = entry(towers).build()
    twin = copy.deepcopy(model)
    batch = inputs(entry(towers))
    assert torch.equal(twin.train()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    "size, rank, total, peft_count, norm, bias, head",
    [
        ("large", 128, 21_244_985, 12_582_912, 98_304, 49_152, 8_514_617),
        ("large", 64, 14_953_529, 6_291_456, 98_304, 49_152, 8_514_617),
        ("base", 128, 10_767_417, 4_718_592, 36_864, 18_432, 5_993_529),
    ],
)
def test_published_parameter_counts_on_meta(size, rank, total, peft_count, norm, bias, head):
    width, layers, heads = {"large": (1024, 24, 16), "base": (768, 12, 12)}[size]
    common = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width)
    text = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **common)
    config = VisionTextEncoderConfig(vision_config=ViTConfig(**common), text_config=text, num_labels=3129)
    with torch.device("meta"):
        base = VisionTextEncoder(config)
        model = peft.get_peft_model(
            base,
            mmpeft_ds.RoutedLoraConfig(
                r=rank, alpha=rank, train_bias=True, train_norms=True, modules_to_save=["head"]
            ),
        )
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    kinds = methods.get("routed_lora").kinds(list(sizes))
    got = {kind: sum(sizes[n] for n in names) for kind, names in kinds.items()}
    assert got == {"peft": peft_count, "norm": norm, "bias": bias, "head": head}
    assert sum(sizes.values()) == total
