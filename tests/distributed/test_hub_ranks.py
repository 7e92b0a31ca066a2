"""Checkpoints of the hub with real ranks: one of each node reads the cache first, and all learn what is missing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.helpers import launch
from tests.helpers.runs import tiny_vqa

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = "tests.helpers.rank_scripts.hub"


def put(cache: Path, name: str, folder: Path) -> None:
    """A checkpoint as huggingface_hub keeps it."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, place / "snapshots" / COMMIT)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    """A folder with a recipe that names hub checkpoints, and a cache with them."""
    folder = tmp_path_factory.mktemp("hub")
    tiny_vqa.prepare(folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for tower in ("vision", "text"):
        put(folder / "cache", f"tiny/{tower}", folder / tower)
        recipe["backbone"][tower] = f"tiny/{tower}"
    recipe["optim"] |= {"max_steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(cached: Path, *how: str) -> launch.Result:
    return launch.run_forked(SCRIPT, str(cached / "recipe.yaml"), *how)


@pytest.mark.distributed
def test_one_rank_of_a_node_reads_the_cache_before_the_others(cached):
    result = run(cached)
    assert result.code == 0, result.tail()
    assert re.findall(r"rank (\d) fetches (\S+)", result.output) == [("0", "tiny/vision"), ("0", "tiny/text")]
    assert "rank 0: code 0" in result.output and "rank 1: code 0" in result.output


@pytest.mark.distributed
def test_what_one_node_cannot_get_is_told_on_all_ranks_in_one_line(cached):
    result = run(cached, "--nodes", "--missing-on", "1")
    assert result.code == 2 and not result.killed, result.tail()
    told = dict(re.findall(r"rank (\d): refused: (.*)", result.output))
    assert set(told) == {"0", "1"} and told["0"] == told["1"]
    assert re.search(r": cannot get 'tiny/vision' from the hub .*HF_HUB_OFFLINE=1.*hf download tiny/vision", told["0"])
    assert {who for who, _ in re.findall(r"rank (\d) fetches (\S+)", result.output)} == {"0", "1"}, "one of each node"
