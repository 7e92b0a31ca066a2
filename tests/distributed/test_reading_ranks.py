"""Two ranks of ZeRO-3 read a checkpoint whose weights are turned, split or joined on the way as one process does, and
none of them holds the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mmpeft_ds.backbones.mllm.backbone import MllmBackbone
from mmpeft_ds.backbones.mllm.options import Options
from tests.helpers import launch
from tests.helpers.models import tiny_families
from tests.helpers.models.randomise import randomise

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = "tests.helpers.rank_scripts.read_parts"
TURNED, LARGE = "turned_experts", "many_experts"
# Starts of weights that need whole shapes; split ones; joined experts.
FAMILIES = ["granite4_vision", "molmo2", "qwen3_vl_moe", "ernie4_5_vl_moe"]


def turn_experts(folder: Path) -> None:
    """Experts as the published checkpoints of Qwen3-VL-MoE have them: (experts, in, out)."""
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        turned = {n: w.transpose(1, 2).contiguous() for n, w in weights.items() if ".experts." in n}
        save_file(weights | turned, path, {"format": "pt"})


def write_large(folder: Path) -> int:
    """A Qwen3-VL-MoE that is nearly all experts; returns its bytes."""
    tiny_families.write(folder, "qwen3_vl_moe")
    config = tiny_families.config_of("qwen3_vl_moe")
    text = config.text_config
    text.num_hidden_layers, text.num_experts, text.moe_intermediate_size = 16, 64, 256
    model = AutoModelForImageTextToText.from_config(config)
    randomise(model)
    model.save_pretrained(folder, max_shard_size="10MB")
    (folder / "model.safetensors").unlink()
    turn_experts(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reading")
    for family in FAMILIES:
        tiny_families.write(path / family, family)
    tiny_families.write(path / TURNED, "qwen3_vl_moe")
    turn_experts(path / TURNED)
    assert write_large(path / LARGE) > 90e6
    folders = [str(path / name) for name in (*FAMILIES, TURNED, LARGE)]
    result = launch.run_forked(SCRIPT, str(path), *folders, ranks=2, timeout=200)
    assert result.code == 0, result.tail()
    return path


def of_rank(folder: Path, name: str, rank: int) -> dict:
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=False)


@pytest.mark.parametrize("name", [*FAMILIES, TURNED, LARGE])
def test_both_ranks_see_the_weights_that_one_process_reads(read, name):
    want = MllmBackbone(Options(model=str(read / name)), None).build()
    for rank in (0, 1):
        found = of_rank(read, name, rank)
        assert found["parts"], "each rank keeps its part alone"
        for kind, given in (("weights", want.named_parameters()), ("buffers", want.named_buffers())):
            given = dict(given)
            assert found[kind].keys() == given.keys()
            assert all(torch.equal(found[kind][n], tensor) for n, tensor in given.items()), kind


def test_experts_as_they_were_published_are_turned(read):
    with safe_open(read / TURNED / "model.safetensors", "pt") as file:
        name = next(n for n in file.keys() if n.endswith("experts.down_proj"))  # noqa: SIM118 - no mapping
        published = file.get_tensor(name)
    assert torch.equal(of_rank(read, TURNED, 0)["weights"][name], published.transpose(1, 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_holds_its_part_and_some_layers_while_it_reads(read, rank):
    whole = sum(path.stat().st_size for path in (read / LARGE).glob("*.safetensors"))
    assert of_rank(read, LARGE, rank)["growth"] < whole / 2 + 5 * whole / 16
