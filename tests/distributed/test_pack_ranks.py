"""Micro-batches planned by tokens: the losses of padded batches, on any number of ranks, resumed on another one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import launch
from tests.helpers.runs import tiny_talk

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.train_recipes"
PACK = 160


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def train(*recipes: str, ranks: int) -> None:
    result = launch.run_forked(SCRIPT, *recipes, ranks=ranks)
    assert result.code == 0, result.tail()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pack")
    tiny_talk.write(path)
    train(tiny_talk.recipe(path, "padded"), tiny_talk.recipe(path, "one", 0, data__pack=PACK), ranks=1)
    two = [tiny_talk.recipe(path, f"two{stage}", stage, data__pack=PACK) for stage in (1, 2)]
    two += [tiny_talk.recipe(path, "two3", 3, data__pack=PACK, data__workers=1, engine__gradient_checkpointing=True)]
    train(*two, tiny_talk.recipe(path, "moved", optim__max_steps=3, data__pack=PACK), ranks=2)
    train(tiny_talk.recipe(path, "moved", data__pack=2 * PACK), ranks=1)
    return path


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Path:
    """Each text with the condition of its own image, on one and three ranks, and from three to two within an epoch."""
    path = tmp_path_factory.mktemp("routed")
    tiny_talk.write(path)
    route = dict(method__name="routed_lora", method__route="mul", backbone__condition="pooled")
    train(tiny_talk.recipe(path, "padded", **route), ranks=1)
    three = [tiny_talk.recipe(path, f"three{stage}", stage, data__pack=PACK, **route) for stage in (2, 3)]
    train(*three, tiny_talk.recipe(path, "within", optim__max_steps=2, data__pack=PACK, **route), ranks=3)
    train(tiny_talk.recipe(path, "within", data__pack=PACK, **route), ranks=2)
    return path


@pytest.mark.parametrize("name", ["one", "two1", "two2", "two3", "moved"])
def test_packed_micro_batches_give_the_losses_and_samples_of_padded_ones(folder, name):
    compare(folder, name)


@pytest.mark.parametrize("name", ["three2", "three3", "within"])
def test_routed_methods_on_three_ranks_give_the_losses_of_one_with_padded_rows(routed, name):
    compare(routed, name)


def test_the_planned_imbalance_is_recorded(routed):
    found = [row["cost_imbalance"] for row in rows(routed, "three2")]
    assert all(1 <= value < 3 for value in found) and max(found) > 1  # four samples for each rank
    assert all("cost_imbalance" not in row for row in rows(routed, "padded"))


def compare(folder: Path, name: str) -> None:
    want, found = rows(folder, "padded"), rows(folder, name)
    assert len(want) == len(found) == 5
    assert [r["sample_keys_hash"] for r in found] == [r["sample_keys_hash"] for r in want]
    assert [r["weight"] for r in found] == [r["weight"] for r in want]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in want], abs=1e-5)
    assert [r["grad_norm"] for r in found] == pytest.approx([r["grad_norm"] for r in want], rel=1e-4)


def test_packed_micro_batches_hold_no_padding(folder):
    assert min(r["padding"] for r in rows(folder, "padded")) > 0.3
    for name in ("one", "two1", "two3"):
        found = rows(folder, name)
        assert max(r["padding"] for r in found) == 0
        assert len({r["micro_steps"] for r in found}) > 1  # as many as the tokens of a step need


def test_tokens_are_counted_once_and_kept_beside_the_data(folder):
    (kept,) = (folder / "data").glob("tokens-talk-train-*.npy")
    assert kept.stat().st_size < 1400
