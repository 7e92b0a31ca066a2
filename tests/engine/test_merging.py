"""An adapter folded into its base: a plain folder that says what the adapted model said."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, CLIPModel, CLIPTextModel, CLIPVisionModel

from mmpeft_ds import adapter, adapter_files, merging
from mmpeft_ds import recipe as recipes
from mmpeft_ds.backbones.dual_encoder.backbone import ENTRY, Options
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.errors import BadInput
from tests.helpers.models import tiny_clip, tiny_towers
from tests.helpers.runs import tiny_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("merging")
    tiny_towers.write_vision(path / "vision", "dinov2")
    tiny_towers.write_text(path / "text", "bert")
    tiny_clip.write(path / "clip", "clip")
    return path


def backbone_section(folder: Path, name: str, **options) -> dict:
    towers = {"vision": str(folder / "vision"), "text": str(folder / "text"), "image_size": 8, "max_text_length": 19}
    sections = {
        "dual_encoder": {**towers, "projection": "mlp", "width": 12, "train_logit_scale": True},
        "vision_text_encoder": {**towers, "vision_feature": "cls", "head_input": "raw", "num_labels": 5},
        "clip": {"model": str(folder / "clip")},
    }
    return {"name": name, **sections[name], **options}


def exported(
    folder: Path, place: Path, method: dict, name: str = "dual_encoder", dtype: str = "float32", **options
) -> tuple[Path, object]:
    """The directory of an adapter whose trained values are not those it began with, and the adapted model."""
    recipe = recipes.Recipe(run_dir=str(place), backbone=backbone_section(folder, name, **options), method=method)
    recipe.engine.dtype = dtype
    resolved = tiny_classifier.make_resolved(recipes.filled(recipe), tiny_classifier.TinyTask())
    resolved.train, resolved.validation = [], []  # no data set is needed to merge
    torch.manual_seed(7)
    model = resolve.attach(resolved, resolved.backbone.build()).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    export_adapter(place / "adapter", model, resolved, {})
    return place / "adapter", model


def said_by_the_merged(out: Path, name: str, batch, **options) -> list[torch.Tensor]:
    entry = {"dual_encoder": ENTRY}[name]
    backbone = entry(Options(model=str(out), **options), None)
    backbone.check()
    return merging.outputs(backbone.build().eval(), backbone, batch)


@pytest.mark.parametrize("images", ["live", "stored"])
def test_a_merged_dual_encoder_is_taken_by_its_directory_and_says_what_the_adapted_said(folder, tmp_path, images):
    target, _ = exported(folder, tmp_path, {"name": "lora", "r": 2}, images=images)
    told = merging.merge(target, tmp_path / "merged")
    assert told["largest_difference"] < 1e-6
    adapted = adapter.load(target, overrides=["backbone.images=live"])  # whole towers, whatever was trained on
    batch = merging.probe(adapted.backbone)
    want = merging.outputs(adapted.model, adapted.backbone, batch)
    got = said_by_the_merged(tmp_path / "merged", "dual_encoder", batch, max_text_length=19)
    assert len(got) == len(want) == 2
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    with adapted.model.disable_adapter():  # negative control
        frozen = merging.outputs(adapted.model, adapted.backbone, batch)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(frozen, want, strict=True))
    scale = adapted.model.get_base_model().logit_scale()
    plain = AutoModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain.logit_scale(), scale, check_device=False)
    assert not any("lora" in name or "modules_to_save" in name for name, _ in plain.named_parameters())
    words = "a red circle"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(words) == AutoTokenizer.from_pretrained(folder / "text")(
        words
    )
    assert json.loads((tmp_path / "merged" / "merged.json").read_text())["method"] == "lora"


def test_a_vision_tower_whose_processor_file_names_no_class_is_merged_too(folder, tmp_path):
    """transformers takes the class from the tower's configuration, which the merged folder does not have."""
    shutil.copytree(folder / "vision", tmp_path / "vision")
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    target, _ = exported(folder, tmp_path, {"name": "lora", "r": 2}, vision=str(tmp_path / "vision"))
    merging.merge(target, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["pixel_mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_every_file_of_a_merged_folder_follows_the_umask(folder, tmp_path, umask):
    target, _ = exported(folder, tmp_path, {"name": "bitfit"}, "vision_text_encoder")
    before = os.umask(umask)
    try:
        merging.merge(target, tmp_path / "merged")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "merged").iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("method", ["lora", "layer_norm", "bitfit", "ia3", "aurora"])
def test_whatever_changes_weights_alone_can_be_merged(folder, tmp_path, method):
    target, model = exported(folder, tmp_path, {"name": method}, "vision_text_encoder")
    told = merging.merge(target, tmp_path / "merged")
    assert told["largest_difference"] < 1e-5
    backbone = adapter.load(target).backbone
    batch = merging.probe(backbone)
    plain = AutoModel.from_pretrained(tmp_path / "merged").eval()
    want, got = (merging.outputs(m.eval(), backbone, batch)[0] for m in (model, plain))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert not isinstance(plain, peft.PeftModel)


def test_a_merged_clip_is_a_stock_model(folder, tmp_path):
    target, model = exported(folder, tmp_path, {"name": "routed_lora", "route": "none", "r": 2}, "clip")
    merging.merge(target, tmp_path / "merged")
    backbone = adapter.load(target).backbone
    batch = merging.probe(backbone)
    stock = CLIPModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        got = stock(
            **{k: v for k, v in backbone.inputs(batch).items() if k not in ("image_owner", "text_owner", "num_slots")}
        )
    want = merging.outputs(model, backbone, batch)
    torch.testing.assert_close(got.image_embeds, want[0])
    torch.testing.assert_close(got.text_embeds, want[1])


@pytest.mark.parametrize(
    "method",
    [
        {"name": "adapter"},
        {"name": "deep_prompt"},
        {"name": "p_adapter"},
        {"name": "routed_lora", "route": "mul"},
    ],
    ids=lambda method: method["name"],
)
def test_what_is_no_change_of_weights_is_refused_in_one_line(folder, tmp_path, method):
    target, _ = exported(folder, tmp_path, method, "vision_text_encoder")
    with pytest.raises(BadInput, match="merge") as error:
        merging.merge(target, tmp_path / "merged")
    assert "\n" not in str(error.value) and not (tmp_path / "merged").exists()


def dtypes(value) -> set[str]:
    """Every dtype that a configuration says anywhere."""
    if isinstance(value, dict):
        own = {str(v) for k, v in value.items() if k in ("dtype", "torch_dtype")}
        return own.union(*map(dtypes, value.values()))
    return set()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("clip", {"name": "lora", "r": 2}),
        ("dual_encoder", {"name": "lora", "r": 2, "init_lora_weights": "pissa"}),
        ("vision_text_encoder", {"name": "bitfit"}),
    ],
)
def test_a_folder_of_a_bfloat16_run_says_float32_everywhere(folder, tmp_path, name, method):
    target, _ = exported(folder, tmp_path, method, name, dtype="bfloat16")
    merging.merge(target, tmp_path / "merged")
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float32}
    assert dtypes(json.loads((tmp_path / "merged" / "config.json").read_text())) == {"float32"}
    if name == "clip":
        for tower in (CLIPVisionModel, CLIPTextModel):
            assert tower.from_pretrained(tmp_path / "merged").dtype == torch.float32


def break_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"hidden_size"', '"hidden_sizes"'))


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_a_bit(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_config, "not written, since CLIPModel"),
        (drop_a_tensor, "not written, since CLIPModel reads other weights"),
        (change_a_bit, "not written, since CLIPModel reads other weights"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "not written, since CLIPModel cannot open"),
    ],
)
def test_a_folder_that_does_not_open_is_not_written(folder, tmp_path, monkeypatch, damage, says):
    target, _ = exported(folder, tmp_path, {"name": "bitfit"}, "clip")
    copied = merging._copy_files

    def damaged(section, out):
        copied(section, out)
        damage(out)

    monkeypatch.setattr(merging, "_copy_files", damaged)
    with pytest.raises(BadInput, match=says) as error:
        merging.merge(target, tmp_path / "merged")
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_a_merge_that_lost_something_is_refused(folder, tmp_path, monkeypatch):
    """Negative control of the comparison."""
    target, _ = exported(folder, tmp_path, {"name": "lora", "r": 2})
    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(BadInput, match="differ by"):
        merging.merge(target, tmp_path / "merged")


def test_a_wrong_place_is_refused(folder, tmp_path):
    with pytest.raises(BadInput, match="no adapter directory"):
        merging.merge(tmp_path / "nowhere", tmp_path / "merged")
    with pytest.raises(BadInput, match="exists"):
        merging.merge(tmp_path / "nowhere", tmp_path)


def test_the_place_of_the_adapter_is_named_for_a_run_and_what_reads_an_adapter_of_peft_alone(tmp_path):
    inner = tmp_path / "adapter"
    inner.mkdir()
    for name in (adapter_files.CONFIG, adapter_files.WEIGHTS):
        (inner / name).touch()
    with pytest.raises(BadInput, match=f"{tmp_path}: holds no adapter itself. Did you mean {inner}?"):
        adapter_files.whole(tmp_path)
    with pytest.raises(BadInput, match="adapter of peft without the recipe .* `start_from`"):
        adapter_files.whole(inner)
