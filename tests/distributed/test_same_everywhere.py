"""Ranks that read another recipe, other data or another DeepSpeed JSON than rank 0 are refused before anything is
written; places and numbers of a machine's own may differ."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil

import pytest
import yaml

from tests.helpers import ROOT, launch
from tests.helpers.runs import tiny_vqa

pytestmark = pytest.mark.distributed
SCRIPT = "tests.helpers.rank_scripts.train_or_refuse"


def at(recipe: dict, key: str, value) -> dict:
    """A copy with another value at `a.0.b`."""
    recipe = copy.deepcopy(recipe)
    *way, last = [int(k) if k.isdecimal() else k for k in key.split(".")]
    section = recipe
    for k in way:
        section = section[k]
    section[last] = value
    return recipe


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, list[str]]:
    """By case, what both ranks ended with; rank 1 has the second recipe."""
    folder = tmp_path_factory.mktemp("same")
    tiny_vqa.prepare(folder)
    plain = yaml.safe_load((folder / "recipe.yaml").read_text())
    plain["optim"]["max_steps"] = 1
    shutil.copytree(folder / "data", folder / "same_data")
    for shard in (folder / "same_data").glob("*.tar"):  # copied as `cp` does
        os.utime(shard)
    tiny_vqa.write_data(folder / "other_data", val=8)
    zero = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    shutil.copy(ROOT / "ds_configs" / "zero3.json", folder / "same.json")
    zero["zero_optimization"]["reduce_bucket_size"] = 4096
    (folder / "other.json").write_text(json.dumps(zero))
    source = plain["data"]["sources"][0]
    cases = {
        "rate": at(plain, "optim.lr", 0.02),
        "length": at(plain, "optim.max_steps", 2),
        "validation": at(plain, "data.validation.0.dir", str(folder / "other_data")),
        "sources": at(plain, "data.sources", [source, source]),
        "json": at(plain, "engine.deepspeed", str(folder / "other.json")),
        "own": at(
            at(at(plain, "engine.deepspeed", str(folder / "same.json")), "data.prefetch", 2),
            "data.sources.0.dir",
            str(folder / "same_data"),
        ),
    }
    for name, other in cases.items():
        for rank, recipe in enumerate((plain, other)):
            own = at(recipe, "run_dir", str(folder / name))
            (folder / f"{name}{rank}.yaml").write_text(yaml.safe_dump(own))
    result = launch.run_forked(SCRIPT, *(str(folder / f"{name}{{rank}}.yaml") for name in cases), ranks=2, timeout=200)
    assert result.code == 0, result.tail()
    ends = re.findall(rf"rank \d {folder}/(\w+): (code \d|refused: .*?machines\.)", result.output)
    said = {name: [words for case, words in ends if case == name] for name in cases}
    return said | {"written": [name for name in cases if (folder / name).exists()]}


@pytest.mark.parametrize(
    ("case", "keys"),
    [
        ("rate", "optim.lr"),
        ("length", "optim.max_steps"),
        ("validation", "data.validation.0.dir"),
        ("sources", "data.sources.1.dir"),
        ("json", "engine.deepspeed"),
    ],
)
def test_what_a_rank_has_otherwise_is_named_on_all_ranks(said, case, keys):
    assert len(said[case]) == 2
    for words in said[case]:
        assert words.startswith("refused: rank 1 on ") and f" in {keys}" in words and "preflight" in words


def test_places_and_what_belongs_to_a_machine_may_differ(said):
    assert said["own"] == ["code 0", "code 0"]
    assert said["written"] == ["own"], "a refused start writes nothing"
