"""MMRL: equal to towers that are run by hand with the tokens in their layers, gradients, and what is told apart."""

import copy

import peft
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, normalize
from transformers import CLIPConfig, CLIPModel

from mmpeft_ds import MMRLConfig
from mmpeft_ds.backbones.features.backbone import FeatureConfig, FeatureModel
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods import get
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.condition import enable_checkpointing
from mmpeft_ds.sites.feature_site import Bank
from tests.helpers.models import tiny_feature_model, tiny_prompted_encoder

KINDS = ("bert", "roberta", "clip", "siglip", "dinov2")
LABELS = [0, 1, 2, 1, 0]
ALPHA, WEIGHT = 0.6, 0.8


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    place = tmp_path_factory.mktemp("mmrl")
    return {kind: tiny_prompted_encoder.write(place / kind, kind) for kind in KINDS}


class Made:
    """A base, MMRL on it with values that are not those of the start, and a batch."""

    def __init__(self, section: dict, dtype: torch.dtype = torch.float64, classes: list[int] | None = None, **options):
        self.backbone = tiny_prompted_encoder.backbone(section)
        if classes is not None:
            self.backbone.use_trained_classes(classes)
        base = self.backbone.build().to(dtype)
        self.backbone.read_classes(base)
        self.base = base.requires_grad_(False).eval()
        self.frozen = copy.deepcopy(base)
        torch.manual_seed(3)
        defaults = {"tokens": 2, "width": 5, "first_layer": 2, "alpha": ALPHA, "regularisation": WEIGHT}
        self.model = peft.get_peft_model(base, MMRLConfig(**{**defaults, **options})).eval()
        fill(self.model)
        self.batch = tiny_prompted_encoder.batch(self.backbone, len(LABELS), LABELS)

    @property
    def head(self):
        return self.model.get_base_model().features.head

    def say(self, model=None):
        return (model or self.model)(**self.backbone.inputs(self.batch))

    def trainables(self) -> dict[str, torch.Tensor]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


def fill(model, seed: int = 4) -> None:
    """Values that differ from layer to layer, as those at the start do not."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.5 * torch.randn(p.shape, generator=made, dtype=torch.float64))


def through(blocks, hidden, tokens, first, causal, keep=None):
    """States of the own tokens and of the inserted ones after the last layer, each layer called with a mask of its
    own making."""
    for number, block in enumerate(blocks):
        if number >= first:
            new = tokens[number].expand(len(hidden), -1, -1)
            rest = hidden[:, 1 if number == first else 1 + new.shape[1] :]
            hidden = torch.cat([hidden[:, :1], new, rest], 1)
        length = hidden.shape[1]
        allowed = torch.ones(len(hidden), 1, length, length, dtype=torch.bool)
        if causal:
            allowed = allowed.tril()
        if keep is not None:
            count = length - keep.shape[1]
            grown = torch.cat([keep[:, :1], keep.new_ones(len(keep), count), keep[:, 1:]], 1)
            allowed = allowed & grown[:, None, None, :].bool()
        out = block(hidden, allowed)
        hidden = out[0] if isinstance(out, tuple) else out
    count = tokens[len(blocks) - 1].shape[0]
    return torch.cat([hidden[:, :1], hidden[:, 1 + count :]], 1), hidden[:, 1 : 1 + count]


def by_hand(made: Made, kind: str, first: int):
    """Class features of images, their representation features, text features, all trainables being leaves."""
    encoder, values = copy.deepcopy(made.frozen.encoder), made.trainables()
    values = {n: p.detach().clone().requires_grad_(True) for n, p in values.items()}
    of = {n.partition("mmrl_")[2].replace(".default", ""): p for n, p in values.items()}
    texts = {n: p for n, p in values.items() if ".text_model." in n}

    def tokens(text: bool, blocks) -> dict[int, torch.Tensor]:
        found = {}
        for layer in range(first, len(blocks)):
            mine = {n.rpartition(".")[2]: p for n, p in values.items() if f"aligner.default.{layer}." in n
                    and (n in texts) == text}  # fmt: skip
            found[layer] = of["head.space.tokens"] @ mine["weight"].T + mine["bias"]
        return found

    vision, text = encoder.vision_model, encoder.text_model
    pixels = made.backbone.encoder.inputs(made.batch)["pixel_values"]
    if kind not in ("clip", "siglip"):
        pixels = encoder.pixel_norm(pixels).double()
    hidden = vision.embeddings(pixels.double())
    if kind == "clip":
        hidden = vision.pre_layrnorm(hidden)
    blocks = vision.layers if hasattr(vision, "layers") else getattr(vision.encoder, "layers", None)
    blocks = vision.encoder.layer if blocks is None else blocks
    own, mine = through(blocks, hidden, tokens(False, blocks), first, False)
    norm = {"clip": "post_layernorm", "siglip": "post_layernorm"}.get(kind, "layernorm")
    norm = (lambda x: x) if kind == "dinov2" else getattr(vision, norm)
    own, mine = norm(own), norm(mine).mean(1)
    if kind == "siglip":
        image = vision.head(own)
    elif kind == "clip":
        image = encoder.visual_projection(own[:, 0])
    else:
        pooled = vision.pooler(own) if getattr(vision, "pooler", None) is not None else own[:, 0]
        image = encoder.image_projection(pooled)
    representation = mine @ of["head.projection.weight"].T

    given = made.backbone.encoder.collate_texts(
        [f"a photo of a {name.replace('_', ' ')}." for name in tiny_prompted_encoder.CLASSES]
    )
    ids, keep = given["input_ids"], given.get("attention_mask")
    hidden = text.embeddings(input_ids=ids)
    blocks = text.encoder.layers if kind in ("clip", "siglip") else text.encoder.layer
    own, _ = through(blocks, hidden, tokens(True, blocks), first, kind == "clip", keep)
    if kind == "clip":
        ends = (ids == text.config.eos_token_id).int().argmax(1)
        written = encoder.text_projection(text.final_layer_norm(own)[torch.arange(len(ids)), ends])
    elif kind == "siglip":
        written = text.head(text.final_layer_norm(own)[:, -1])
    else:
        pooled = (own * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)
        written = encoder.text_projection(pooled)
    return image, representation, written, values


def loss_by_hand(made: Made, image, representation, text):
    """The published loss, plainly; logits by the class feature, by the tokens, and the loss."""
    scale = made.frozen.features.logit_scale
    logits = [scale * normalize(x) @ normalize(text).T for x in (image, representation)]
    labels = torch.tensor(LABELS)
    with torch.no_grad():
        frozen, _ = made.backbone.encoder.embed(made.frozen.encoder, made.batch)
        words = [f"a photo of a {name.replace('_', ' ')}." for name in tiny_prompted_encoder.CLASSES]
        frozen_text = made.backbone.encoder.embed_texts(made.frozen.encoder, words)
    loss = ALPHA * cross_entropy(logits[0], labels) + (1 - ALPHA) * cross_entropy(logits[1], labels)
    loss = loss + WEIGHT * (1 - cosine_similarity(image, frozen).mean())
    return *logits, loss + WEIGHT * (1 - cosine_similarity(text, frozen_text).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [1, 2])
def test_logits_loss_and_gradients_are_those_of_towers_run_by_hand(sections, kind, first):
    made = Made(sections[kind], first_layer=first)
    made.head.train()
    outputs = made.say()
    loss = tiny_prompted_encoder.task().loss(outputs, made.batch) / len(LABELS)
    loss.backward()
    *features, values = by_hand(made, kind, first - 1)
    of_class, of_tokens, want = loss_by_hand(made, *features)
    torch.testing.assert_close(outputs.terms[0][1], of_class, atol=1e-10, rtol=1e-10, check_dtype=False)
    torch.testing.assert_close(outputs.terms[1][1], of_tokens, atol=1e-10, rtol=1e-10, check_dtype=False)
    fused = ALPHA * of_class + (1 - ALPHA) * of_tokens
    torch.testing.assert_close(outputs.logits, fused, atol=1e-10, rtol=1e-10, check_dtype=False)
    torch.testing.assert_close(loss, want, atol=1e-10, rtol=1e-10, check_dtype=False)
    want.backward()
    for name, parameter in made.trainables().items():
        assert values[name].grad.abs().max() > 1e-8, name
        torch.testing.assert_close(parameter.grad, values[name].grad, atol=1e-9, rtol=1e-8, msg=name)


def test_a_loss_of_labels_is_that_of_the_task(sections):
    made = Made(sections["clip"])
    made.head.train()
    outputs = made.model(**made.backbone.inputs(made.batch), labels=torch.tensor(LABELS))
    of_task = tiny_prompted_encoder.task().loss(outputs, made.batch) / len(LABELS)
    torch.testing.assert_close(outputs.loss, of_task)
    assert outputs.penalty.shape == (len(LABELS),) and float(outputs.penalty.min()) > 0


def test_without_regularisation_no_image_goes_through_the_frozen_tower(sections):
    for weight, passes in ((0.0, 1), (0.5, 2)):
        made, calls = Made(sections["clip"], regularisation=weight), []
        made.base.encoder.vision_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        made.head.train()
        assert (made.say().penalty is None) == (weight == 0) and len(calls) == passes
        made.model.eval()
        assert made.say().penalty is None and len(calls) == passes + 1


def test_classes_that_were_not_trained_are_scored_by_the_class_feature(sections):
    whole, half = Made(sections["clip"]), Made(sections["clip"], classes=[0, 2])
    every, some = whole.say(), half.say()
    assert torch.equal(some.logits[:, [0, 2]], every.logits[:, [0, 2]])
    assert torch.equal(some.logits[:, 1], every.terms[0][1][:, 1])
    assert not torch.allclose(some.logits[:, 1], every.logits[:, 1])


def test_the_distance_of_texts_is_over_the_classes_that_train(sections):
    made = Made(sections["clip"], classes=[0, 2])
    made.head.train()
    made.say().penalty.sum().backward()
    some = made.head.space.tokens.grad.clone()
    assert float(some.abs().max()) > 0
    whole = Made(sections["clip"])
    whole.head.train()
    whole.say().penalty.sum().backward()
    assert not torch.allclose(whole.head.space.tokens.grad, some)


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_it_is_zero_shot_and_it_comes_back_from_its_file(sections, kind, tmp_path):
    made = Made(sections[kind], torch.float32, classes=[0, 2])
    caption = made.backbone.encoder.collate_texts(["a red circle", "what is it"])
    with torch.no_grad():
        frozen = made.frozen(**made.backbone.inputs(made.batch)).logits
        read = made.frozen.encoder(**caption).text_features
        seen, _ = made.backbone.encoder.embed(made.frozen.encoder, made.batch)
        trained = made.say().logits
        assert not torch.allclose(trained, frozen)
        inside = made.base.encoder
        assert torch.equal(inside(**caption).text_features, read), "other texts are read as ever"
        assert torch.equal(made.backbone.encoder.embed(inside, made.batch)[0], seen), "and so are other images"
        with made.model.disable_adapter():
            assert torch.equal(made.say().logits, frozen)
        made.model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(made.frozen), tmp_path, adapter_name="renamed").eval()
        assert torch.equal(made.say(again).logits, trained)
        assert again.get_base_model().features.head.trained_classes.tolist() == [1, 0, 1]
        assert torch.equal(made.say(made.model.unload()).logits, frozen)
        assert not any(m._forward_pre_hooks for m in made.base.encoder.text_model.modules())


def test_two_adapters_are_what_they_are_alone(sections):
    made = Made(sections["bert"], torch.float32)
    with torch.no_grad():
        one = made.say().logits
        made.model.add_adapter("other", MMRLConfig(tokens=3, width=4, first_layer=1, first_text_layer=3))
        assert torch.equal(made.say().logits, one)
        made.model.set_adapter("other")
        fill(made.model, seed=8)
        other = made.say().logits
        alone = Made(sections["bert"], torch.float32, tokens=3, width=4, first_layer=1, first_text_layer=3, alpha=0.7)
        fill(alone.model, seed=8)
        assert torch.equal(alone.say().logits, other) and not torch.allclose(one, other)
        made.model.set_adapter("default")
        made.model.eval()
        assert torch.equal(made.say().logits, one)
        made.model.delete_adapter("other")
        assert torch.equal(made.say().logits, one)


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_layers_that_are_recomputed_give_the_same_gradients(sections, kind):
    found = []
    for again in (False, True):
        made = Made(sections[kind])
        calls = []
        part = "encoder.layers.1.mlp" if kind == "clip" else "layers.1.mlp"
        mlp = made.base.encoder.vision_model.get_submodule(part)
        mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if again:
            made.model.train()
            enable_checkpointing(made.base.encoder)
            made.base.encoder.train()
        made.head.train()
        tiny_prompted_encoder.task().loss(made.say(), made.batch).backward()
        found.append((len(calls), {n: p.grad for n, p in made.trainables().items()}))
    assert found[1][0] > found[0][0], "nothing was recomputed"
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, msg=name)


def test_class_features_are_computed_once_per_evaluation_and_frozen_ones_once(sections):
    made, calls = Made(sections["clip"], torch.float32), []
    made.base.encoder.text_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = made.say().logits
        made.say()
        assert len(calls) == 1
    made.head.train()
    for expected in (3, 4):
        made.say()
        assert len(calls) == expected, "one of the frozen tower, then one a step"
    with torch.no_grad():
        made.head.space.tokens.mul_(-3)
        made.model.eval()
        assert not torch.allclose(made.say().logits, first) and len(calls) == 5


def test_the_aligners_of_a_tower_start_equal_and_the_space_as_published(sections):
    made = Made(sections["bert"])
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(made.frozen), MMRLConfig(tokens=40, width=50, first_layer=1))
    named = dict(model.named_parameters())
    text = [p for n, p in named.items() if "text_model" in n and "mmrl_aligner" in n and n.endswith("weight")]
    image = [p for n, p in named.items() if "vision_model" in n and "mmrl_aligner" in n and n.endswith("weight")]
    assert len(text) == len(image) == 3
    assert all(torch.equal(p, text[0]) for p in text) and not torch.equal(text[0], image[0])
    space = model.get_base_model().features.head.space.tokens
    assert 0.018 < float(space.std()) < 0.022
    assert 0.2 < float(model.get_base_model().features.head.projection.weight.std()) < 0.3  # 16^-0.5


def test_on_clip_vit_b_16_as_many_parameters_train_as_published():
    with torch.device("meta"):
        text = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_hidden_layers=12)
        vision = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, patch_size=16)
        encoder = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512))
        config = FeatureConfig(image_width=512, num_classes=2, live_images=True)
        tokenise = lambda texts: {"input_ids": torch.zeros(len(texts), 77, dtype=torch.int64)}  # noqa: E731
        base = FeatureModel(config, Bank(2), encoder, None, ["cat", "dog"], tokenise)
        model = peft.get_peft_model(base.requires_grad_(False), MMRLConfig())
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == 5 * 512 + 7 * (512 + 1) * (768 + 512) + 768 * 512 == 4_992_256


def test_in_a_half_precision_base_what_trains_is_float32(sections):
    made = Made(sections["clip"], torch.bfloat16)
    assert {p.dtype for p in made.trainables().values()} == {torch.float32}
    made.head.train()
    tiny_prompted_encoder.task().loss(made.say(), made.batch).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in made.trainables().values())


def test_a_model_with_a_history_can_be_copied(sections):
    made = Made(sections["clip"])
    made.head.train()
    want = made.say().logits
    torch.testing.assert_close(made.say(copy.deepcopy(made.model)).logits, want)


def test_what_it_cannot_work_with_is_refused_in_one_line(sections):
    stored, method = tiny_feature_model.model(), get("mmrl")
    live = tiny_prompted_encoder.model(sections["bert"])
    sites = find_sites(live)
    cases = [
        (lambda: method.check(method.Config(), find_sites(stored), None), "image encoder in every step"),
        (lambda: peft.get_peft_model(stored, method.Config()), "image encoder in every step"),
        (lambda: method.check(method.Config(), sites, None), "first_layer: 6, but the image tower has 3 layers"),
        (lambda: method.check(method.Config(first_layer=3, first_text_layer=4), sites, None), "first_text_layer: 4"),
        (
            lambda: peft.get_peft_model(live, method.Config(first_layer=2, template="a {}" + " a" * 20)),
            "template: the text of class 'big blue square' is longer",
        ),
    ]
    for refused, words in cases:
        with pytest.raises(BadInput, match=words) as error:
            refused()
        assert "\n" not in str(error.value)
    live.config.live_images = live.features.live_images = False
    with pytest.raises(BadInput, match="images: live"):
        method.check(method.Config(first_layer=2), find_sites(live), None)
    made = Made(sections["bert"], torch.float32)
    with pytest.raises(BadInput, match="images: live, or pass `batch`"):
        made.model(image_features=torch.randn(2, 12))


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 0}, {"width": 0}, {"first_layer": 0}, {"first_text_layer": 0}, {"alpha": 1.5},
        {"regularisation": -1.0}, {"init_std": -1.0}, {"template": "a photo"},
    ],
)  # fmt: skip
def test_impossible_options_are_refused(options):
    with pytest.raises(BadInput, match=next(iter(options))):
        MMRLConfig(**options)
