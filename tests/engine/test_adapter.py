"""The adapter directory: written whole, loadable by stock peft, rebuilt from itself alone, refused on another base."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

import mmpeft_ds
from mmpeft_ds import adapter
from mmpeft_ds import recipe as recipes
from mmpeft_ds.adapter_files import CHECKSUMS, FILES, READ_BY_PEOPLE, WEIGHTS, whole, write_checksums
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.errors import BadInput
from tests.helpers import ROOT
from tests.helpers.runs import tiny_adapters, tiny_vqa

IMAGES = [tiny_vqa.png(1), [tiny_vqa.png(2), tiny_vqa.png(3)], None]
TEXTS = ["is it red ?", ["what is it ?", "is a big round ?"], "is it blue ?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    tiny_vqa.prepare(path)
    return path


def logits(loaded: adapter.Loaded, model) -> torch.Tensor:
    with torch.no_grad():
        return model(**loaded.backbone.inputs(loaded.batch(IMAGES, TEXTS))).logits


METHODS = {
    "routed": {},
    "lora": {"method": {"name": "lora", "r": 2}, "backbone": {"condition": "none"}},
    "bf16": {"engine": {"dtype": "bfloat16"}},
}


@pytest.fixture(scope="module", params=METHODS)
def exported(request, folder):
    """A model whose adapter is not at its initial values, and its directory."""
    given = dict(METHODS[request.param])
    method = given.pop("method", None)
    recipe = tiny_vqa.recipe(folder, **given)
    if method:
        recipe.method = method
    resolved = resolve.resolve(recipe)
    torch.manual_seed(7)
    model = resolve.attach(resolved, resolved.backbone.build()).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    target = folder / f"adapter-{request.param}"
    export_adapter(target, model, resolved, {"accuracy": 0.5})
    return target, model, resolved


def test_load_gives_the_logits_of_the_trained_model_to_the_bit(exported):
    target, model, _ = exported
    loaded = mmpeft_ds.load(target)
    assert torch.equal(logits(loaded, loaded.model), logits(loaded, model))
    assert loaded.labels == tiny_vqa.LABELS


def test_stock_peft_loads_it_on_the_base(exported):
    target, model, resolved = exported
    loaded = mmpeft_ds.load(target)
    stock = PeftModel.from_pretrained(resolved.backbone.build(), str(target)).eval()
    assert torch.equal(logits(loaded, stock), logits(loaded, model))


def test_the_adapter_matters(exported):
    """Negative control: without the adapter the logits are others."""
    target, model, _ = exported
    loaded = mmpeft_ds.load(target)
    with loaded.model.disable_adapter():
        assert not torch.equal(logits(loaded, loaded.model), logits(loaded, model))


def test_the_file_holds_the_trained_tensors_in_float32_and_nothing_frozen(exported):
    target, model, _ = exported
    written = load_file(target / WEIGHTS)
    expected = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    assert sorted(tuple(t.shape) for t in written.values()) == sorted(expected)
    assert {t.dtype for t in written.values()} == {torch.float32}


def test_an_adapter_from_before_images_were_scaled_on_tensors_has_the_pixels_that_it_was_trained_with(tmp_path):
    sections = tiny_adapters.sections

    def by_pillow(folder, kind):
        made = sections(folder, kind)
        return made | {"backbone": made["backbone"] | {"image_backend": "pil"}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_adapters, "sections", by_pillow)
        target = tiny_adapters.export(tmp_path, "instruction")
    written = yaml.safe_load((target / "recipe.yaml").read_text())
    del written["backbone"]["image_backend"]
    (target / "recipe.yaml").write_text(yaml.safe_dump(written))
    write_checksums(target)
    loaded = mmpeft_ds.load(target)
    assert loaded.backbone.options.image_backend == "pil"
    assert recipes.of_run(target).backbone["image_backend"] == "pil"
    now = mmpeft_ds.load(target, overrides=["backbone.image_backend=torchvision"])
    assert now.backbone.options.image_backend == "torchvision"


def test_predict_answers_every_text_in_order(exported):
    loaded = mmpeft_ds.load(exported[0])
    rows = loaded.predict(IMAGES, TEXTS, batch=2)
    assert [r["text"] for r in rows] == ["is it red ?", "what is it ?", "is a big round ?", "is it blue ?"]
    assert {r["prediction"] for r in rows} <= set(tiny_vqa.LABELS)


def test_predict_names_a_file_that_is_no_image(exported, tmp_path):
    loaded = mmpeft_ds.load(exported[0])
    (tmp_path / "note.jpg").write_text("text")
    for name in ("note.jpg", "absent.jpg"):
        with pytest.raises(BadInput, match=name):
            loaded.predict([str(tmp_path / name)], ["is it red ?"])
    with pytest.raises(BadInput, match="aspect: 300 x 1 pixels") as refused:
        loaded.predict([torch.zeros(3, 1, 300, dtype=torch.uint8)], ["is it red ?"])
    assert "stored features" not in str(refused.value)


def copy(target: Path, to: Path) -> Path:
    shutil.copytree(target, to)
    return to


def test_another_base_is_refused_by_the_name_of_the_tensor(folder, exported, tmp_path):
    weights = folder / "text" / "model.safetensors"
    before = weights.read_bytes()
    tensors = load_file(weights)
    name = "encoder.layer.1.intermediate.dense.weight"
    flipped = tensors[name].clone()
    flipped.view(torch.int32).view(-1)[5] ^= 1 << 20  # a bit that bfloat16 keeps
    try:
        save_file({**tensors, name: flipped}, weights, metadata={"format": "pt"})
        with pytest.raises(BadInput, match=rf"text_model\.{name}"):
            mmpeft_ds.load(exported[0])
    finally:
        weights.write_bytes(before)


def test_other_feature_statistics_are_refused(exported, tmp_path):
    target = copy(exported[0], tmp_path / "a")
    statistics = json.loads((target / "feature_statistics.json").read_text())
    statistics["mean"][0] += 1e-3
    (target / "feature_statistics.json").write_text(json.dumps(statistics))
    (target / CHECKSUMS).unlink()  # as of a version before
    with pytest.raises(BadInput, match=r"feature_norm\.mean"):
        mmpeft_ds.load(target)


def test_an_incomplete_directory_is_refused(exported, tmp_path):
    target = copy(exported[0], tmp_path / "a")
    (target / "labels.json").unlink()
    with pytest.raises(BadInput, match="labels.json is missing"):
        mmpeft_ds.load(target)


def without(name: str) -> Callable[[dict], dict]:
    return lambda value: {key: item for key, item in value.items() if key != name}


# Kind of the stored old run, file, change of what it holds, and the line. A cache of features is of no size that a
# trained tensor has in common with the list of classes, so that only the comparison of files shows another list.
CONTRADICTIONS = [
    ("composed", "labels.json", lambda labels: [*labels, "more"], "head.out.bias: 4 in the file, 5 here"),
    ("composed", "labels.json", lambda labels: labels[:2] * 2, "each once"),
    ("composed", "feature_statistics.json", without("mean"), "`mean` is no list of numbers"),
    (
        "composed",
        "image_transform.json",
        lambda value: value | {"size": 9},
        "otherwise in training: size was 9 and is",
    ),
    ("composed", "base_fingerprint.json", lambda prints: {}, "says nothing of 79 frozen tensors"),
    ("composed", "base_fingerprint.json", without("feature_norm.mean"), "1 frozen tensors, first feature_norm.mean"),
    ("composed", "backbone.json", lambda value: [value], "holds a list"),
    ("features", "labels.json", lambda labels: labels[:-1], "names 5 classes, and the head was trained for 6"),
    ("features", "labels.json", lambda labels: [*labels, "more"], "names 7 classes, and the head was trained for 6"),
    ("features", "bank.safetensors", without("negative"), "does not hold exactly positive, negative"),
    ("features", "bank.safetensors", lambda bank: bank | {"support": bank["support"][1:]}, "features.bank.support"),
    ("features", WEIGHTS, without("base_model.model.features.tip_adapter_head.alpha"), r"1 of the 3 .* are missing"),
]


@pytest.mark.parametrize("kind, file, change, message", CONTRADICTIONS, ids=lambda value: str(value)[:20])
def test_files_that_contradict_each_other_are_refused_in_a_line(tmp_path, monkeypatch, kind, file, change, message):
    monkeypatch.chdir(ROOT / "tests" / "compatibility" / kind)  # its recipe names the base model relative to there
    path = copy(Path("run/adapter"), tmp_path / "a") / file
    if path.suffix == ".json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path)
    with pytest.raises(BadInput, match=message) as refused:
        mmpeft_ds.load(path.parent)
    assert "\n" not in str(refused.value)


def test_export_replaces_a_directory_as_a_whole(exported):
    target, model, resolved = exported
    (target / "left_over.txt").write_text("old")
    export_adapter(target, model, resolved, {"accuracy": 0.75})
    assert not (target / "left_over.txt").exists()
    assert "0.75" in (target / "README.md").read_text()
    assert [p.name for p in target.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_every_file_of_an_export_follows_the_umask(exported, umask):
    target, model, resolved = exported
    before = os.umask(umask)
    try:
        export_adapter(target, model, resolved, {"accuracy": 0.5})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o666 & ~umask}


def test_an_export_that_lost_a_tensor_does_not_get_its_name(folder, exported, monkeypatch):
    _, model, resolved = exported
    original = PeftModel.save_pretrained

    def forgetful(self, directory, state_dict, **options):
        original(self, directory, state_dict=state_dict, **options)
        path = Path(directory) / WEIGHTS
        tensors = load_file(path)
        first = sorted(tensors)[0]
        save_file({**tensors, first: torch.zeros(0)}, path)

    monkeypatch.setattr(PeftModel, "save_pretrained", forgetful)
    with pytest.raises(RuntimeError, match="1 of them empty"):
        export_adapter(folder / "broken", model, resolved, {})
    assert not (folder / "broken").exists()


def test_the_model_card_says_how_to_load_it(exported):
    card = (exported[0] / "README.md").read_text()
    assert "mmpeft_ds.load" in card and "toy" in card and "CC0-1.0" in card and "accuracy" in card


def test_a_changed_byte_in_any_file_is_noticed_and_the_model_card_may_be_edited(exported, tmp_path, caplog):
    target = copy(exported[0], tmp_path / "a")
    (target / "README.md").write_text("mine")
    assert whole(target) == target
    listed = json.loads((target / CHECKSUMS).read_text())
    assert {path.name for path in target.iterdir()} == {*listed, *READ_BY_PEOPLE}
    for name in listed:
        before = (target / name).read_bytes()
        (target / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(BadInput, match=f"{name}: is not as it was written"):
            whole(target)
        (target / name).write_bytes(before)
    for name in listed:
        (target / CHECKSUMS).write_text(json.dumps({k: v for k, v in listed.items() if k != name}))
        if name in FILES:
            with pytest.raises(BadInput, match=f"leaves out {name}"):
                whole(target)
    (target / CHECKSUMS).write_text(json.dumps(listed | {"gone.json": "0"}))
    with pytest.raises(BadInput, match="gone.json: is missing"):
        whole(target)
    (target / CHECKSUMS).unlink()
    assert not caplog.messages
    assert whole(target) == whole(target) == target, "a directory of a version before"
    (line,) = caplog.messages
    assert line.startswith(f"{target}: has no checksums.json, so a changed number")
