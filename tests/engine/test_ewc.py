"""Elastic weight consolidation in one process: what pulls, what stays free, what is refused."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import ewc, rundir
from mmpeft_ds.engine.ewc import Pull
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero.gradients import Shard, whole
from mmpeft_ds.errors import BadInput
from mmpeft_ds.runs.fisher import SquaredGradients, factors_of
from tests.helpers import commands

RAW = {"run_dir": "x", "backbone": {"name": "clip"}, "method": {"name": "lora"}}
BASE = {"tower.weight": "float32 2x2 00"}


def parameters(**shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    torch.manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def write(path, trained, base=BASE):
    torch.manual_seed(2)
    fisher = {name: torch.rand(p.shape) for name, p in trained.items()}
    ewc.save(path, fisher, {name: p.detach().clone() for name, p in trained.items()}, base, {"run": "a"})
    return fisher


def load(path, trained, fingerprints=BASE, fresh=True, state=None, **options):
    recipe = recipes.from_dict({**RAW, "optim": {"ewc": {"file": str(path), **options}}})
    optimizer = SimpleNamespace(param_groups=[{"params": list(trained.values())}])
    engine = SimpleNamespace(optimizer=optimizer, device="cpu", zero_optimization_stage=lambda: 0)
    built = SimpleNamespace(engine=engine, trainables=trained, stage=0)
    return ewc.load(recipe, built, fingerprints, state or TrainState(), fresh)


@pytest.fixture
def file(tmp_path):
    """F and theta* of an adapter and a head of three classes."""
    path = tmp_path / "earlier.safetensors"
    write(path, parameters(adapter=(4, 3), head=(3, 4)))
    return path


def moved(trained):
    with torch.no_grad():
        for p in trained.values():
            p += 0.5
    return trained


def test_the_anchor_is_a_copy_so_moving_away_costs():
    trained = parameters(a=(3, 2))
    pull, aliased = Pull(2.0), Pull(2.0)
    importance = torch.rand(3, 2)
    pull.hold(trained["a"], importance, trained["a"])
    aliased.parts[id(trained["a"])] = importance.view(-1), trained["a"].detach().view(-1)
    moved(trained)
    expected = 2.0 * (importance * 0.25).sum().item()
    assert pull.add(whole(trained.values())).item() == pytest.approx(expected)
    torch.testing.assert_close(trained["a"].grad, 2 * 2.0 * importance * 0.5)
    # negative control: the defect of the release, an anchor that is the live tensor
    trained["a"].grad = None
    assert aliased.add(whole(trained.values())) == 0
    assert not trained["a"].grad.any()


def test_the_pull_comes_on_top_of_the_gradient_of_the_task():
    trained = parameters(a=(3,))
    trained["a"].grad = torch.ones(3)
    pull = Pull()
    pull.hold(trained["a"], torch.ones(3), trained["a"].detach() - 1)
    assert pull.add(whole(trained.values())).item() == pytest.approx(3.0)
    assert trained["a"].grad.tolist() == pytest.approx([3.0] * 3)


def test_a_new_run_starts_at_the_anchor_and_a_continued_one_where_it_stood(file):
    trained = parameters(adapter=(4, 3), head=(3, 4))
    anchor = {n: p.detach().clone() for n, p in trained.items()}
    for options, fresh, at_anchor in (({}, True, True), ({"start": False}, True, False), ({}, False, False)):
        state = TrainState()
        load(file, trained, state=state)
        before = {n: p.detach().clone() for n, p in moved(trained).items()}
        load(file, trained, fresh=fresh, state=state, **options)
        for name, p in trained.items():
            assert torch.equal(p, (anchor if at_anchor else before)[name])


def test_parameters_that_the_file_does_not_know_are_free_and_named(file):
    trained = parameters(adapter=(4, 3), head=(3, 4), gate=(2,))
    pull = load(file, trained)
    assert id(trained["gate"]) not in pull.parts and len(pull.parts) == 2
    assert any("not in the file: gate" in line for line in pull.summary)
    moved(trained)
    pull.add(whole(trained.values()))
    assert trained["adapter"].grad.any() and not trained["gate"].grad.any()


def test_a_head_for_other_classes_is_free_only_when_allowed(file):
    trained = parameters(adapter=(4, 3), head=(7, 4))
    with pytest.raises(BadInput, match=r"head has shape \(3, 4\) there and \(7, 4\) here.*allow_missing") as refused:
        load(file, trained)
    assert "\n" not in str(refused.value)
    pull = load(file, trained, allow_missing=True)
    assert set(pull.parts) == {id(trained["adapter"])}
    assert any("of another shape: head" in line for line in pull.summary)


def test_an_anchor_without_its_fisher_information_is_damage(file):
    tensors, metadata = load_file(file), ewc._metadata(file, "key")
    del tensors["fisher.head"]
    save_file(tensors, file, metadata)
    with pytest.raises(
        BadInput, match=r"damaged: the anchor of head has shape \(3, 4\), its Fisher information absent"
    ):
        load(file, parameters(adapter=(4, 3), head=(3, 4)))


def test_what_is_no_longer_in_the_model_is_named_or_refused(file):
    trained = parameters(adapter=(4, 3))
    with pytest.raises(BadInput, match="head.*absent"):
        load(file, trained)
    assert any("not in the model: head" in line for line in load(file, trained, allow_missing=True).summary)


def test_another_base_is_refused(file):
    trained = parameters(adapter=(4, 3), head=(3, 4))
    for fingerprints in ({"tower.weight": "float32 2x2 01"}, {"other.weight": "float32 2x2 00"}):
        with pytest.raises(BadInput, match="another base model: frozen tower.weight") as refused:
            load(file, trained, fingerprints)
        assert "\n" not in str(refused.value)
    assert load(file, trained, {**BASE, "new.weight": "float32 1 00"}) is not None


def test_the_base_is_what_is_frozen_and_the_towers_of_stored_features():
    model = nn.Module()
    model.tower, model.head = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    model.register_buffer("class_texts", torch.zeros(3))
    fingerprints = {"tower.weight": "1", "tower.bias": "2", "class_texts": "3"}
    pixels, features = (SimpleNamespace(manifest=SimpleNamespace(towers=t)) for t in ({}, {"key": "k"}))
    frozen = {"tower.weight": "1", "tower.bias": "2"}
    assert ewc.base_of(model, fingerprints, [pixels]) == frozen
    assert ewc.base_of(model, fingerprints, [features, features]) == {**frozen, "towers of the stored features": "k"}


def test_another_method_is_refused(file):
    with pytest.raises(BadInput, match="knows no trained parameter"):
        load(file, parameters(other=(2, 2)), allow_missing=True)


def test_a_run_goes_on_with_the_file_that_it_was_started_with(file, tmp_path):
    state, trained = TrainState(), parameters(adapter=(4, 3), head=(3, 4))
    load(file, trained, state=state)
    copied = tmp_path / "moved.safetensors"
    copied.write_bytes(file.read_bytes())
    assert load(copied, trained, fresh=False, state=state) is not None  # the same numbers under another name
    write(file, moved(trained))
    for path in (file, ""):
        with pytest.raises(BadInput, match="started with another file"):
            load(path, trained, fresh=False, state=state)
    with pytest.raises(BadInput, match="started with another file, or without"):
        load(copied, trained, fresh=False, state=TrainState())


@pytest.mark.parametrize("content", [None, b"", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_fisher_information_is_refused_before_anything_is_built(tmp_path, content):
    path = tmp_path / "f.safetensors"
    if content is not None:
        path.write_bytes(content)
    recipe = recipes.from_dict({**RAW, "optim": {"ewc": {"file": str(path)}}})
    with pytest.raises(BadInput, match="optim.ewc.file: .*launchers/fisher.py") as refused:
        ewc.check(recipe)
    assert "\n" not in str(refused.value)


def test_without_a_file_nothing_pulls():
    recipe = recipes.from_dict(RAW)
    ewc.check(recipe)
    assert ewc.load(recipe, SimpleNamespace(engine=None, trainables={}), {}, TrainState(), True) is None


def test_fisher_is_the_mean_of_squares_of_whole_batches_whatever_the_pieces():
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    one, pieces = SquaredGradients(), [SquaredGradients(), SquaredGradients()]
    total = torch.zeros(5, dtype=torch.float64)
    for seed in range(3):
        p.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed)).double()
        total += p.grad**2 / 3
        one.add(whole([p]))
        for part, (start, end) in zip(pieces, ((0, 3), (3, 5)), strict=True):
            part.add([Shard(p, start, p.detach()[start:end], p.grad[start:end])])
    assert torch.equal(one.whole(p), sum(part.whole(p) for part in pieces))
    torch.testing.assert_close(one.whole(p), total, rtol=0, atol=1e-15)
    assert not one.whole(p, mine=False).any()


def test_the_first_pattern_that_fits_gives_the_weight():
    names = ["m.fusion.weight", "m.head.weight", "m.other.bias"]
    weights = [("*fusion*", 0.8), ("*head*", 0.3), ("*weight", 9.0)]
    assert list(factors_of(names, weights).values()) == [0.8, 0.3, 1.0]
    with pytest.raises(BadInput, match="matches no trained parameter"):
        factors_of(names, [("*visual*", 0.3)])


def test_a_run_that_is_older_than_an_option_goes_on(tmp_path):
    """An option that a run's recipe does not know has its default, with which nothing changes."""
    now = recipes.to_dict(recipes.filled(recipes.from_dict(RAW)))
    saved = copy.deepcopy(now)
    del saved["optim"]["ewc"], saved["data"]["evaluation_order"]
    step = tmp_path / "step-00000001"
    step.mkdir()
    (step / "recipe.json").write_text(json.dumps(saved))
    assert list(rundir._differences(rundir._saved_recipe(tmp_path, step), now)) == []
    now["optim"]["ewc"]["strength"] = 2.0
    assert list(rundir._differences(rundir._saved_recipe(tmp_path, step), now)) == ["optim.ewc.strength: 1.0 -> 2.0"]


@pytest.mark.parametrize("item", ["0.5", "=0.5", "*head*", "*head*=many", "*head*=-1", "*head*=inf"])
def test_a_weight_that_cannot_be_is_refused_by_the_command(item, monkeypatch):
    launcher = commands.load_script(recipes.REPOSITORY / "launchers" / "fisher.py", monkeypatch)
    with pytest.raises(BadInput, match="expected PATTERN=FACTOR"):
        launcher["factor"](item)
    assert launcher["factor"]("*a=b*=0.5") == ("*a=b*", 0.5)
