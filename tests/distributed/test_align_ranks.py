"""Two towers aligned through the engine, from pixels and from stored features, CoOp and MMRL on what comes out, and a
tower joined to a language model by a projection: the same on 1 and 2 ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmpeft_ds import adapter, adapter_files, merging
from mmpeft_ds.backbones.dual_encoder import backbone as dual_encoder
from mmpeft_ds.data.batch import Sample, pack
from mmpeft_ds.data.decode import decode
from mmpeft_ds.data.writer import PARTS, RawSample, write_manifest, write_shard
from tests.helpers import launch
from tests.helpers.models import tiny_clip, tiny_towers
from tests.helpers.runs import tiny_vqa

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.train_recipes"
CLASSES = ["red circle", "blue square", "big shape"]
WORDS = ["round", "what color", "it is there"]


def samples() -> list[RawSample]:
    """Images of three classes, each with two captions that nobody else has."""
    found = []
    for i in range(21):
        name = CLASSES[i % 3]
        captions = [f"a {name} {WORDS[i % 7 % 3]}", f"{WORDS[i % 5 % 3]} the {name}" + " a" * (i % 4)]
        record = {"captions": captions, "label": i % 3, "class_name": name}
        images = [("png", tiny_vqa.png(i))]
        found.append(RawSample(name=f"source {i}", images=images, record=record, features=None))
    return found


def write(folder: Path, made: list[RawSample], **options) -> None:
    (folder / PARTS).mkdir(parents=True)
    parts = [write_shard(folder, "toy", "train", n, n * 7, made[n * 7 : n * 7 + 7]) for n in range(3)]
    write_manifest(folder, "toy", "CC0-1.0", {"name": "toy"}, 7, {"train": parts}, CLASSES, "train", **options)


@torch.no_grad()
def write_features(folder: Path) -> None:
    """What the towers make of the same images, in place of pixels."""
    backbone = dual_encoder.ENTRY(dual_encoder.Options(**towers(folder)), None)
    model, transform = backbone.build().eval(), backbone.image_transform(False)
    made = samples()
    for sample in made:
        pixels = transform(decode(sample.images[0][1]))
        batch = pack([Sample("x", 1.0, [pixels])], backbone.collate_images, backbone.collate_texts, lambda t: {})
        sample.features, sample.images = backbone.embed(model, batch)[0].numpy(), []
    section = {"name": "dual_encoder", **dataclasses.asdict(backbone.options)}
    described = {"key": backbone.towers_key(), "backbone": section, "compute": "float32", "views": 0}
    widths = dict(zip(("image_width", "text_width"), backbone.feature_widths, strict=True))
    write(folder / "stored", made, towers={**described, **widths})


def towers(folder: Path) -> dict:
    vision, text = str(folder / "vision"), str(folder / "text")
    return {"vision": vision, "text": text, "image_size": 8, "max_text_length": 19, "text_feature": "mean"}


def recipe(folder: Path, name: str, stage: int, ranks: int) -> Path:
    aligned = {"name": "dual_encoder", **towers(folder), "projection": "mlp", "width": 12, "train_logit_scale": True}
    contrast = {"name": "retrieval", "loss": "contrast", "rerank": 0, "captions": 1}
    classify = {"name": "classification"}
    lora, coop = {"name": "lora", "r": 2}, {"name": "coop", "context": 4, "init_std": 0.3}
    clip = {"name": "clip", "model": str(folder / "clip")}
    writer = {"name": "vision_text_decoder", "vision": str(folder / "wide"), "text": str(folder / "decoder")}
    writer |= {"image_size": 8, "max_text_length": 19, "projection": "mlp", "prefix": "tokens"}
    routed = {"name": "routed_lora", "r": 2, "route": "mul"}
    backbone, method, task, data = {
        "live": (aligned, lora, contrast, "toy"),
        "captioner": (writer, routed, {"name": "captioning", "num_beams": 2, "max_new_tokens": 4}, "toy"),
        "stored": ({**aligned, "images": "stored"}, lora, contrast, "stored"),
        "coop_bert": (
            {"name": "features", "encoder": aligned, "images": "live", "texts": "none"},
            coop,
            classify,
            "toy",
        ),
        "coop_clip": (
            {"name": "features", "encoder": clip, "images": "live", "texts": "none"},
            {**coop, "class_specific": True, "position": "middle"},
            classify,
            "toy",
        ),
        **{
            f"mmrl_{kind}": (
                {"name": "features", "encoder": encoder, "images": "live", "texts": "none"},
                {"name": "mmrl", "tokens": 2, "width": 6, "first_layer": 2},
                classify,
                "toy",
            )
            for kind, encoder in (("bert", aligned), ("clip", clip))
        },
    }[name]
    source = {"dir": str(folder / data), "task": task}
    content = {
        "run_dir": str(folder / f"{name}-{ranks}"),
        "backbone": backbone,
        "method": method,
        "data": {"sources": [source], "validation": [source], "global_batch": 8, "workers": 0},
        "optim": {"epochs": 2, "lr": 0.01, "warmup": 0.0},
        "engine": {"deepspeed": f"ds_configs/zero{stage}.json"},
        "monitor": {"tensorboard": False},
    }
    path = folder / f"{name}-{ranks}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


NAMES = ("live", "stored", "captioner", "coop_bert", "coop_clip", "mmrl_bert", "mmrl_clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("align")
    tiny_towers.write_vision(path / "vision", "dinov2")
    tiny_towers.write_text(path / "text", "bert")
    tiny_towers.write_vision(path / "wide", "dinov2", width=32)
    tiny_towers.write_decoder(path / "decoder", "llama")
    tiny_clip.write(path / "clip", "clip")
    write(path / "toy", samples())
    write_features(path)
    for ranks, stage in ((2, 3), (1, 0)):
        recipes = [str(recipe(path, name, stage, ranks)) for name in NAMES]
        result = launch.run_forked(SCRIPT, *recipes, ranks=ranks)
        assert result.code == 0 and not result.killed, result.tail()
    return path


def weights(folder: Path, name: str, ranks: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}-{ranks}" / "adapter" / adapter_files.WEIGHTS)


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], atol=2e-4, rtol=2e-4, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_under_zero_3_train_as_one(folder, name):
    assert_equal(weights(folder, name, 2), weights(folder, name, 1))


def test_stored_features_train_as_pixels_do(folder):
    """Two captions of a sample are drawn alike, and there are no augmented passes."""
    assert_equal(weights(folder, "stored", 1), weights(folder, "live", 1))


def test_the_comparison_would_notice_an_untrained_adapter(folder):
    loaded = adapter.load(folder / "live-1" / "adapter")
    for module in ("text_projection", "logit_scale"):
        wrapped = loaded.model.get_base_model().get_submodule(module)
        pairs = zip(
            wrapped.original_module.parameters(), wrapped.modules_to_save["default"].parameters(), strict=False
        )
        assert module == "logit_scale" or max(float((a - b).abs().max()) for a, b in pairs) > 1e-2
    one, other = weights(folder, "live", 1), weights(folder, "coop_bert", 1)
    with pytest.raises(AssertionError):
        assert_equal(one, other)
    with pytest.raises(AssertionError):
        assert_equal(one, {name: weight * 1.01 for name, weight in one.items()})


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_projection_trains_and_travels_with_its_adapter(folder, ranks):
    names = [n for n in weights(folder, "captioner", ranks) if "vision_projection" in n]
    assert len(names) == 6
    loaded = adapter.load(folder / f"captioner-{ranks}" / "adapter")
    projection = loaded.model.get_base_model().vision_projection
    for name, trained in projection.modules_to_save["default"].named_parameters():
        assert torch.equal(trained, weights(folder, "captioner", ranks)[f"base_model.model.vision_projection.{name}"])
        assert not torch.equal(trained, projection.original_module.get_parameter(name))
    rows = loaded.predict([sample.images[0][1] for sample in samples()[:2]])
    assert len(rows) == 2 and all(isinstance(row["prediction"], str) for row in rows)


@pytest.mark.parametrize("name", ["coop_bert", "coop_clip"])
def test_of_coop_only_the_context_is_saved(folder, name):
    (context,) = weights(folder, name, 2).values()
    assert context.shape == ((4, 16) if name == "coop_bert" else (3, 4, 16))
    assert float(context.std()) > 0.05


@pytest.mark.parametrize(("name", "layers"), [("mmrl_bert", 2), ("mmrl_clip", 1)])
def test_of_mmrl_space_aligners_and_projection_are_saved(folder, name, layers):
    saved = weights(folder, name, 2)
    assert len(saved) == 3 + 2 * 2 * layers  # with the classes that were trained
    assert saved["base_model.model.features.mmrl_head.trained_classes"].tolist() == [1, 1, 1]
    assert saved["base_model.model.features.mmrl_head.space.tokens"].shape == (2, 6)


def test_an_adapter_of_mmrl_is_loaded_and_predicts_from_pictures(folder):
    pictures, rows = [sample.images[0][1] for sample in samples()[:6]], []
    for ranks in (1, 2):
        # not over the two towers, whose projections are random again in every process
        loaded = adapter.load(folder / f"mmrl_clip-{ranks}" / "adapter")
        rows.append(loaded.predict(pictures, [""] * len(pictures)))
        assert loaded.model.get_base_model().features.head.config.tokens == 2
    for one, other in zip(*rows, strict=True):
        assert one["prediction"] == other["prediction"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-3)


def test_what_was_aligned_on_stored_features_is_merged_with_its_vision_tower(folder, tmp_path):
    told = merging.merge(folder / "stored-2" / "adapter", tmp_path / "merged")
    assert told["largest_difference"] < 1e-5
    loaded = adapter.load(folder / "live-2" / "adapter")
    batch = merging.probe(loaded.backbone)
    want = merging.outputs(loaded.model, loaded.backbone, batch)
    options = {"model": str(tmp_path / "merged"), "max_text_length": 19}
    entry = type(loaded.backbone)
    backbone = entry(entry.Options(**options), None)
    got = merging.outputs(backbone.build().eval(), backbone, batch)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
