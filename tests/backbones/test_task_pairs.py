"""Every task on every backbone: the pair trains and answers, or is refused by name in one line."""

import pytest
import torch

from mmpeft_ds import backbones, registry, tasks
from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.batch import Sample, pack
from mmpeft_ds.engine.assembly.checks import check_backbone, read_words
from mmpeft_ds.engine.assembly.forward import answer, forward
from mmpeft_ds.errors import BadInput
from mmpeft_ds.fitting import chosen, settings
from tests.helpers import ROOT
from tests.helpers.data.task_record import RECORD
from tests.helpers.models import tiny_blip
from tests.helpers.models.tiny_backbones import LABELS, MAKERS


def make_blip(form):
    entry = registry.load(backbones, "blip", "backbone.name")
    return lambda folder: entry(entry.Options(tiny_blip.write(folder, form), form=form, queue=0), None)


# Stored features are no pictures: test_features_backbone.py runs `classification` on them.
MADE = MAKERS | {"blip vqa": make_blip("vqa"), "blip retrieval": make_blip("retrieval")}
# A task with each setting by which what it reads depends.
ALL_TASKS = [
    (name, dict([setting.split(": ")] if setting else []))
    for name in registry.names(tasks)
    for setting in {"": (), **read_words(registry.options(tasks, name, name), in_training=True)}
]


def section(package, name, **options):
    key = "backbone" if package is backbones else "data.sources.0.task"
    return recipes.Section.read(package, {"name": name, **options}, key, recipe().origin)


def recipe():
    return recipes.load(ROOT / "recipes" / "quickstart.yaml", [])


def refusal(backbone, task, key="data.sources.0"):
    """The line by which a pair is refused, empty where it is not."""
    try:
        check_backbone(recipe(), key, task, backbone)
    except BadInput as e:
        return str(e)
    return ""


@pytest.fixture(scope="module", params=MADE)
def backbone(request, tmp_path_factory):
    made = MADE[request.param](tmp_path_factory.mktemp(request.param.replace(" ", "_")))
    made.check()
    made.name = request.param.split()[0]
    made.model = made.build().train()
    made.model.requires_grad_(True)
    return made


def batch_of(backbone, task, how):
    transform = backbone.image_transform(train=True)
    samples = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randint(0, 256, (3, 9, 11), dtype=torch.uint8, generator=generator)
        texts, targets = getattr(task, how)(RECORD, generator)
        samples.append(Sample(str(seed), 1.0, [transform(image, generator)], texts, targets, RECORD))
    return pack(samples, backbone.collate_images, backbone.collate_texts, task.collate)


def tried(backbone, task):
    """Gradient of a training step, and the scores of an evaluation, of the pair."""
    batch = batch_of(backbone, task, "read")
    backbone.model.zero_grad()
    task.loss(forward(backbone.model, backbone, batch), batch).backward()
    grads = [p.grad for p in backbone.model.parameters() if p.grad is not None]
    with torch.no_grad():
        batch = batch_of(backbone, task, "read_all")
        outputs = answer(backbone.model, backbone, task, batch)
        if task.concludes:
            rows = task.conclude(backbone.model, [task.collect(outputs, batch)], "cpu")
        else:
            rows = task.predict(outputs, batch)
    return sum(float(g.abs().sum()) for g in grads), task.score(rows)


@pytest.mark.parametrize(("name", "given"), ALL_TASKS, ids=lambda x: x if isinstance(x, str) else "-".join(x.values()))
def test_a_pair_trains_and_answers_or_is_refused_in_one_line(backbone, name, given):
    if (backbone.name, name) == ("mllm", "captioning"):
        with pytest.raises(BadInput, match="max_new_tokens"):  # its default length counts the prompt
            backbone.check_generation({"max_length": 20})
        given = {"max_length": 0, "max_new_tokens": 4}
    part = section(tasks, name, **given)
    task = part.entry(part.options, LABELS)
    said = refusal(recipes.Section(backbones, backbone.name, backbone.options, "backbone", recipe().origin), part)
    if said:
        assert f"the task is {name}" in said and f"backbone {backbone.name} gives" in said and "\n" not in said
        assert "Use backbone " in said
        with pytest.raises(Exception):  # noqa: B017 (the refusal is right: whatever error it would end in)
            tried(backbone, task)
    else:
        gradient, scores = tried(backbone, task)
        assert 0 < gradient < float("inf") and task.main_metric in scores


def cell(name):
    """The backbones for a task as docs/tasks.md lists them, with the settings that it takes on both sides."""
    options = registry.options(tasks, name, name)
    words = read_words(options, in_training=True)
    ways = {}
    for setting in [key for key in words if key] or [""]:
        reads = set(chosen(words, options, setting))
        ways[setting] = ", ".join(
            f"`{backbone}`" + (f" ({', '.join(f'`{s}`' for s in found)})" if "" not in found else "")
            for backbone in registry.names(backbones)
            if (found := settings(given_by(backbone), registry.options(backbones, backbone, ""), reads.issubset))
        )
    return "; ".join(f"`{setting}`: {names}" if setting else names for setting, names in ways.items())


def given_by(backbone):
    return registry.options(backbones, backbone, "").gives


def test_the_table_of_tasks_lists_the_backbones_that_fit():
    rows = [line.split(" | ") for line in (ROOT / "docs" / "tasks.md").read_text().splitlines() if line[:3] == "| ["]
    listed = {row[0].split("`")[1]: row[-1].removesuffix(" |") for row in rows}
    assert listed == {name: cell(name) for name in registry.names(tasks)}


def test_every_word_is_given_by_some_backbone_and_read_by_some_task():
    given = {word for name in registry.names(backbones) for words in given_by(name).values() for word in words}
    read = {word for name, more in ALL_TASKS for word in words_of(name, more)}
    assert given == read


def words_of(name, given):
    options = section(tasks, name, **given).options
    return chosen(read_words(type(options), in_training=True), options)


def test_what_only_the_loss_reads_is_not_asked_of_a_validation_source():
    pair = section(backbones, "dual_encoder"), section(tasks, "retrieval")
    assert "with loss: contrast" in refusal(*pair) and not refusal(*pair, "data.validation.0")


def test_a_component_that_declares_nothing_is_not_refused(monkeypatch):
    vqa, clip = section(tasks, "vqa"), section(backbones, "clip")
    assert refusal(clip, vqa)
    monkeypatch.setattr(type(clip.options), "gives", {})
    assert not refusal(clip, vqa)
    monkeypatch.undo()
    monkeypatch.setattr(type(vqa.options), "reads", {})
    assert not refusal(clip, vqa)


def test_generation_and_ranking_are_given_by_the_backbones_that_can(backbone):
    gives = chosen(given_by(backbone.name), backbone.options)
    assert ("generated text" in gives) == backbone.generates and ("ranked answers" in gives) == backbone.ranks_answers
