"""Elastic weight consolidation on two ranks under any ZeRO stage is that of one plain PyTorch process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmpeft_ds.engine import ewc
from mmpeft_ds.engine.assembly.resolve import attach
from tests.helpers import launch
from tests.helpers.rank_scripts.ewc import FISHER_STEPS, STEPS
from tests.helpers.runs import tiny_classifier

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.ewc"
STRENGTH = 3.0
CASES = [
    *({"name": f"zero{s}", "stage": s, "strength": STRENGTH} for s in (0, 1, 2, 3)),
    {"name": "zero3_accumulation", "stage": 3, "strength": STRENGTH, "accumulation": 2},
    {"name": "zero1_away", "stage": 1, "strength": STRENGTH, "start": False},
]


def fresh(folder: Path) -> SimpleNamespace:
    """The tiny model of the worker, without DeepSpeed."""
    recipe, task = tiny_classifier.make_recipe(folder), tiny_classifier.TinyTask()
    resolved = tiny_classifier.make_resolved(recipe, task)
    torch.manual_seed(recipe.seed)
    base = resolved.backbone.build()
    torch.manual_seed(recipe.seed)
    model = attach(resolved, base).eval()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return SimpleNamespace(model=model, trained=trained, backbone=resolved.backbone, task=task)


def loss_of(plain: SimpleNamespace, slots: list) -> torch.Tensor:
    batch = tiny_classifier.pack_slots(slots, plain.backbone, plain.task)
    return plain.task.loss(plain.model(**plain.backbone.inputs(batch)), batch) / plain.task.weight(batch)


def squares(plain: SimpleNamespace, parts: int = 1) -> dict[str, torch.Tensor]:
    """Mean over batches of the squared gradient; with `parts`, the mean of the squares of each part's gradient."""
    totals = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in plain.trained.items()}
    for step in FISHER_STEPS:
        slots = tiny_classifier.global_slots(step, plain.backbone)
        for part in range(parts):
            mine = slots[part * len(slots) // parts : (part + 1) * len(slots) // parts]
            plain.model.zero_grad()
            loss_of(plain, mine).backward()
            for name, p in plain.trained.items():
                totals[name] += p.grad.double() ** 2 / (len(FISHER_STEPS) * parts)
    return totals


def train(plain: SimpleNamespace, fisher: dict, anchor: dict, strength: float) -> dict:
    """Steps with the penalty in the loss, where autograd finds its gradient."""
    matrices = [p for p in plain.trained.values() if p.dim() > 1]
    vectors = [p for p in plain.trained.values() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], lr=0.02
    )
    found = {"loss": [], "penalty": [], "norm": []}
    for done, step in enumerate(STEPS):
        task_loss = loss_of(plain, tiny_classifier.global_slots(step, plain.backbone))
        penalty = strength * sum((fisher[n] * (p - anchor[n]) ** 2).sum() for n, p in plain.trained.items())
        optimizer.zero_grad()
        (task_loss + penalty).backward()
        found["loss"].append(task_loss.item())
        found["penalty"].append(penalty.item())
        found["norm"].append(torch.nn.utils.clip_grad_norm_(plain.trained.values(), 0.5).item())
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - done / 10)
        optimizer.step()
    return found | {"weights": {n: p.detach().clone() for n, p in plain.trained.items()}}


def earlier(folder: Path) -> tuple[dict, dict]:
    """F and theta* that no step of these tests has led to."""
    generator = torch.Generator().manual_seed(5)
    fisher, anchor = {}, {}
    for name, p in fresh(folder).trained.items():
        fisher[name] = torch.rand(p.shape, generator=generator)
        anchor[name] = p.detach() + 0.1 * torch.randn(p.shape, generator=generator)
    return fisher, anchor


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ewc_ranks")
    tiny_classifier.make_towers(path)
    fisher, anchor = earlier(path)
    ewc.save(path / "earlier.safetensors", fisher, anchor, {}, {})
    (path / "cases.json").write_text(json.dumps(CASES))
    result = launch.run_forked(SCRIPT, str(path / "cases.json"), str(path), ranks=2)
    assert result.code == 0, result.tail()
    return path


@pytest.fixture(scope="module")
def found(folder) -> dict[str, dict]:
    return {case["name"]: torch.load(folder / f"{case['name']}.pt", weights_only=False) for case in CASES}


@pytest.fixture(scope="module")
def expected_fisher(folder) -> dict:
    return squares(fresh(folder))


def assert_close(got: dict, want: dict, tolerance: float = 1e-5) -> None:
    assert list(got) == list(want)
    for name, tensor in want.items():
        allowed = tolerance * max(1.0, tensor.abs().max().item())
        torch.testing.assert_close(got[name].double(), tensor.double(), atol=allowed, rtol=0, msg=name)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_accumulation"])
def test_fisher_of_two_ranks_is_that_of_one_process(found, expected_fisher, name):
    assert_close(found[name]["fisher"], expected_fisher)
    assert found[name]["facts"]["batches"] == len(FISHER_STEPS)


def test_squares_averaged_over_ranks_are_another_fisher(folder, found):
    """Negative control: the square before the mean over ranks is found out."""
    wrong = squares(fresh(folder), parts=2)
    with pytest.raises(AssertionError):
        assert_close(found["zero3"]["fisher"], wrong)
    total = sum(f.sum().item() for f in found["zero3"]["fisher"].values())
    assert sum(f.sum().item() for f in wrong.values()) > 1.2 * total


def test_measuring_leaves_the_weights_alone(folder, found):
    for result in found.values():
        assert_close(result["before"], {n: p.detach() for n, p in fresh(folder).trained.items()}, 1e-7)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_two_ranks_pull_as_a_penalty_in_the_loss_of_one_process(folder, found, case):
    fisher, anchor = earlier(folder)
    plain, result = fresh(folder), found[case["name"]]
    if case.get("start", True):
        assert_close(result["started"], anchor, 1e-7)
        with torch.no_grad():
            for name, p in plain.trained.items():
                p.copy_(anchor[name])
    expected = train(plain, fisher, anchor, STRENGTH)
    assert [r["ewc_penalty"] for r in result["rows"]] == pytest.approx(expected["penalty"], rel=1e-4, abs=1e-6)
    assert [r["loss"] for r in result["rows"]] == pytest.approx(expected["loss"], abs=1e-4)
    assert [r["grad_norm"] for r in result["rows"]] == pytest.approx(expected["norm"], rel=1e-4)
    assert_close(result["weights"], expected["weights"], 1e-4)
    assert max(expected["penalty"]) > 1e-2


def test_the_comparison_notices_another_strength(folder, found):
    """Negative control: a pull that is divided by the ranks, say."""
    fisher, anchor = earlier(folder)
    expected = train(fresh(folder), fisher, anchor, STRENGTH / 2)
    with pytest.raises(AssertionError):
        assert_close(found["zero1_away"]["weights"], expected["weights"], 1e-3)
