"""The model of features: rows from stored features, zero-shot scores, heads in its place, saving and loading."""

from dataclasses import dataclass
from typing import ClassVar

import peft
import peft.mapping
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from mmpeft_ds import registry
from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.backbones.features.backbone import ENTRY, FeatureModel, Options, ViewTransform
from mmpeft_ds.data.batch import Described, Sample, pack
from mmpeft_ds.engine.assembly import modality
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.common.head import Head, HeadTuner
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.feature_site import Features, Scores
from tests.helpers.models import tiny_feature_model

TOWERS = {"key": "k", "image_width": 8, "text_width": 6, "logit_scale": 10.0}


class ShiftHead(Head):
    """Adds a trained vector to the class scores, and a number that is found without gradients."""

    needs = ("text",)
    calibrated = ("found",)

    def __init__(self, config, base):
        super().__init__(config, base)
        self.shift = nn.Parameter(torch.zeros(self.bank.num_classes))
        self.register_buffer("found", torch.zeros(()))

    def forward(self, features: Features) -> Scores:
        return Scores(self.base(features).logits + self.shift + self.found, report={"rows": float(len(features))})


@dataclass
class ShiftConfig(HeadConfig):
    method: ClassVar[str] = "toy_shift"


class ShiftTuner(HeadTuner):
    prefix = "toy_shift_"
    head_class = ShiftHead


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    entries = {"CONFIG": ShiftConfig, "TUNER": ShiftTuner, "PREFIX": "toy_shift_"}
    for table, value in entries.items():
        monkeypatch.setitem(getattr(peft.mapping, f"PEFT_TYPE_TO_{table}_MAPPING"), "TOY_SHIFT", value)


def backbone(**towers):
    made = ENTRY(Options(), list("abcde"))
    made.use_features({**TOWERS, **towers})
    made.check()
    return made


def packed(made, samples):
    return pack(samples, made.collate_images, made.collate_texts, lambda t: {"label": torch.tensor(t)})


def sample(name, image=True, text=True, weight=1.0):
    made = torch.Generator().manual_seed(hash(name) % 1000)
    images = [torch.randn(8, generator=made)] if image else []
    described = Described("a b", torch.randn(6, generator=made) if text else None)
    return Sample(name, weight, images, [described], [0])


def test_it_is_a_backbone_and_says_what_is_missing():
    assert isinstance(backbone(), BackboneBase)
    with pytest.raises(BadInput, match="no closed list of labels"):
        ENTRY(Options(), None).check()
    with pytest.raises(BadInput, match="hold no features"):
        ENTRY(Options(), ["a"]).check()
    with pytest.raises(BadInput, match="live needs backbone.encoder"):
        ENTRY(Options(images="live"), ["a"]).check()


def test_scores_are_scaled_cosines_with_the_mean_of_unit_templates():
    model, z = tiny_feature_model.model(), tiny_feature_model.rows()
    text = normalize(normalize(model.features.bank.positive, dim=-1).mean(1), dim=-1)
    want = 10 * normalize(z.image, dim=-1) @ text.T
    torch.testing.assert_close(model(image_features=z.image).logits, want)
    bare = tiny_feature_model.model(templates=0)
    assert not bare(image_features=z.image).logits.any()


def test_a_row_is_a_text_with_the_mean_of_its_images_and_does_not_depend_on_packing():
    made = backbone()
    model = made.build().eval()
    two = sample("two")
    two.images = [*two.images, *sample("other").images]
    samples = [sample("one"), two, sample("text", image=False), Sample(), sample("bare", text=False)]
    batch = packed(made, samples)
    rows = model.rows(**made.inputs(batch))
    assert rows.image.shape == (4, 8) and rows.text.shape == (4, 6)
    torch.testing.assert_close(rows.image[1], torch.stack(two.images).mean(0))
    assert not rows.image[2].any() and not rows.text[3].any()
    alone = model.rows(**made.inputs(packed(made, [samples[1]])))
    assert torch.equal(alone.image[0], rows.image[1]) and alone.key[0] == rows.key[1]
    dummy = modality.complete(packed(made, [Sample()]), [1.0, 1.0], made, _Task())
    rows = model.rows(**made.inputs(dummy))
    assert len(rows) == 1 and not rows.valid.any()


class _Task:
    def dummy_text(self, text):
        return text

    def dummy_target(self):
        return 0

    def collate(self, targets):
        return {"label": torch.tensor(targets)}


def test_views():
    stored = torch.arange(12.0).view(4, 3)
    assert torch.equal(ViewTransform(False)(stored), stored[0])
    drawn = {int(ViewTransform(True)(stored, torch.Generator().manual_seed(i))[0]) for i in range(30)}
    assert drawn == {3, 6, 9}
    assert torch.equal(ViewTransform(True)(stored[:1], torch.Generator()), stored[0])


def test_the_base_is_a_transformers_folder(tmp_path):
    model, z = tiny_feature_model.model(), tiny_feature_model.rows()
    model.save_pretrained(tmp_path)
    again = FeatureModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(image_features=z.image).logits, model(image_features=z.image).logits)
    assert torch.equal(again.features.bank.support_labels, model.features.bank.support_labels)


def test_a_head_takes_the_place_of_the_scorer_and_leaves_it_alone(tmp_path):
    model, z = tiny_feature_model.model(), tiny_feature_model.rows()
    before = model(image_features=z.image).logits
    wrapped = peft.get_peft_model(model, ShiftConfig())
    assert [s.path for s in find_sites(wrapped.get_base_model()).features] == ["features"]
    names = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert names == ["base_model.model.features.toy_shift_head.default.shift"]
    head = wrapped.get_base_model().features.head
    with torch.no_grad():
        head.shift += 1
    head.found.fill_(0.5)
    out = wrapped(image_features=z.image)
    torch.testing.assert_close(out.logits, before + 1.5)
    assert out.report == {"rows": 7.0}
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(image_features=z.image).logits, before)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_feature_model.model(), tmp_path)
    assert torch.equal(again(image_features=z.image).logits, out.logits)
    state = wrapped.get_base_model().training_state()
    assert {n: float(t) for n, t in state.items()} == {"features.toy_shift_head.default.found": 0.5}
    fresh = peft.get_peft_model(tiny_feature_model.model(), ShiftConfig()).get_base_model()
    fresh.load_training_state(state)
    assert float(fresh.features.head.found) == 0.5
    with pytest.raises(BadInput, match="cannot be merged"):
        wrapped.merge_and_unload()


def test_what_the_bank_lacks_is_said():
    with pytest.raises(BadInput, match="toy_shift: needs class texts"):
        peft.get_peft_model(tiny_feature_model.model(templates=0), ShiftConfig())
    with pytest.raises(BadInput, match="needs a model of features"):
        peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), ShiftConfig())


def test_prototypes_are_class_means_and_an_absent_class_is_zero():
    bank = tiny_feature_model.model().features.bank
    torch.testing.assert_close(bank.prototypes[1], bank.support[3:6].mean((0, 1)))
    bank.support_labels[:3] = 1
    assert not bank.prototypes[0].any()


def test_registered():
    from mmpeft_ds import backbones

    assert registry.load(backbones, "features", "backbone.name") is ENTRY
