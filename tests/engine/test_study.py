"""What models of a study share: results of frozen modules, parameters, batches; and what they must not."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from mmpeft_ds.data.batch import Sample, pack
from mmpeft_ds.data.stream import Step
from mmpeft_ds.engine.study import report, run
from mmpeft_ds.engine.study.build import Builder
from mmpeft_ds.engine.study.checks import check_directory
from mmpeft_ds.engine.study.share import Sharing, copy_of, frozen_modules, share
from mmpeft_ds.engine.study.streams import MovedOnce, SharedStream
from mmpeft_ds.engine.study.work import SharedWork
from mmpeft_ds.engine.turns import Place
from mmpeft_ds.engine.zero import fingerprint
from mmpeft_ds.errors import AgreedBadInput, BadInput

HERE = Place(0)
COLLATE = (lambda _: {}, lambda _: {}, lambda _: {}, lambda _: {})


def bert(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    return BertModel(BertConfig(**sizes, max_position_embeddings=16)).requires_grad_(False).eval()


def trained_from(base: BertModel, layer: int) -> BertModel:
    """A copy with a trained layer, of parameters of its own."""
    model = copy_of(base)
    model.encoder.layer[layer] = copy.deepcopy(model.encoder.layer[layer]).requires_grad_(True)
    return model


def runs(module: nn.Module) -> list[int]:
    """A list that grows with every call of the forward of a class instance below a patch."""
    calls: list[int] = []
    plain = module.forward
    module.forward = lambda *args, **kwargs: (calls.append(1), plain(*args, **kwargs))[1]
    return calls


class Work(SharedWork):
    def __init__(self) -> None:
        super().__init__()
        self.begin(HERE)


def test_a_result_is_taken_for_equal_inputs_of_the_same_call_and_place():
    work, computed = Work(), []

    def turn(*inputs: torch.Tensor, place: Place = HERE) -> list[torch.Tensor]:
        work.begin(place)
        return [work.once("m", (x,), lambda x=x: computed.append(1) or x * 2) for x in inputs]

    x, y = torch.ones(3), torch.zeros(3)
    first = turn(x, y)
    assert turn(x.clone(), y)[0] is first[0] and len(computed) == 2
    assert turn(x, y, place=Place(1))[0] is not first[0] and len(computed) == 4


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([1.0, 2.0]),
        torch.ones(2, dtype=torch.float64),
        torch.ones(1, 2),
        torch.tensor([1.0, float("nan")]),
    ],
)
def test_a_result_is_never_taken_for_other_inputs(other):
    work = Work()
    work.once("m", (torch.ones(2),), lambda: torch.zeros(2))
    work.begin(HERE)
    assert work.once("m", (other,), lambda: "own") == "own"
    work.begin(HERE)
    assert work.once("m", (torch.ones(2),), lambda: "own") == "own"  # models differ here: each computes its own


def test_a_result_that_a_model_has_changed_in_place_is_computed_again():
    work, x = Work(), torch.ones(2)
    work.once("m", (x,), lambda: x * 2).add_(1)
    work.begin(HERE)
    assert work.once("m", (x,), lambda: x * 2).tolist() == [2, 2]


def test_what_needs_a_gradient_or_is_done_alone_is_not_shared():
    work, weight = Work(), torch.ones(2, requires_grad=True)
    for _ in range(2):
        work.begin(HERE)
        assert work.once("m", (weight,), lambda: weight * 2).requires_grad
        assert work.once("n", (torch.ones(2),), lambda: weight * 2).requires_grad
    work.begin(None)
    work.once("o", (torch.ones(2),), lambda: torch.ones(2))
    assert work.taken == 0 and work.done == 0


def test_copies_share_frozen_parameters_and_nothing_else():
    base = bert()
    one, two = trained_from(base, 2), trained_from(base, 1)
    assert one.encoder.layer[0].output.dense.weight is base.encoder.layer[0].output.dense.weight
    assert one.encoder.layer[0].output.dense is not base.encoder.layer[0].output.dense
    assert one.embeddings.position_ids is not base.embeddings.position_ids
    shared = {id(p) for p in base.parameters()}
    assert not any(id(p) in shared for model in (one, two) for p in model.parameters() if p.requires_grad)


def test_a_base_of_another_seed_shares_what_holds_the_same_bits():
    base, other = bert(), bert(1)
    other.load_state_dict(base.state_dict() | {"pooler.dense.weight": torch.ones(8, 8)})
    assert other.pooler.dense.bias is not base.pooler.dense.bias
    share(other, base)
    assert other.pooler.dense.bias is base.pooler.dense.bias
    assert other.pooler.dense.weight is not base.pooler.dense.weight


def test_modules_that_were_changed_or_are_watched_inside_take_no_part():
    base = bert()
    model = trained_from(base, 2)
    assert {"embeddings", "encoder.layer.0", "encoder.layer.1", "pooler"} <= frozen_modules(model, base).keys()
    assert not {"encoder", "encoder.layer.2", "encoder.layer.2.output"} & frozen_modules(model, base).keys()
    model.encoder.layer[0].output.register_forward_hook(lambda *_: None)
    output = model.encoder.layer[1].output
    output.__class__ = type("Other", (type(output),), {})
    model.embeddings.register_buffer("position_ids", torch.zeros(1, 16, dtype=torch.long), persistent=False)
    assert not {"embeddings", "encoder.layer.0", "encoder.layer.1"} & frozen_modules(model, base).keys()
    assert "encoder.layer.0.output" in frozen_modules(model, base)


def test_layers_below_the_lowest_trained_one_run_once_and_gradients_stay_the_same():
    base, work, ids = bert(), SharedWork(), torch.arange(6)[None]
    models = [trained_from(base, 1), trained_from(base, 1), trained_from(base, 2)]
    plain = copy.deepcopy(models)
    sharings = [Sharing(model, base, work) for model in models]
    calls = [runs(model.embeddings.word_embeddings) for model in models]
    for step in range(2):
        for model, sharing in zip(models, sharings, strict=True):
            work.begin(Place(step))
            if step == 0:
                with sharing.learning():
                    model(ids).last_hidden_state.square().sum().backward()
            else:
                model(ids).last_hidden_state.square().sum().backward()
    assert "encoder.layer.0" in sharings[0].shared and "encoder.layer.1" not in sharings[0].shared
    assert "encoder.layer.1" in sharings[2].shared and "pooler" not in sharings[0].shared
    assert sum(map(len, calls)) == 1 + 1 + 1  # one unshared, then one of each step
    for model, alone in zip(models, plain, strict=True):
        for _ in range(2):
            alone(ids).last_hidden_state.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) and (p.grad is None or p.grad.equal(q.grad)), name


def test_modules_in_training_mode_run_for_each_model():
    base, work, ids = bert(), SharedWork(), torch.arange(6)[None]
    models = [trained_from(base, 2), trained_from(base, 2)]
    for model in models:
        sharing = Sharing(model, base, work, ["embeddings"])
        assert sharing.shared == ["embeddings"]
        model.embeddings.train()
        work.begin(HERE)
        model(ids)
    assert work.taken == 0


def test_runs_at_one_step_get_one_batch_and_runs_apart_their_own():
    stream = Counted()
    shared = SharedStream(stream)
    one, two, ahead = shared.epoch(0), shared.epoch(0), shared.epoch(0, 3)
    for _ in range(3):
        assert next(one) is next(two)
    assert next(one) is next(ahead) is next(two) and stream.opened == [(0, 0)]
    assert [next(one, None), next(two, None)] == [None, None]
    assert [(step.source, step.step) for step in shared.epoch(1, 2)] == [(1, 2), (1, 3)]


def test_an_epoch_is_opened_once_for_all_runs_also_when_the_first_is_in_it_before_the_others():
    stream = Counted()
    shared = SharedStream(stream)
    runs = [itertools.chain(shared.epoch(0), shared.epoch(1)) for _ in range(3)]
    for _ in range(8):
        first, *others = [next(run) for run in runs]
        assert all(other is first for other in others)
    assert stream.opened == [(0, 0), (1, 0)] and stream.made == 8


class Counted:
    """A stream of four steps an epoch."""

    def __init__(self):
        self.opened, self.made = [], 0

    def steps_per_epoch(self, epoch: int = 0) -> int:
        return 4

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Step]:
        self.opened.append((epoch, start_step))
        for step in range(start_step, 4):
            self.made += 1
            yield Step(epoch, step, [pack([Sample()], *COLLATE)])


def test_a_batch_goes_to_the_device_once_for_all_runs():
    batch = MovedOnce.of(pack([Sample()], *COLLATE))
    assert batch.to("meta") is batch.to("meta") and batch.to("meta").weight.is_meta and not batch.weight.is_meta
    changed = dataclasses.replace(batch, weight=torch.ones(1))
    assert changed.to("meta") is not batch.to("meta")


def test_a_method_that_changes_the_frozen_base_is_noticed():
    base = bert()
    builder = Builder.__new__(Builder)
    builder.base, builder.fingerprint = base, fingerprint.of_frozen(base)
    other = bert(1)  # of another seed: what it has drawn itself may differ
    builder._check_unchanged("seeded", other, fingerprint.of_frozen(other))
    with torch.no_grad():
        base.pooler.dense.weight[0, 0] += 1
    with pytest.raises(BadInput, match=r"changing: changes pooler.dense.weight of the frozen base"):
        builder._check_unchanged("changing", base, fingerprint.of_frozen(base))


def test_a_study_does_not_go_into_the_directory_of_a_run(tmp_path):
    check_directory(tmp_path / "none")
    check_directory(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(BadInput, match="is the directory of a run, and a study needs one of its own"):
        check_directory(tmp_path)


def test_the_table_of_a_study_escapes_what_would_end_a_cell():
    metrics = {"trainable_parameters": 1, "steps": 1, "train_loss": 0.5, "best_metric": None}
    rows = [
        {"name": n, "settings": {"method.x": x}, "problem": "", "metrics": metrics}
        for n, x in (("a", "q|v"), ("b", None))
    ]
    lines = report.table(rows).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1 and "q\\|v" in lines[2]


def test_the_table_of_a_study_says_how_much_each_score_rests_on():
    metrics = {"trainable_parameters": 1, "steps": 1, "train_loss": 0.5, "best_metric": "accuracy", "best": 0.5}
    metrics |= {"best_step": 1, "best_counted": "70 of 72 questions, 2 bad samples left out"}
    rows = [{"name": "a", "settings": {}, "problem": "", "metrics": metrics}]
    head, _, row = report.table(rows).splitlines()
    assert head.endswith("| at step | scored |") and row.endswith(f"| {metrics['best_counted']} |")


def test_a_member_that_cannot_write_its_adapter_ends_alone():
    def member(name: str, error: Exception | None) -> run.Turns:
        def work() -> Iterator[Place]:
            yield Place(1)
            return True

        def finish() -> bool:
            if error:
                raise error
            return True

        quiet = SimpleNamespace(say=lambda _: None, close=lambda: None, destroy=lambda: None)
        built, state = SimpleNamespace(engine=quiet), SimpleNamespace(step=1)
        training = SimpleNamespace(finish=finish, observer=quiet, built=built, state=state)
        sharing = SimpleNamespace(learned=True, shared=[])
        return run.Turns(run.Member(name, None, None, 1), training, sharing, work(), Place(0))

    begun = [member("full", AgreedBadInput("adapter: cannot be written")), member("other", None)]
    members = [turns.member for turns in begun]
    run._take_turns(begun, SharedWork())
    assert [(m.done, m.problem) for m in members] == [(False, "adapter: cannot be written"), (True, "")]
