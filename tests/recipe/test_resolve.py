"""A recipe becomes its parts, or one line says why it cannot."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.backbones.blip import options as blip_options
from mmpeft_ds.data import order
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.subset import Subset
from mmpeft_ds.engine import plan, streams
from mmpeft_ds.engine.assembly import idle, resolve
from mmpeft_ds.engine.zero.resident import Tensors
from mmpeft_ds.errors import BadInput
from tests.helpers.runs import tiny_vqa


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    tiny_vqa.prepare(path)
    return path


def load(folder, *overrides):
    return recipes.load(folder / "recipe.yaml", list(overrides))


def refusal(folder, *overrides) -> str:
    with pytest.raises(BadInput) as caught:
        resolve.resolve(load(folder, *overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parts_of_a_good_recipe(folder):
    resolved = resolve.resolve(load(folder))
    assert resolved.labels == tiny_vqa.LABELS
    assert [s.options.split for s in (*resolved.train, *resolved.validation)] == ["train", "val"]
    assert resolved.train[0].task.options.loss == "ce"
    assert resolved.method_config.r == 2 and resolved.ds_config["zero_optimization"]["stage"] == 3
    assert resolved.recipe.backbone["head_layers"] == 2, "defaults of the component are filled in"


def test_expanding_twice_changes_nothing_and_the_copy_reads_back(folder):
    once = recipes.filled(load(folder))
    assert recipes.filled(once) == once and once != load(folder)
    assert recipes.from_dict(recipes.to_dict(once)) == once


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("backbone.name=vision_text_encoder2", ["backbone.name", "'vision_text_encoder'"]),
        ("backbone.image_sise=70", ["--set backbone.image_sise", "unknown key", "'image_size'"]),
        ("backbone.head_layers=3", ["--set backbone.head_layers", "1, 2"]),
        ("backbone={}", ["backbone", "`name` is missing"]),
        ("method.name=rooted_lora", ["method.name", "'routed_lora'"]),
        ("method.r=two", ["--set method.r", "expected an integer"]),
        ("backbone.nam=clip", ["--set backbone.nam", "Did you mean 'name'?", "Known: name, "]),
        ("method.peft_type=LORA", ["method.peft_type", "unknown key"]),
        ("method.r=0", ["method", "r: must be 1 or more"]),
        ("method.layers=[9]", ["method", "9"]),
        ("data.sources.0.task.loss=l2", ["--set data.sources.0.task.loss", "bce, ce"]),
        ("data.sources.0.task.name=vqb", ["data.sources.0.task.name", "'vqa'"]),
        ("data.sources.0.split=tset", ["data.sources.0", "no split 'tset'", "train, val"]),
        ("data.sources.0.dir=nowhere", ["data.sources.0", "nowhere/manifest.json", "not found", "prepare"]),
        ("data.sources.0.dir='pipe:cat x'", ["data.sources.0", "pipe:", "allow_pipe"]),
        ("data.sources=[]", ["data.sources", "empty"]),
        ("data.global_batch=0", ["data.global_batch", "must lie in [1, ", "got 0"]),
        ("data.global_batch=1000000000000", ["data.global_batch", "must lie in [1, 4,194,304]"]),
        ("data.workers=1000000", ["data.workers", "must lie in [0, 1,024]"]),
        ("optim.lr=-1", ["optim.lr", "above 0"]),
        ("optim.lr=.nan", ["optim.lr", "above 0"]),
        ("optim.accumulation=4", ["optim.accumulation", "does not divide", "6"]),
        ("engine.deepspeed=ds_configs/zero9.json", ["engine.deepspeed", "zero9.json"]),
        ("backbone.condition=none", ["method", "condition"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(folder, override, words):
    line = refusal(folder, override)
    assert all(word in line for word in words), line


def test_early_stopping_without_validation_is_refused(folder):
    assert "data.validation" in refusal(folder, "data.validation=[]", "engine.patience=2")


def test_a_key_that_recipe_and_json_both_own_is_refused(folder, tmp_path):
    config = tmp_path / "mine.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 8}))
    line = refusal(folder, f"engine.deepspeed={config}")
    assert "train_batch_size" in line and "data.global_batch" in line


def test_missing_feature_statistics_name_the_command_that_makes_them(folder):
    line = refusal(folder, "backbone.image_size=16")  # another transform, so other statistics
    assert "data_prep/feature_stats.py" in line and str(folder / "recipe.yaml") in line


def test_accumulation_is_refused_where_the_loss_couples_samples(folder, monkeypatch):
    from mmpeft_ds.tasks.vqa import task as vqa

    assert resolve.resolve(load(folder, "optim.accumulation=2"))
    monkeypatch.setattr(vqa.Vqa, "couples_samples", True)
    assert resolve.resolve(load(folder))
    assert "couples" in refusal(folder, "optim.accumulation=2")


def test_records_without_the_fields_of_the_task_are_refused(folder, monkeypatch):
    from mmpeft_ds.tasks.vqa.options import Options

    monkeypatch.setattr(Options, "fields", {"": ("captions",)})
    assert "captions" in refusal(folder)


@pytest.fixture
def captions(folder, tmp_path):
    """The toy data set with captions in place of questions, as its manifest says."""
    data = Manifest.load(load(folder).data.sources[0].dir)
    data.labels, data.label_counts = None, None
    for split, shards in data.splits.items():
        for name in [s.file for s in shards] + [data.index[split].file]:
            (tmp_path / name).write_bytes((Path(data.dir) / name).read_bytes())
        stats = {"type": "list", "present": 12, "min": 1, "mean": 1, "max": 1}
        data.fields[split] = {"captions": stats, "captions[]": {**stats, "type": "str"}}
    data.save(tmp_path)
    return [f"data.{role}.0.dir={tmp_path}" for role in ("sources", "validation")]


def test_a_task_that_does_not_fit_the_records_is_told_before_what_only_it_needs(folder, captions):
    """Captions and a recipe for questions: neither the number of labels nor a list of them is asked for."""
    said = refusal(folder, *captions)
    assert "the task is vqa" in said and "hold captions" in said and "label" not in said
    assert "captioning or retrieval" in said and "recipes/retrieval_own.yaml" in said
    said = refusal(folder, "data.sources.0.task={name: captioning}")
    assert "hold questions" in said and "vqa" in said and "answering" in said
    said = refusal(folder, *captions, "data.sources.0.task={name: retrieval}", "data.validation.0.task={name: vqa}")
    assert "data.validation.0.task" in said, "negative control: captions are what retrieval reads"


def test_a_data_set_that_brings_the_vision_tower_no_picture_is_told_before_training(folder, tmp_path, capsys):
    data = Manifest.load(load(folder).data.sources[0].dir)
    for split, shards in data.splits.items():
        for name in [s.file for s in shards] + [data.index[split].file]:
            (tmp_path / name).write_bytes((Path(data.dir) / name).read_bytes())

    def notes(images, **more):
        for fields in data.fields.values():
            fields["images"] = {"type": "images", "present": 12, "min": 0, "mean": 1, "max": 1, **images}
            fields.update(more)
        data.save(tmp_path)
        sources = [f"data.{role}.0.dir={tmp_path}" for role in ("sources", "validation")]
        report = plan.make(resolve.resolve(load(folder, *sources)))
        plan.show(report)
        shown = " ".join(capsys.readouterr().out.split())
        assert all("".join(line.split()) in "".join(shown.split()) for line in report["notes"])
        return report["notes"]

    assert notes({"min": 1}) == []
    assert [("some samples have no images" in n, str(tmp_path) in n) for n in notes({})] == [(True, True)] * 2
    extra = {"extra.images[]": {"type": "str", "present": 12, "min": 5, "mean": 5, "max": 5}}
    train, val = notes({"mean": 0, "max": 0}, **extra)
    assert train.startswith("data.sources.0: ") and "no sample has images" in train and "other keys: images." in train
    assert val.startswith("data.validation.0: ")


RETRIEVAL = "{name: retrieval, loss: contrast, rerank: 0}"


@pytest.fixture
def retrieval(folder, captions):
    """Overrides that make a retrieval run of it: 30 samples."""
    pair = f"{{name: dual_encoder, vision: {folder}/vision, text: {folder}/text, image_size: 8, max_text_length: 12}}"
    tasks = [f"data.{role}.0.task={RETRIEVAL}" for role in ("sources", "validation")]
    return [*captions, *tasks, f"backbone={pair}", "method={name: lora}"]


def test_contrast_with_nothing_to_contrast_is_refused(folder, retrieval):
    """The loss of a step with one pair is 0, and was so on every step without a word."""
    assert resolve.resolve(load(folder, *retrieval, "data.global_batch=2"))
    line = refusal(folder, *retrieval, "data.global_batch=1")
    assert "--set data.global_batch: 1" in line and "retrieval" in line and "such as 30" in line
    assert resolve.resolve(load(folder, "data.global_batch=1")), "negative control: questions need no others"


def test_steps_that_are_not_what_was_meant_are_remarked(folder, retrieval):
    def remarks(*overrides):
        return resolve.resolve(load(folder, *retrieval, *overrides)).remarks

    assert remarks("optim.max_steps=500") == []
    (line,) = remarks("optim.max_steps=500", "data.global_batch=4096")
    assert "30 samples" in line and "4,096" in line
    (line,) = remarks("optim.max_steps=500", "data.global_batch=29")
    assert "holds one sample" in line and "data.last_batch: drop" in line
    assert remarks("optim.max_steps=500", "data.global_batch=29", "data.last_batch=drop") == []


def test_a_run_of_few_steps_is_remarked_unless_it_was_asked_for(folder):
    (line,) = resolve.resolve(load(folder)).remarks
    assert "10 steps in all" in line and "optim.epochs=40 would give about 200" in line
    assert resolve.resolve(load(folder, "optim.max_steps=10")).remarks == []
    assert resolve.resolve(load(folder, "optim.epochs=20")).remarks == []


def test_how_many_questions_there_are_is_known_with_and_without_a_subset(folder):
    (source,) = resolve.resolve(load(folder)).validation
    each = [len(tiny_vqa.sample(1000 + i).record["questions"]) for i in range(7)]
    assert streams.items_of(source) == sum(each)
    some = Subset(source.manifest.name, "val", ["val-000000001", "val-000000002"])
    assert streams.items_of(dataclasses.replace(source, subset=some)) == each[1] + each[2]


def test_the_plan_counts_what_training_would_train(folder):
    resolved = resolve.resolve(load(folder))
    report = plan.make(resolved)
    model = resolve.attach(resolved, resolved.backbone.build())
    numel = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert report["trainable_parameters"] == sum(numel.values()) == sum(report["trainable_by_kind"].values())
    assert report["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert all(report["trainable_by_kind"][kind] for kind in plan.KINDS)
    assert report["steps_per_epoch"] == 5 and report["total_steps"] == 10


def test_memory_falls_with_ranks_under_zero3_only_where_the_base_is_sharded():
    tensors = (*(Tensors(1_000_000, 2, False) for _ in range(10)), Tensors(10, 4, True))
    sizes = plan.Sizes(tensors, largest_module=1000, moments=2)

    def needed(ranks: int, **zero: int) -> int:
        return plan.zero_bytes(sizes, {"zero_optimization": zero}, recipes.Recipe("run", {}, {}), ranks)

    lean = {"stage3_max_live_parameters": 10**6, "stage3_prefetch_bucket_size": 1000}
    one, eight = (needed(n, stage=3, **lean) for n in (1, 8))
    assert one > 2 * 10**7 and eight < 2 * 10**7 / 8 + 2.4 * 10**6  # with the smallest gradient buffer
    assert needed(8, stage=1) > 2 * 10**7
    # DeepSpeed's default keeps the whole of a small model gathered: no saving during a step.
    assert needed(8, stage=3) > 2 * 10**7


def test_every_route_of_make_compare_works_and_trains_equally_many_parameters(folder):
    from mmpeft_ds.ops.route import ROUTES

    assert "none" in ROUTES and len(ROUTES) == 8
    counts = {r: plan.make(resolve.resolve(load(folder, f"method.route={r}")))["trainable_parameters"] for r in ROUTES}
    assert len(set(counts.values())) == 1, counts


def test_changed_vision_weights_are_told_from_statistics_that_were_never_computed(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "vision" / "model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    line = refusal(folder, f"backbone.vision={copy / 'vision'}")
    assert "no longer those" in line and "restore" in line and "feature_stats.py" in line


def test_two_data_sets_of_one_name_are_refused_but_one_may_stand_twice(folder, tmp_path):
    made = tiny_vqa.write_data(tmp_path / "other", train=11)
    statistics = Manifest.load(folder / "data").statistics
    made.statistics = statistics
    made.save(tmp_path / "other")
    task = "task: {name: vqa, loss: ce}"
    twice = f"data.sources=[{{dir: {folder / 'data'}, {task}}}, {{dir: {folder / 'data'}, {task}}}]"
    assert len(resolve.resolve(load(folder, twice)).train) == 2
    both = f"data.sources=[{{dir: {folder / 'data'}, {task}}}, {{dir: {tmp_path / 'other'}, {task}}}]"
    line = refusal(folder, both)
    assert "data.sources.1.dir" in line and "'toy'" in line and "--name" in line


def test_a_head_in_half_precision_trains_in_float32_whatever_the_method(folder):
    resolved = resolve.resolve(
        load(folder, "method={name: lora, r: 2}", "backbone.condition=none", "engine.dtype=bfloat16")
    )
    base = resolved.backbone.build()
    base.head.bfloat16()  # as a backbone would that builds its head with the rest
    base.head.out.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    seen: list = []
    model = resolve.attach(resolved, base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    head = model.get_base_model().head
    head(torch.randn(2, head.modules_to_save["default"].dense.in_features, dtype=torch.bfloat16))
    assert seen == [(torch.float32, torch.float32)]


def test_ranks_that_would_compute_on_padding_are_told(folder, capsys):
    report = plan.make(resolve.resolve(load(folder, "data.global_batch=8", "optim.accumulation=2")), [64])
    plan.show(report)
    assert "of 8 samples in 2 micro-steps, for at most 4 ranks" in " ".join(capsys.readouterr().out.split())
    notes = report["remarks"]
    assert any("has samples for 4 of 64 ranks" in line and "60 compute on padding" in line for line in notes)
    notes = plan.make(resolve.resolve(load(folder, "data.global_batch=8")), [8])["remarks"]
    assert not any("padding" in line for line in notes)


def test_ranks_without_samples_of_a_small_source_are_told(folder):
    samples = resolve.resolve(load(folder)).train[0].samples
    wide = load(folder, f"data.global_batch={4 * samples}")
    (line,) = idle.idle_notes(resolve.resolve(wide), 2 * samples)
    assert f"all of its {samples} samples, for {samples} of {2 * samples} ranks; {samples} compute on padding" in line
    assert idle.idle_notes(resolve.resolve(wide), samples) == []


def told_of_sets(folder, ranks: int, least: int, coupled: bool = True) -> list[str]:
    resolved = resolve.resolve(load(folder, "data.global_batch=8"))
    resolved.train[0].task.couples_samples = coupled
    resolved.backbone.options = SimpleNamespace(least_slots=least)
    return idle.idle_notes(resolved, ranks)


def test_ranks_that_form_sets_of_their_own_and_hold_one_sample_are_told(folder):
    assert told_of_sets(folder, 4, 2) == []
    (line,) = told_of_sets(folder, 6, 2)  # 1, 1, 2, 1, 1, 2 samples
    assert "4 of 6 ranks hold fewer than 2 of a step. Use at most 4 ranks" in line
    # Ranks beyond the slots, and those with one sample.
    padding, alone = told_of_sets(folder, 12, 2)
    assert "4 compute on padding" in padding and "8 of 12 ranks hold fewer than 2" in alone
    # A set over all ranks, or samples by themselves, can use one a rank.
    assert told_of_sets(folder, 8, 1) == [] and told_of_sets(folder, 8, 2, coupled=False) == []


def test_blip_with_negatives_of_the_own_rank_needs_two_samples_on_each():
    options = blip_options.Options
    assert options(form="retrieval", negatives="local").least_slots == 2
    assert options(form="retrieval").least_slots == options(form="vqa").least_slots == 1


@pytest.mark.parametrize(("slots", "samples", "ranks"), [(8, 100, 3), (8, 5, 3), (8, 3, 8), (64, 10, 16), (4, 9, 7)])
def test_samples_of_a_rank_are_those_that_its_slots_take(slots, samples, ranks):
    taken = []
    for rank in range(ranks):
        own = [slot for slot in order.micro_slots(slots, rank, ranks, 1)[0] if slot is not None]
        taken.append(sum(order.position_of(samples, slots, slot, 0) is not None for slot in own))
    assert idle.samples_per_rank(slots, samples, ranks) == taken
