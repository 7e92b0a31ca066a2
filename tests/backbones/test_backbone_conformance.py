"""The contract of backbones, run over every registered entry and a text-only one."""

import dataclasses
import json
import pickle
import re

import pytest
import torch
from transformers import CLIPModel

from mmpeft_ds import backbones, registry
from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.backbones.common.model_hooks import ModelHooks, model_hooks
from mmpeft_ds.backbones.common.scalars import ScalarsAsBuffers
from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.data.frozen_store import FrozenStore, Place, StoredImage, StoreSpec
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.frozen_images import AT_ONCE, FrozenImages, shapes
from mmpeft_ds.errors import BadInput
from tests.helpers.models import tiny_clip
from tests.helpers.models.tiny_backbones import MAKERS, make_text_only

ABILITIES = {
    "generates": ["read", "generate"],
    "ranks_answers": ["rank"],
    "embeds": ["feature_widths", "towers_key", "embed", "embed_texts"],
    "wants_statistics": ["statistics_width", "statistics_key", "use_statistics", "build_vision"],
    "reads_bank": ["use_bank"],
}


def test_every_registered_backbone_is_tried_here():
    # reads features in place of images: test_features_backbone.py
    untried = set(registry.names(backbones)) - {*MAKERS, "features"}
    assert not untried, f"add {sorted(untried)} to MAKERS in tests/helpers/models/tiny_backbones.py"


@pytest.fixture(scope="module", params=[*MAKERS, "text_only"])
def backbone(request, tmp_path_factory):
    made = MAKERS.get(request.param, make_text_only)(tmp_path_factory.mktemp(request.param))
    made.check()
    return made


@pytest.fixture(scope="module")
def model(backbone):
    return backbone.build().eval()


def image(seed):
    return torch.randint(0, 256, (3, 9, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def samples():
    """One image, two images to a question, a video, text alone, an image nobody asks about, padding, a bad sample."""

    def sample(name, images, texts):
        return Sample(name, 1.0, [image(i) for i in images], texts, [0] * len(texts))

    return [
        sample("one", [1], ["is there a red circle", "what color is it"]),
        sample("pair", [2, 3], ["is it the same shape"]),
        sample("video", [4, 5, 6, 7, 8], ["is it round"]),
        sample("text", [], ["is it red or blue what is it", "a"]),
        sample("unasked", [9], []),
        Sample(),
        Sample("damaged", 0.0, bad=("image", "x.tar", "k")),
    ]


def packed(backbone, given, apart=False):
    transform = backbone.image_transform(train=True)
    made = []
    for s in given:
        images = s.images if "image" in backbone.modalities else []
        images = [i if isinstance(i, StoredImage) else transform(i, torch.Generator()) for i in images]
        texts = s.texts
        if backbone.generates:
            texts = [Prompted(text, "a red circle") if isinstance(text, str) else text for text in texts]
        made.append(dataclasses.replace(s, images=images, texts=texts))
    collate_images = backbone.collate_apart if apart else backbone.collate_images
    collate = collate_images, backbone.collate_texts, lambda t: {"label": torch.tensor(t)}
    return pack(made, *collate, backbone.collate_videos)


@torch.no_grad()
def answers(backbone, model, given):
    """(T, n) outputs of the model for each text, of whatever kind: losses of generated text, logits, or features."""
    batch = packed(backbone, given)
    outputs = forward(model, backbone, batch)
    if backbone.generates:
        return torch.stack(outputs.token_losses(), 1)
    return outputs["logits"] if "logits" in outputs else outputs["text_features"]


@torch.no_grad()
def test_values_of_the_frozen_prefix_computed_apart_or_stored_give_the_same_answers(backbone, model, tmp_path):
    if backbone.image_prefix(model) is None:
        assert "image" not in backbone.modalities
        return
    spec = StoreSpec(str(tmp_path / "key"), "key")
    FrozenStore(spec).prepare({})
    frozen = FrozenImages(backbone, model, AT_ONCE, torch.device("cpu"), False, spec)
    given = [dataclasses.replace(s, place=Place(1, len(samples()), i)) for i, s in enumerate(samples())]
    fresh = packed(backbone, given, apart=True)
    computed = frozen.fill(fresh, *frozen.passes([fresh], [[1, 1, 1]]))
    found = [frozen.store.find(s.place) for s in given]
    assert [None if spellings is None else len(spellings) for spellings in found] == [1, 2, 5, None, 1, None, None]

    stubs = [[StoredImage(spelling) for spelling in spellings or []] for spellings in found]
    stubs = [dataclasses.replace(s, images=images) for s, images in zip(given, stubs, strict=True)]
    stored = packed(backbone, stubs, apart=True)
    assert stored.images == {} and frozen.passes([stored], [[1, 1, 0]]) == [0]
    stored = frozen.fill(stored, 0)

    outputs = [forward(model, backbone, batch) for batch in (packed(backbone, samples()), computed, stored)]
    if backbone.generates:
        outputs = [{"logits": one.logits, "losses": one.token_losses()[0]} for one in outputs]
    names = ["logits", "losses", "text_features", *(["image_features"] if backbone.embeds else [])]
    compared = [name for name in names if name in outputs[0]]
    assert compared
    for name in compared:
        assert torch.equal(outputs[1][name], outputs[0][name]) and torch.equal(outputs[2][name], outputs[0][name])
    if not backbone.images_differ:
        on_meta = shapes(backbone, backbone.build(on_meta=True).eval())
        real = frozen.store.read(given[0].place)[0]
        assert {n: (x.shape, x.dtype) for n, x in on_meta.items()} == {n: (x.shape, x.dtype) for n, x in real.items()}


def test_values_have_another_key_where_the_same_weights_compute_otherwise(backbone, model, monkeypatch):
    prefix = backbone.image_prefix(model)
    if prefix is None:
        return
    assert backbone.image_prefix(model) == prefix and json.loads(json.dumps(prefix.choice)) == prefix.choice
    config = getattr(backbone, "_vision_config", None) or backbone._config.vision_config
    text = getattr(backbone, "_text_config", None) or backbone._config.get_text_config()
    name = next(name for name in ("hidden_act", "num_heads", "num_attention_heads") if hasattr(config, name))
    monkeypatch.setattr(config, name, "relu" if name == "hidden_act" else 1)
    assert backbone.image_prefix(model) != prefix
    monkeypatch.undo()
    monkeypatch.setattr(text, "vocab_size", 1)
    monkeypatch.setattr(config, "_name_or_path", "elsewhere")
    assert backbone.image_prefix(model) == prefix


def test_it_is_of_the_base_class_and_can_do_what_it_says(backbone):
    assert isinstance(backbone, BackboneBase)
    assert backbone.modalities and set(backbone.modalities) <= {"image", "video", "text"}
    for ability, methods in ABILITIES.items():
        overridden = [name for name in methods if getattr(type(backbone), name) is not getattr(BackboneBase, name)]
        if getattr(backbone, ability):
            assert overridden == methods, f"{ability} needs {set(methods) - set(overridden)}"


@pytest.mark.parametrize("name", registry.names(backbones))
def test_every_entry_documents_its_options(name):
    options = registry.options(backbones, name, "backbone.name")
    entry = registry.load(backbones, name, "backbone.name")
    assert issubclass(entry, BackboneBase) and entry.Options is options
    documented = "".join(parent.__doc__ or "" for parent in options.__mro__ if dataclasses.is_dataclass(parent))
    for field in dataclasses.fields(options):
        assert re.search(rf"^ +(\w+, )*{field.name}(, \w+)*: ", documented, re.M), field.name


def test_a_backbone_that_lacks_a_required_method_cannot_be_made():
    required = {"build", "image_transform", "collate_texts"}
    assert BackboneBase.__abstractmethods__ == required

    class Whole(BackboneBase):
        build = image_transform = collate_texts = lambda self, *args: None

    assert Whole(None, None).dummy("text") == "a"
    for name in required:
        part = type("Part", (BackboneBase,), {other: Whole.build for other in required - {name}})
        with pytest.raises(TypeError, match=name):
            part(None, None)


def test_what_a_backbone_cannot_do_is_said_by_its_default(tmp_path):
    plain = make_text_only(tmp_path)
    with pytest.raises(NotImplementedError, match="generates"):
        plain.generate(None, None)
    with pytest.raises(BadInput, match="reads pixels"):
        plain.use_features({"key": "k"})


def test_a_stock_model_has_the_default_hooks_and_a_model_of_ours_its_own(backbone, model):
    hooks = model_hooks(model)
    assert isinstance(hooks, ModelHooks) and (hooks is model or type(hooks) is ModelHooks)
    for path in (*hooks.head_modules, *hooks.runs_again):
        model.get_submodule(path)
    hooks.load_training_state(hooks.training_state())


def test_on_meta_nothing_is_allocated_and_the_shape_is_that_of_the_real_model(backbone, model):
    on_meta = backbone.build(on_meta=True)
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    assert {n: p.shape for n, p in on_meta.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_on_meta_the_frozen_weights_have_the_dtype_of_the_recipe(backbone):
    backbone.dtype = torch.bfloat16
    try:
        real, on_meta = backbone.build(), backbone.build(on_meta=True)
    finally:
        backbone.dtype = torch.float32
    assert {n: p.dtype for n, p in on_meta.named_parameters()} == {n: p.dtype for n, p in real.named_parameters()}


def test_deepspeed_can_broadcast_every_parameter(model):
    scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    assert not scalars, "derive the model from backbones.common.scalars.ScalarsAsBuffers too"


def test_a_stock_model_with_a_scalar_parameter_keeps_it_as_a_buffer_of_the_same_name(tmp_path):
    folder = tiny_clip.write(tmp_path, "clip")
    stock = CLIPModel.from_pretrained(folder)
    assert dict(stock.named_parameters())["logit_scale"].dim() == 0, "else this mixin is not needed"
    mixed = type("Mixed", (ScalarsAsBuffers, CLIPModel), {}).from_pretrained(folder)
    assert dict(stock.named_parameters()).keys() - dict(mixed.named_parameters()).keys() == {"logit_scale"}
    assert all(torch.equal(tensor, mixed.state_dict()[name]) for name, tensor in stock.state_dict().items())


def test_every_mixture_of_images_and_texts_is_answered(backbone, model):
    got = answers(backbone, model, samples())
    assert len(got) == 6 and got.isfinite().all()


def test_packing_equals_one_by_one(backbone, model):
    together = answers(backbone, model, samples())
    alone = torch.cat([answers(backbone, model, [s]) for s in samples() if s.texts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)


def test_the_answer_to_a_text_does_not_depend_on_the_rest_of_the_batch(backbone, model):
    first, *others = samples()
    alone = answers(backbone, model, [first])
    torch.testing.assert_close(answers(backbone, model, [*others, first])[-2:], alone, atol=1e-6, rtol=1e-6)
    other = Sample("one", 1.0, first.images[:0], ["the big square"], [0])
    assert (answers(backbone, model, [other]) - alone[:1]).abs().max() > 1e-3  # else the check would prove nothing


def test_a_dummy_of_each_modality_runs(backbone, model):
    slot = Sample("", 0.0)
    if "image" in backbone.modalities:
        slot.images = [backbone.dummy("image")]
    if "video" in backbone.modalities:
        slot.videos = [backbone.video_transform()(backbone.dummy("video"))]
    slot.texts, slot.targets = [backbone.dummy("text")], [0]
    assert len(answers(backbone, model, [slot])) == 1


def test_what_loader_processes_need_can_be_pickled(backbone):
    for name in ("collate_texts", "collate_images"):
        pickle.loads(pickle.dumps(getattr(backbone, name)))
    transform = pickle.loads(pickle.dumps(backbone.image_transform(train=True)))
    made = transform(image(1), torch.Generator())
    assert (made["pixel_values"] if isinstance(made, dict) else made).dtype == torch.uint8
    texts = ["is it red", "a"]
    again = pickle.loads(pickle.dumps(backbone)).collate_texts(texts)
    assert torch.equal(again["input_ids"], backbone.collate_texts(texts)["input_ids"])


def test_the_frozen_prefix_names_modules_without_trainables(backbone, model):
    for path in backbone.frozen_prefix(model):
        assert not any(p.requires_grad for p in model.get_submodule(path).parameters())


def test_the_model_survives_saving_and_loading(backbone, model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(answers(backbone, loaded, samples()), answers(backbone, model, samples()))
