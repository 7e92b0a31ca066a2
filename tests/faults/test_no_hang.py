"""A thousand steps on three ranks, of samples with and without pictures, graphs without edges, ranks without a
sample, answers of different lengths and samples that cannot be read, drawn at random: no rank waits for ever."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmpeft_ds.data import writer
from tests.helpers import launch
from tests.helpers.data import tiny_features
from tests.helpers.data.tiny_shards import write_shards
from tests.helpers.models import tiny_mllm
from tests.helpers.runs import endless, tiny_talk, tiny_tasks, tiny_vqa

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SEED = int(os.environ.get("MMPEFT_SEED", 0))
STEPS = {"talk": 300, "graph": 300, "tasks": 200, "pictures": 200}
LIMIT = 1500.0  # seconds, after which a rank that waits is killed


def broken(sample, draw: random.Random):
    """A sample, or with a chance of one in six one whose picture or features are damaged."""
    if draw.random() > 1 / 6:
        return sample
    if sample.images:
        return dataclasses.replace(sample, images=[(kind, b"no picture") for kind, _ in sample.images])
    if sample.features is not None:
        return dataclasses.replace(sample, features=np.full_like(sample.features, np.nan))
    return dataclasses.replace(sample, record={"nothing": 0})


def finish(folder: Path, raw: dict, name: str, stage: int) -> str:
    raw["run_dir"] = str(folder / "run")
    raw["data"] |= {"global_batch": 4, "max_bad_fraction": 1.0, "max_bad_in_a_row": 10**6, "workers": 0}
    raw["optim"] |= {"max_steps": STEPS[name], "epochs": 1, "lr": 1e-3}
    raw["engine"] |= {"deepspeed": f"ds_configs/zero{stage}.json", "eval_every": 50, "save_every": 100, "threads": 1}
    raw["engine"] |= {"stall": 60, "timeout": 300}
    raw["monitor"] = {"tensorboard": False, "samples": 0, "graph_every": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return str(folder / "recipe.yaml")


def talk(folder: Path, draw: random.Random) -> str:
    tiny_mllm.write(folder / "model", "qwen2_vl")
    write_shards(folder / "data", [broken(tiny_talk.talk(i), draw) for i in range(90)], per_shard=11, name="talk")
    raw = yaml.safe_load(Path(tiny_talk.recipe(folder, "run")).read_text())
    source = raw["data"]["sources"][0]
    raw["data"]["validation"] = [{**source, "task": {"name": "instruction", "max_new_tokens": 5}}]
    return finish(folder, raw, "talk", 3)


def graph(folder: Path, draw: random.Random) -> str:
    raw = yaml.safe_load(endless.prepare(folder).read_text())
    samples = [broken(tiny_features.sample(i), draw) for i in range(60)]
    tiny_features.write_features(folder / "drawn", samples)
    for role in ("sources", "validation"):
        raw["data"][role][0]["dir"] = str(folder / "drawn")
    raw["method"]["tau"] = 0.97  # hardly any edge: most graphs have none
    return finish(folder, raw, "graph", 2)


def tasks(folder: Path, draw: random.Random) -> str:
    plain = tiny_tasks.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_tasks, "sample", lambda kind, i: broken(plain(kind, i), draw))
        tiny_tasks.prepare(folder)
    return finish(folder, yaml.safe_load((folder / "recipe.yaml").read_text()), "tasks", 3)


def pictures(folder: Path, draw: random.Random) -> str:
    plain = tiny_vqa.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_vqa, "sample", lambda i, answer=int.__add__: broken(plain(i, answer), draw))
        tiny_vqa.prepare(folder)
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    raw["optim"]["accumulation"] = 2  # four slots in six parts
    return finish(folder, raw, "pictures", 1)


def test_a_thousand_steps_of_everything_that_differs_between_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_checked", lambda sample, parts, widths: {})
    draw, recipes = random.Random(SEED), []
    for make in (talk, graph, tasks, pictures):
        (tmp_path / make.__name__).mkdir()
        recipes.append(make(tmp_path / make.__name__, draw))
    draw.shuffle(recipes)
    done = launch.run_forked("tests.helpers.rank_scripts.train_recipes", *recipes, ranks=3, timeout=LIMIT)
    assert done.code == 0 and not done.killed, done.tail()
    assert "waiting since" not in done.output, "nobody waited for longer than engine.stall"
    steps = 0
    for name, expected in STEPS.items():
        found = [json.loads(line) for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        steps += len(found)
        assert len(found) == expected and sum(found[-1]["bad"].values()) > 0, name
        print(f"seed {SEED}, {name}: {len(found)} steps, bad samples {found[-1]['bad']}, row {sorted(found[-1])}")
    assert steps == 1000
