"""Captions by a tiny BLIP: the same bytes for any rank count and after a kill, and a filter that knows no label."""

from __future__ import annotations

import dataclasses
import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration

from data_prep.verify import verify
from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.data.shards import ShardReader, members
from mmpeft_ds.data.writer import PARTS, RawSample, shard_file, write_manifest, write_shard
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.engine.zero.fingerprint import all_tensors, frozen_fingerprint
from mmpeft_ds.errors import BadInput
from mmpeft_ds.precompute import captions as describe
from mmpeft_ds.precompute.caption_maker import weights_hash
from tests.helpers import ROOT, commands, launch
from tests.helpers.models import tiny_backbones, tiny_blip, tiny_mllm

LAUNCHER = ROOT / "launchers" / "describe.py"
LABELS = ["circle", "square", "red", "the"]  # words that the model knows
SAMPLES, PER_SHARD, BAD = 22, 2, 5
# long captions by many beams, so that there is time for a kill
HOW = {"num_beams": 4, "max_new_tokens": 24, "min_new_tokens": 24}
pytestmark = pytest.mark.distributed


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_data(folder: Path, shift: int = 0, **record: object) -> None:
    """Two splits of images with labels, moved by `shift`; the pixels of one image end too early."""
    (folder / PARTS).mkdir(parents=True)
    parts = {}
    for split, count in (("train", SAMPLES), ("test", 3)):
        samples = []
        for i in range(count):
            label = (i + shift) % len(LABELS)
            data = png(i if split == "train" else 100 + i)
            data = data[:-40] if split == "train" and i == BAD else data
            kept = {"label": label, "class_name": LABELS[label], **record}
            samples.append(RawSample(name=f"file {i}", images=[("png", data)], record=kept, features=None))
        parts[split] = [
            write_shard(folder, "toy", split, n, first, samples[first : first + PER_SHARD])
            for n, first in enumerate(range(0, count, PER_SHARD))
        ]
    write_manifest(folder, "toy", "CC0-1.0", {"name": "toy"}, PER_SHARD, parts, LABELS, "train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("describe")
    tiny_blip.write(path / "blip", "captioner")
    write_data(path / "data")
    return path


def arguments(folder: Path, out: str) -> list[str]:
    model = ["--backbone", "blip", "--set", f"model={folder / 'blip'}"]
    how = ["--max-new-tokens", "24", "--num-beams", "4", "--generate", "min_new_tokens=24", "--batch", "2"]
    return ["--data", str(folder / "data"), "--out", str(folder / out), *model, *how]


@pytest.fixture(scope="module")
def one_rank(folder) -> Path:
    """What one process writes, without a launcher."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a rank of the launcher
    out = finish(describer(folder, "one", generation=HOW, batch=2))
    torch.set_num_threads(threads)
    return out


def describer(folder: Path, out: str, data: str = "data", **options: object) -> describe.CaptionMaker:
    raw = {
        "run_dir": "unused",
        "backbone": {"name": "blip", "model": str(folder / "blip")},
        "method": {"name": "lora"},
    }
    recipe, source = recipes.from_dict(raw), Manifest.load(folder / data)
    made = describe.DescribeOptions(str(folder / data), folder / out, **options)
    describe._check(source, made)
    return describe.CaptionMaker(recipe, source, made, torch.device("cpu"))


def finish(made: describe.CaptionMaker, reverse: bool = False) -> Path:
    plan = describe._plan(made)
    for job in plan.todo[:: -1 if reverse else 1]:
        assert made.write(job) is not None
    describe._finish(made, plan)
    return made.options.out


def records(directory: Path, split: str = "train") -> list[dict]:
    manifest = Manifest.load(directory)
    reader = ShardReader(manifest, split)
    wanted = [(n, i) for n, shard in enumerate(manifest.shards(split)) for i in range(shard.samples)]
    return [
        {"key": key, **parts, "json": json.loads(parts["json"])} for key, parts in map(members, reader.read(wanted))
    ]


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


@pytest.mark.slow
def test_two_ranks_that_are_killed_and_started_again_write_what_one_rank_writes(folder, one_rank):
    out = folder / "two"
    with launch.Launch(LAUNCHER, *arguments(folder, "two"), ranks=2):
        end = time.monotonic() + 150
        while not list(out.glob(f"{PARTS}/*.tar.json")) and time.monotonic() < end:
            time.sleep(0.005)
    finished = {p: p.stat().st_mtime_ns for part in out.glob(f"{PARTS}/*.tar.json") for p in [out / part.stem]}
    assert 0 < len(finished) < 13 and not (out / "manifest.json").exists(), "the kill came too early or too late"
    result = launch.run(LAUNCHER, *arguments(folder, "two"), ranks=2)
    assert result.code == 0, result.tail()
    assert content(out) == content(one_rank)
    assert all(p.stat().st_mtime_ns == before for p, before in finished.items()), "a finished shard was made again"


def test_the_shards_are_those_of_the_source_with_captions(folder, one_rank):
    assert verify(str(one_rank)) == []
    before, after = records(folder / "data"), records(one_rank)
    assert len(after) == SAMPLES
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        captions = new["json"].pop("captions")
        assert new == old
        assert [bool(c) for c in captions] == ([] if number == BAD else [True])
    assert len({r["json"].get("label") for r in after}) == len(LABELS)
    source = Manifest.load(one_rank).source
    assert source["described"]["train"] == {
        "bad": 1, "bad_samples": [[f"train-{BAD:09d}", "image"]], "samples": SAMPLES, "captions": SAMPLES - 1,
        "empty": 0, "filtered": 0,
    }  # fmt: skip
    told = source["options"]
    assert told["model"] == str(folder / "blip") and len(told["weights"]) == 64 and told["prompt"] == ""
    assert told["generation"] == HOW


def test_the_captions_are_what_the_stock_model_writes(folder, one_rank):
    made = describer(folder, "unused")
    stock = BlipForConditionalGeneration.from_pretrained(folder / "blip").eval()
    images = [made.transform(torch.from_numpy(np.array(Image.open(io.BytesIO(r["png"])))).permute(2, 0, 1), None)
              for r in records(folder / "data", "test")]  # fmt: skip
    pixels = made.backbone._normalise(made.backbone.collate_images(images)["pixel_values"])
    with torch.no_grad():
        expected = made.backbone._tokens.decode(stock.generate(pixel_values=pixels, **HOW))
    found = [r["json"]["captions"][0] for r in records(one_rank, "test")]
    assert found == expected


def test_a_sample_that_cannot_be_packed_with_the_others_keeps_its_place_without_a_caption(folder):
    made = describer(folder, "uneven", batch=2, splits=("train",), generation={"max_new_tokens": 2})
    transform, odd = made.transform, np.asarray(Image.open(io.BytesIO(png(8))))

    def uneven(image, generator):
        pixels = transform(image, generator)
        same = np.array_equal(image.permute(1, 2, 0).numpy(), odd)
        return torch.nn.functional.pad(pixels, (0, 4)) if same else pixels

    made.transform = uneven
    captions = [r["json"]["captions"] for r in records(finish(made))]
    assert [i for i, c in enumerate(captions) if not c] == [BAD, 8]
    bad = Manifest.load(folder / "uneven").source["described"]["train"]["bad_samples"]
    assert bad == [[f"train-{BAD:09d}", "image"], ["train-000000008", "collate"]]


@pytest.mark.slow
def test_a_finished_directory_is_left_alone_and_another_model_is_refused(folder, one_rank, capsys):
    made = describer(folder, "again", batch=4)
    out = finish(made)
    assert describe._plan(describer(folder, "again", batch=4)).done
    before = content(out)
    for changed in ({"batch": 2}, {"batch": 4, "prompt": "a"}):
        with pytest.raises(BadInput, match="made with") as refused:
            describe._plan(describer(folder, "again", **changed))
        assert "\n" not in str(refused.value)
    other = describer(folder, "again", batch=4)
    with torch.no_grad():
        other.model.vision_model.embeddings.class_embedding += 1
    prints = frozen_fingerprint(all_tensors(other.model))
    assert weights_hash(prints) != made.origin["weights"]
    assert content(out) == before


@pytest.mark.slow
def test_sampled_captions_depend_on_the_place_in_the_data_set_alone(folder):
    options = {"captions": 3, "generation": {"do_sample": True, "max_new_tokens": 6}, "batch": 2, "splits": ("train",)}
    forward = finish(describer(folder, "forward", **options))
    backward = finish(describer(folder, "backward", **options), reverse=True)
    assert content(forward) == content(backward)
    captions = [r["json"]["captions"] for r in records(forward)]
    assert all(len(c) == 3 for i, c in enumerate(captions) if i != BAD)
    assert any(len(set(c)) > 1 for c in captions)
    other = finish(describer(folder, "other", seed=1, **options))
    assert captions != [r["json"]["captions"] for r in records(other)]


def test_permuted_labels_change_no_caption_and_all_class_names_are_gone(folder):
    write_data(folder / "permuted", shift=1)
    drawn = {"do_sample": True, "max_new_tokens": 12}  # of many words
    options = {"remove_class_names": True, "generation": drawn, "splits": ("train",), "batch": 2}
    mine = records(finish(describer(folder, "blind", **options)))
    other = records(finish(describer(folder, "blind_permuted", "permuted", **options)))
    assert [r["json"]["captions"] for r in mine] == [r["json"]["captions"] for r in other]
    assert [r["json"]["label"] for r in mine] != [r["json"]["label"] for r in other]
    words = " ".join(c for r in mine for c in r["json"]["captions"]).split()
    assert words and not set(words) & set(LABELS)
    # negative control: unfiltered captions do name classes, other than the image's own too
    plain = records(finish(describer(folder, "plain", **{**options, "remove_class_names": False})))
    named = [(set(c.split()) & set(LABELS), r["json"]["class_name"]) for r in plain for c in r["json"]["captions"]]
    assert any(names - {own} for names, own in named)
    told = Manifest.load(folder / "blind").source["described"]["train"]
    assert told["filtered"] == sum(bool(names) for names, _ in named) > 0


def test_an_adapter_directory_of_ours_describes(folder):
    backbone = {"name": "blip", "model": str(folder / "blip")}
    raw = {"run_dir": "unused", "backbone": backbone, "method": {"name": "graph_lora", "near_identity": False}}
    recipe = recipes.from_dict(raw)
    recipe.data.sources = [SourceOptions(str(folder / "data"), task={"name": "captioning"})]
    recipe = recipes.filled(recipe)
    entry, config = resolve.make_method(recipes.components(recipe).method)
    made = resolve.make_backbone(recipes.components(recipe).backbone, recipe.engine, None)
    parts = resolve.Resolved(recipe, {}, made, entry, config, [], [], None, None)
    torch.manual_seed(5)
    model = resolve.attach(parts, made.build())
    export_adapter(folder / "adapter", model, parts, {})
    source = Manifest.load(folder / "data")
    options = describe.DescribeOptions(str(folder / "data"), folder / "tuned", splits=("test",))
    ours = describe.CaptionMaker(recipe, source, options, torch.device("cpu"), adapter_dir=folder / "adapter")
    plain = describer(folder, "frozen", splits=("test",))
    assert ours.origin["weights"] != plain.origin["weights"] and ours.origin["adapter"]
    tuned, frozen = records(finish(ours), "test"), records(finish(plain), "test")
    assert len(tuned) == len(frozen) == 3
    assert [r["json"]["captions"] for r in tuned] != [r["json"]["captions"] for r in frozen]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": 2}, "do_sample"),
        ({"field": "a b"}, "--field"),
        ({"splits": ("val",)}, "no split"),
        ({"batch": 0}, "--batch"),
        ({"name": "A.b"}, "--name"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(folder, options, message):
    with pytest.raises(BadInput, match=message) as refused:
        describer(folder, "refused", **options)
    assert "\n" not in str(refused.value)


def test_captions_of_people_are_replaced_only_when_asked(folder):
    write_data(folder / "told", captions=["of people"])
    with pytest.raises(BadInput, match="already"):
        describer(folder, "told_again", "told")
    out = finish(describer(folder, "told_again", "told", replace=True, splits=("test",)))
    assert all(r["json"]["captions"] != ["of people"] for r in records(out, "test"))


def test_an_option_that_generate_does_not_know_is_one_line(folder):
    made = describer(folder, "unknown", generation={"no_such_option": 1})
    plan = describe._plan(made)
    with pytest.raises(BadInput, match="--generate: .*no_such_option") as refused:
        made.write(plan.todo[0])
    assert "\n" not in str(refused.value)


def test_a_backbone_that_writes_nothing_is_refused(folder):
    raw = {"run_dir": "x", "backbone": {"name": "blip", "model": str(folder / "blip"), "form": "retrieval"},
           "method": {"name": "lora"}}  # fmt: skip
    options = describe.DescribeOptions(str(folder / "data"), folder / "mute")
    with pytest.raises(BadInput, match="generates no text"):
        describe.CaptionMaker(recipes.from_dict(raw), Manifest.load(folder / "data"), options, torch.device("cpu"))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_models_that_converse_describe_too(folder, family):
    model = tiny_mllm.write(folder / family, family)
    raw = {"run_dir": "unused", "backbone": {"name": "mllm", "model": str(model)}, "method": {"name": "lora"}}
    source = Manifest.load(folder / "data")
    how = {"max_new_tokens": 3, "min_new_tokens": 3}
    options = describe.DescribeOptions(
        str(folder / "data"), folder / f"by_{family}", splits=("test",), prompt="what is it", generation=how, batch=2
    )
    made = describe.CaptionMaker(recipes.from_dict(raw), source, options, torch.device("cpu"))
    found = [r["json"]["captions"] for r in records(finish(made), "test")]
    assert [len(c) for c in found] == [1, 1, 1]
    options = dataclasses.replace(options, out=folder / f"alone_by_{family}", batch=1)
    alone = describe.CaptionMaker(recipes.from_dict(raw), source, options, torch.device("cpu"))
    assert [r["json"]["captions"] for r in records(finish(alone), "test")] == found, "padding changed a caption"


def test_a_vision_tower_before_a_language_model_describes_too(folder, tmp_path):
    backbone = tiny_backbones.MAKERS["vision_text_decoder"](tmp_path)
    section = {"name": "vision_text_decoder", **dataclasses.asdict(backbone.options)}
    raw = {"run_dir": "unused", "backbone": section, "method": {"name": "lora"}}
    options = describe.DescribeOptions(
        str(folder / "data"), tmp_path / "out", splits=("test",), generation={"max_new_tokens": 3}
    )
    source = Manifest.load(folder / "data")
    made = describe.CaptionMaker(recipes.from_dict(raw), source, options, torch.device("cpu"))
    assert [len(r["json"]["captions"]) for r in records(finish(made), "test")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "which model?"),
        (["--backbone", "blip", "--adapter", "x"], "which model?"),
        (["--backbone", "blip", "--generate", "beams"], "KEY=VALUE"),
        (["--backbone", "blip", "--set", "modle=x"], "modle"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(folder, args, words, monkeypatch, capsys):
    command = ["--data", str(folder / "data"), "--out", str(folder / "no"), *args]
    alone = SimpleNamespace(rank=0, device=torch.device("cpu"))
    monkeypatch.setattr(describe.processes, "start", lambda *given: alone)
    code = commands.run_script(LAUNCHER, command, monkeypatch)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and words in line


def test_shard_names_are_those_of_the_source_unless_named(folder):
    out = finish(describer(folder, "named", name="other", splits=("test",)))
    assert Manifest.load(out).name == "other" and (out / shard_file("other", "test", 0)).is_file()
