"""Runs that start from an adapter of HF Trainer with peft, at every ZeRO stage, also stopped and continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from tests.helpers import foreign_adapters, launch
from tests.helpers.runs import tiny_talk

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.train_recipes"
STEPS = 4


def write(folder: Path, name: str, stage: int, steps: int = STEPS, lr: float = 0.01, fresh: bool = False) -> str:
    path = Path(tiny_talk.recipe(folder, name, stage, optim__max_steps=steps, optim__lr=lr))
    raw = yaml.safe_load(path.read_text())
    raw["method"] = {"name": "lora", "r": 2, "lora_alpha": 4}
    raw["start_from"] = "" if fresh else str(folder / "taken" / "checkpoint-3")
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def train(ranks: int, *paths: str) -> None:
    result = launch.run_forked(SCRIPT, *paths, ranks=ranks)
    assert result.code == 0, result.tail()


def losses(folder: Path, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def beside_embeddings(model: Path, adapter: Path) -> None:
    """Write the base's embeddings beside an adapter, as peft does where it is asked to save them."""
    table = Qwen2VLForConditionalGeneration.from_pretrained(model).get_input_embeddings().weight.detach().clone()
    tensors = {"base_model.model.model.language_model.embed_tokens.weight": table, **load_file(adapter)}
    save_file(tensors, adapter, {"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("start_from")
    tiny_talk.write(path)
    foreign_adapters.make(path)
    shutil.copytree(path / "trainer", path / "taken")
    beside_embeddings(path / "model", path / "taken" / "checkpoint-3" / "adapter_model.safetensors")
    train(1, write(path, "one", 0), write(path, "fresh", 0, fresh=True))
    stages = (1, 2, 3)
    train(
        2,
        *(write(path, f"two {stage}", stage) for stage in stages),
        *(write(path, f"still {stage}", stage, 1, lr=1e-12) for stage in stages),
        write(path, "parts", 3, STEPS // 2),
    )
    shutil.rmtree(path / "taken")  # a run that continues needs it no more
    train(1, write(path, "parts", 1))
    return path


@pytest.mark.parametrize("name", ["two 1", "two 2", "two 3", "parts"])
def test_ranks_and_stages_train_as_one_and_a_stopped_run_goes_on_without_the_directory(folder, name):
    found = losses(folder, name)
    assert len(found) == STEPS and found == pytest.approx(losses(folder, "one"), abs=1e-5)
    assert abs(found[0] - losses(folder, "fresh")[0]) > 1e-3  # negative control


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_training_begins_with_is_the_directorys(folder, stage):
    begun = load_file(folder / f"still {stage}" / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(folder / "trainer" / "checkpoint-3" / "adapter_model.safetensors").items():
        torch.testing.assert_close(begun[name], tensor, rtol=0, atol=1e-9)
