"""The composed dual encoder: the towers' own features, stored features, projections, temperature, saved whole."""

import dataclasses
import math

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, BertModel, CLIPVisionModel, Dinov2Model, ViTModel

from mmpeft_ds.backbones.clip import backbone as clip
from mmpeft_ds.backbones.dual_encoder.backbone import ENTRY, Options, StoredVectors
from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.engine.assembly.resolve import float32_heads
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.sites import find_sites
from mmpeft_ds.tasks.retrieval import task as retrieval
from tests.helpers.models import tiny_clip, tiny_towers

STOCK = {"vit": ViTModel, "dinov2": Dinov2Model, "clip": CLIPVisionModel}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("towers")
    made = {family: tiny_towers.write_vision(place / family, family, 24) for family in STOCK}
    return {**made, "bert": tiny_towers.write_text(place / "bert", "bert"), "roberta": tiny_towers.write_text(
        place / "roberta", "roberta", pooler=False
    )}  # fmt: skip


def made(folders, vision="vit", text="bert", dtype=torch.float32, **options):
    common = {"image_size": 8, "max_text_length": 19}
    if "model" not in options:
        common |= {"vision": folders[vision], "text": folders[text]}
    else:
        common.pop("image_size")
    backbone = ENTRY(Options(**{**common, **options}), None)
    backbone.dtype = dtype
    backbone.check()
    return backbone, backbone.build().eval()


def image(seed):
    return torch.randint(0, 256, (3, 9, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


PAIRS = [([1], ["a red circle"]), ([2], ["the big blue square", "what shape is it"]), ([3, 4], ["round"])]


def batch(backbone, *samples, stored=None):
    transform = backbone.image_transform(False)

    def sample(number, images, texts):
        pixels = [transform(image(n) if stored is None else stored[n]) for n in images]
        return Sample(str(number), 1.0, pixels, texts, [number] * len(texts))

    given = [sample(i, *one) for i, one in enumerate(samples)]
    collate = lambda t: {"pair_id": torch.tensor(t)}  # noqa: E731
    return pack(given, backbone.collate_images, backbone.collate_texts, collate)


@torch.no_grad()
def towers(folders, backbone, packed, vision):
    """What the stock towers say: outputs of the vision tower and of BERT."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (backbone._pixels["mean"], backbone._pixels["std"]))
    pixels = (packed.images["pixel_values"].float() / 255 - mean) / std
    seen = STOCK[vision].from_pretrained(folders[vision]).eval()(pixels, output_hidden_states=True)
    return seen, BertModel.from_pretrained(folders["bert"]).eval()(**packed.texts)


@pytest.mark.parametrize("vision", STOCK)
@pytest.mark.parametrize("feature", ["cls", "mean", "pooler"])
@torch.no_grad()
def test_features_are_those_of_the_towers(folders, vision, feature):
    backbone, model = made(folders, vision, vision_feature=feature, text_feature=feature)
    packed = batch(backbone, *PAIRS)
    images, texts = backbone.embed(model, packed)
    seen, read = towers(folders, backbone, packed, vision)
    tokens = seen.last_hidden_state
    if vision == "clip":  # its last LayerNorm stands in the pooler
        tokens = model.vision_model.post_layernorm(tokens)
    keep = packed.texts["attention_mask"].unsqueeze(2)
    want = {
        "cls": (tokens[:, 0], read.last_hidden_state[:, 0]),
        "mean": (tokens[:, 1:].mean(1), (read.last_hidden_state * keep).sum(1) / keep.sum(1)),
        "pooler": (seen.pooler_output, read.pooler_output),
    }[feature]
    torch.testing.assert_close(images, want[0])
    torch.testing.assert_close(texts, want[1])
    assert backbone.feature_widths == (24, 16)
    assert not torch.allclose(texts.norm(dim=1), torch.ones(4))


@torch.no_grad()
def test_the_feature_pair_of_ga_net_is_the_first_token_of_either_tower_also_in_training(folders):
    backbone, model = made(folders, "vit", text_feature="cls")
    packed = batch(backbone, *PAIRS)
    images, texts = backbone.embed(model.train(), packed)
    seen, read = towers(folders, backbone, packed, "vit")
    torch.testing.assert_close(images, seen.last_hidden_state[:, 0])
    torch.testing.assert_close(texts, read.last_hidden_state[:, 0])
    assert model.head_modules == () and not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_stored_features_give_what_pixels_gave_and_no_vision_tower_is_built(folders):
    live, model = made(folders, projection="mlp", width=12)
    plain, towers_alone = made(folders)
    rows = {n: plain.embed(towers_alone, batch(plain, ([n], ["a"])))[0] for n in (1, 2, 3, 4)}
    stored, small = made(folders, projection="mlp", width=12, images="stored")
    small.load_state_dict(model.state_dict(), strict=False)
    assert small.vision_model is None and not any(n.startswith("vision") for n, _ in small.named_parameters())
    got = small(**stored.inputs(batch(stored, *PAIRS, stored=rows)))
    want = model(**live.inputs(batch(live, *PAIRS)))
    torch.testing.assert_close(got.image_features, want.image_features)
    torch.testing.assert_close(got.text_features, want.text_features)
    assert stored.frozen_prefix(small) == ["text_model"]
    with pytest.raises(BadInput, match="stored"):
        small(pixel_values=torch.zeros(1, 3, 8, 8))


def test_training_draws_from_the_augmented_passes_and_evaluation_takes_the_first_row():
    features = torch.arange(4.0).unsqueeze(1).expand(4, 6).half()
    draw = lambda train, seed: StoredVectors(6, train)(features, torch.Generator().manual_seed(seed))  # noqa: E731
    assert {float(draw(True, seed)[0]) for seed in range(40)} == {1.0, 2.0, 3.0}
    assert {float(draw(False, seed)[0]) for seed in range(10)} == {0.0}
    assert float(StoredVectors(6, True)(features[:1], torch.Generator())[0]) == 0.0
    assert draw(True, 3).dtype == torch.float32
    for wrong in (torch.zeros(2, 5), torch.zeros(2, 6, dtype=torch.int64), torch.zeros(0, 6), torch.zeros(1, 1, 6)):
        with pytest.raises(BadSample, match="features"):
            StoredVectors(6)(wrong)


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_projections_train_whole_beside_an_adapter_in_either_tower(folders, projection, tmp_path):
    backbone, base = made(folders, projection=projection, width=12, train_logit_scale=True)
    inputs = backbone.inputs(batch(backbone, *PAIRS))
    with torch.no_grad():
        frozen = base(**inputs)
    targets = {p.path for s in find_sites(base).attention for p in (s.q, s.v)}
    heads = float32_heads(base)
    assert set(heads) == {"image_projection", "text_projection", "logit_scale"}
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False, modules_to_save=heads)
    model = peft.get_peft_model(base, config)
    out = model(**inputs)
    (out.text_features @ out.image_features.T * out.logit_scale).square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all(p.dim() >= 1 for p in trained.values()), "ZeRO-3 partitions no number without dimension"
    assert {n.split(".")[2] for n in trained} == {"vision_model", "text_model", *heads}
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**inputs).text_features, frozen.text_features)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        model.save_pretrained(tmp_path)
        fresh = made(folders, projection=projection, width=12, train_logit_scale=True)[1]
        again = peft.PeftModel.from_pretrained(fresh, tmp_path)
        for one, other in zip(model.eval()(**inputs).to_tuple(), again.eval()(**inputs).to_tuple(), strict=True):
            torch.testing.assert_close(one, other)


def test_without_projection_or_training_nothing_is_trained_whole(folders):
    assert made(folders)[1].head_modules == ()
    assert made(folders, projection="linear", train_projection=False)[1].head_modules == ()
    assert made(folders, train_logit_scale=True)[1].head_modules == ("logit_scale",)


def test_the_temperature_is_limited_but_can_come_back(folders):
    _, model = made(folders, train_logit_scale=True, logit_scale=500.0)
    scale = model.logit_scale.requires_grad_(True)
    assert float(scale().detach()) == pytest.approx(100.0)
    scale().sum().backward()
    assert float(scale.log_scale.grad) == pytest.approx(100.0)
    _, model = made(folders, logit_scale=20.0)
    assert float(model.logit_scale()) == pytest.approx(20.0) and not list(model.logit_scale.parameters())


def test_features_and_temperature_are_float32_in_a_half_precision_base(folders, tmp_path):
    backbone, model = made(folders, dtype=torch.bfloat16, projection="mlp", logit_scale=20.0)
    out = model(**backbone.inputs(batch(backbone, *PAIRS)))
    assert {x.dtype for x in (out.image_features, out.text_features, out.logit_scale)} == {torch.float32}
    made(folders, projection="mlp", logit_scale=20.0)[1].save_pretrained(tmp_path)
    tokenizer = made(folders)[0]._tokenizer
    tokenizer.save_pretrained(tmp_path)
    backbone, model = made(folders, dtype=torch.bfloat16, model=str(tmp_path))
    assert backbone.logit_scale_of(model) == pytest.approx(20.0, rel=1e-6)


def test_the_task_retrieval_contrasts_its_features(folders):
    backbone, model = made(folders, projection="linear", width=12, logit_scale=5.0)
    packed = batch(backbone, ([1], ["a red circle"]), ([2], ["the big blue square"]), ([3], ["round"]))
    images, texts = (normalize(x, dim=1) for x in backbone.embed(model, packed))
    logits, target = 5 * images @ texts.T, torch.arange(3)
    want = (cross_entropy(logits, target, reduction="sum") + cross_entropy(logits.T, target, reduction="sum")) / 2
    task = retrieval.ENTRY(retrieval.Options(loss="contrast"), None)
    torch.testing.assert_close(task.loss(model(**backbone.inputs(packed)), packed), want)


def test_features_of_unequal_width_are_not_compared(folders):
    backbone, model = made(folders)
    with pytest.raises(BadInput, match="projection: none") as error:
        model(**backbone.inputs(batch(backbone, *PAIRS)))
    assert "\n" not in str(error.value)
    assert model(**backbone.inputs(batch(backbone, ([], ["a"])))).text_features.shape == (1, 16)


@torch.no_grad()
def test_texts_are_embedded_many_at_once_as_in_a_batch(folders, monkeypatch):
    monkeypatch.setattr("mmpeft_ds.backbones.common.encoders.TEXTS_AT_ONCE", 2)
    texts = ["a red circle", "it", "the big blue square", "what shape is it", "round"]
    clip_folder = folders["bert"] + "-clip"
    for backbone in (
        made(folders, projection="mlp")[0],
        clip.ENTRY(clip.Options(tiny_clip.write(tiny_towers.Path(clip_folder), "clip")), None),
    ):
        model = backbone.build().eval()
        got = backbone.embed_texts(model, texts)
        want = backbone.embed(model, batch(backbone, ([], texts)))[1]
        torch.testing.assert_close(got, want)
        assert got.shape == (5, backbone.feature_widths[1]) and backbone.embed_texts(model, []).shape[0] == 0
        torch.testing.assert_close(normalize(got), model(**backbone.collate_texts(texts)).text_features)


def test_clip_gives_its_features_unnormalised_and_its_temperature(folders):
    backbone = clip.ENTRY(clip.Options(tiny_clip.write(tiny_towers.Path(folders["bert"] + "-clip2"), "clip")), None)
    model = backbone.build().eval()
    packed = batch(backbone, *PAIRS)
    raw, out = backbone.embed(model, packed), model(**backbone.inputs(packed))
    torch.testing.assert_close(normalize(raw[0]), out.image_features)
    assert not torch.allclose(raw[0].norm(dim=1), torch.ones(4))
    assert backbone.feature_widths == (16, 16)
    assert backbone.logit_scale_of(model) == pytest.approx(math.exp(2.6592), rel=1e-6)
    other = clip.ENTRY(clip.Options(backbone.options.model, image_size=4), None)
    assert backbone.towers_key() == clip.ENTRY(backbone.options, None).towers_key() != other.towers_key()


def test_a_dual_encoder_saved_whole_is_taken_by_its_directory(folders, tmp_path):
    options = {"vision_layers": 2, "vision_feature": "mean", "fit": "crop", "projection": "mlp", "width": 12}
    backbone, model = made(folders, "dinov2", logit_scale=30.0, **options)
    model.save_pretrained(tmp_path)
    backbone._tokenizer.save_pretrained(tmp_path)
    again, loaded = made(folders, model=str(tmp_path), images="live", train_logit_scale=True)
    assert loaded.head_modules == ("image_projection", "text_projection", "logit_scale")
    assert again.image_transform(False) == backbone.image_transform(False)
    assert again.logit_scale_of(loaded) == pytest.approx(30.0) and backbone.logit_scale_of(model) == 1.0
    assert again.towers_key() != made(folders, "dinov2")[0].towers_key()
    with torch.no_grad():
        for one, other in zip(
            backbone.embed(model, batch(backbone, *PAIRS)), again.embed(loaded, batch(again, *PAIRS)), strict=True
        ):
            assert torch.equal(one, other)
        stored, small = made(folders, model=str(tmp_path), images="stored")
        assert small.vision_model is None
        assert torch.equal(stored.embed_texts(small, ["a red"]), again.embed_texts(loaded, ["a red"]))
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path).text_projection.out.weight, model.text_projection.out.weight
    )
    with pytest.raises(BadInput, match=r"backbone\.width: .* fixes it"):
        made(folders, model=str(tmp_path), width=9)


def test_the_key_of_the_towers_follows_what_features_depend_on(folders):
    base = made(folders)[0].towers_key()
    assert made(folders, dtype=torch.bfloat16)[0].towers_key() == base
    changes = [
        {"vision": "dinov2"},
        {"text_feature": "cls"},
        {"vision_layers": 1},
        {"vision_norm": False},
        {"fit": "crop"},
    ]
    keys = {made(folders, **change)[0].towers_key() for change in changes}
    for part in ("_vision_config", "_text_config"):
        backbone = made(folders)[0]
        getattr(backbone, part).hidden_act = "relu"  # the same weights compute something else
        keys.add(backbone.towers_key())
    assert len(keys) == 7 and base not in keys
    with pytest.raises(BadInput, match="not trained"):
        made(folders, projection="mlp")[0].towers_key()


def test_stored_features_of_another_tower_are_refused(folders, tmp_path):
    def towers(**options):
        backbone = made(folders, **options)[0]
        section = {"name": "dual_encoder", **dataclasses.asdict(backbone.options)}
        return {"key": backbone.towers_key(), "backbone": section}

    stored = made(folders, images="stored", projection="mlp", text_feature="cls")[0]
    stored.use_features(towers())
    stored.use_features({**towers(), "key": towers()["key"].split("-")[0]})  # as earlier versions wrote it
    backbone, model = made(folders, projection="mlp")
    model.save_pretrained(tmp_path)
    backbone._tokenizer.save_pretrained(tmp_path)
    whole = made(folders, model=str(tmp_path), images="stored")[0]
    whole.use_features(towers())
    for wrong, said in [
        (towers(vision="dinov2"), "weights"),
        (towers(vision_layers=2), "layers: 2, here 3"),
        (towers(vision_feature="mean"), "feature"),
        ({**towers(), "key": "0"}, "have changed"),
        ({**towers(), "key": towers()["key"].split("-")[0] + "-0"}, "have changed"),
        ({**towers(), "backbone": {"name": "clip"}}, "made by 'clip'"),
        ({**towers(), "backbone": {**towers()["backbone"], "projection": "mlp"}}, "projections"),
    ]:
        with pytest.raises(BadInput, match=said) as error:
            stored.use_features(wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="layers"):
        whole.use_features(towers(vision_layers=2))
    with pytest.raises(BadInput, match="images: live"):
        made(folders)[0].use_features(towers())


def test_a_prompted_text_is_read_whole(folders):
    backbone, _ = made(folders, text="roberta")
    one, other = backbone.collate_texts([Prompted("a red", "circle")]), backbone.collate_texts(["a red circle"])
    assert torch.equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize(
    "options, said",
    [
        ({"image_size": 9}, "image_size"),
        ({"vision_layers": 4}, "vision_layers"),
        ({"max_text_length": 41}, "max_text_length"),
        ({"width": 0}, "width"),
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"text": "roberta", "text_feature": "pooler"}, "pooler"),
        ({"vision_feature": "pooler", "vision_norm": False}, "vision_norm"),
    ],
)
def test_impossible_options_are_refused_in_one_line(folders, options, said):
    with pytest.raises(BadInput, match=said) as error:
        made(folders, **options)
    assert "\n" not in str(error.value)


def test_a_missing_tower_is_named():
    for options, said in ((Options(text="a"), "backbone.vision"), (Options(vision="a"), "backbone.text")):
        with pytest.raises(BadInput, match=said):
            ENTRY(options, None).check()
