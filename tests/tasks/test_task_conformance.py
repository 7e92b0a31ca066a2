"""The contract of tasks, run over every registered entry and over a task that gives only what is required."""

import dataclasses
import json
import re
import typing
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmpeft_ds import registry, tasks
from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.tasks.base import TaskBase
from mmpeft_ds.tasks.common.options import TaskOptions
from tests.helpers.data.task_record import RECORD

LABELS = ["yes", "no", "red", "2"]
REQUIRED = {"read", "loss", "predict", "score"}


@pytest.fixture(params=registry.names(tasks))
def task(request):
    return registry.load(tasks, request.param, "task.name")(
        registry.options(tasks, request.param, "task.name")(), LABELS
    )


@pytest.mark.parametrize("name", registry.names(tasks))
def test_every_entry_documents_its_options(name):
    options = registry.options(tasks, name, "task.name")
    assert registry.load(tasks, name, "task.name").Options is options
    for field in dataclasses.fields(options):
        assert re.search(rf"^ +(\w+, )*{field.name}(, \w+)*: ", options.__doc__, re.M), field.name


def test_it_is_of_the_base_class_and_says_what_is_best(task):
    assert isinstance(task, TaskBase)
    assert task.better in ("max", "min") and task.main_metric
    assert not set(task.fields) - set(RECORD), "add the fields of the task to tests/helpers/data/task_record.py"
    whole = [getattr(type(task), name) is not getattr(TaskBase, name) for name in ("collect", "conclude")]
    assert whole == [task.concludes] * 2


@pytest.mark.parametrize("how", ["read", "read_all"])
def test_it_reads_texts_and_targets_that_collate_with_a_dummy(task, how):
    texts, targets = getattr(task, how)(RECORD, torch.Generator().manual_seed(0))
    assert texts and len(texts) == len(targets)
    generative = task.generation is not None or task.ranking is not None
    assert all(isinstance(text, Prompted) for text in texts) or not generative
    for tensor in task.collate([*targets, task.dummy_target()]).values():
        assert len(tensor) == len(texts) + 1


def test_new_texts_are_asked_with_one_target_each(task):
    record, targets = task.ask(["one?", "two?"])
    assert len(targets) == 2 and json.dumps(record)
    assert all(len(tensor) == 2 for tensor in task.collate(targets).values())
    assert type(task.prompted("one?")) is type(task.read_all(RECORD, torch.Generator())[0][0]) or isinstance(
        task.prompted("one?"), str
    )


def test_evaluation_reads_everything_that_training_draws_from(task):
    if not hasattr(task.options, "max_questions"):
        pytest.skip("draws no questions")
    limited = type(task)(dataclasses.replace(task.options, max_questions=1), LABELS)
    generator = torch.Generator().manual_seed(0)
    asked = [{t["question"] for t in read(RECORD, generator)[1]} for read in (limited.read, limited.read_all)]
    assert len(asked[0]) == 1 and asked[1] == {0, 1, 2}


LIMITS = {"max_questions": 1, "captions": 1, "text": "captions"}  # options that limit or draw in training


def limits_of(options):
    """Those of LIMITS that the options have; `text` of another task may be any text."""
    kinds = typing.get_type_hints(type(options))
    return {n: v for n, v in LIMITS.items() if n in kinds and (v == 1 or v in typing.get_args(kinds[n]))}


def test_evaluation_draws_nothing_and_reads_as_many_as_the_task_says_there_are(task):
    own = limits_of(task.options)
    limited = type(task)(dataclasses.replace(task.options, **own), LABELS)
    record = RECORD | {"questions": [{"question": "is it?", "answers": ["yes"] * 5 + ["no"] * 5} for _ in range(3)]}

    def read(how, seed):
        generator = torch.Generator().manual_seed(seed)
        before = generator.get_state()
        texts, targets = getattr(limited, how)(record, generator)
        return (texts, targets), bool((generator.get_state() != before).any())

    first, drew = read("read_all", 0)
    assert not drew and all(read("read_all", seed)[0] == first for seed in range(1, 20))
    assert len(first[0]) == (len(record[limited.items]) if limited.items else 1)
    if own or limited.fields == ("captions",) or getattr(limited.options, "target", "") == "sample":
        assert any(read("read", seed)[1] for seed in range(20)), "negative control: training does draw"


def test_no_rows_have_no_scores(task):
    assert task.scored([]) == 0
    assert task.score([]) == {} and task.baselines([], []) == {}


@dataclass
class Options(TaskOptions):
    """No keys."""


class Smallest(TaskBase):
    """Gives only what is required."""

    Options = Options
    main_metric = "right"

    def read(self, record, generator):
        return [record["caption"]], [record["label"]]

    def collate(self, targets):
        return {"label": torch.tensor([0 if t == {} else t for t in targets])}

    def loss(self, outputs, batch):
        return (batch.text_weight * cross_entropy(outputs, batch.targets["label"], reduction="none")).sum()

    def predict(self, outputs, batch):
        return [{"sample_id": batch.sample_id[0], "prediction": row} for row in outputs.argmax(1).tolist()]

    def score(self, rows):
        return {"right": float(len(rows))}


def test_a_task_with_the_required_parts_alone_works():
    task = Smallest(Options(), None)
    samples = [
        Sample(str(i), weight, [], *task.read_all({"caption": "a", "label": i}, torch.Generator()))
        for i, weight in enumerate((1.0, 0.5))
    ]
    batch = pack(samples, lambda i: {}, lambda t: {}, task.collate)
    assert task.weight(batch) == 1.5 and not task.couples_samples
    assert task.loss(torch.zeros(2, 4), batch).item() == pytest.approx(1.5 * torch.tensor(4.0).log().item())
    assert task.generation is task.ranking is None and task.prompted("a") == "a"
    assert task.ask(["a"]) == ({}, [{}]) and task.use_source(["x"]) is None and task.baselines([], []) == {}


def test_a_task_that_lacks_a_required_method_cannot_be_made():
    assert TaskBase.__abstractmethods__ == REQUIRED
    for name in REQUIRED:
        part = type("Part", (TaskBase,), {other: getattr(Smallest, other) for other in REQUIRED - {name}})
        with pytest.raises(TypeError, match=name):
            part(Options(), None)
