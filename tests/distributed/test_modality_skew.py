"""Samples with no picture, pictures, videos, or both, mixed at random over three ranks of ZeRO-3: no rank waits."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import yaml

from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.writer import RawSample
from tests.helpers import launch
from tests.helpers.data.images import picture
from tests.helpers.data.mixed_media import sample
from tests.helpers.data.tiny_shards import write_shards
from tests.helpers.models import family_traits
from tests.helpers.runs import tiny_talk

pytestmark = pytest.mark.distributed
SEED = int(os.environ.get("MMPEFT_SEED", 0))
OTHERS = (("llava_onevision", "internvl", "qwen3_vl"), ("hunyuan_vl", "unlimited_ocr", "step3p7"))
FROZEN_TOWER = ("hunyuan_vl",)  # is refused otherwise
OF_TEXT = r".*language_model.*\.(q_proj|v_proj)"
LORA = {"name": "lora", "r": 2, "target_modules": r".*\.(q_proj|v_proj|qkv)"}  # of both towers


def shown(i: int, draw: random.Random) -> RawSample:
    """A question about no picture or some, of which large ones have parts where a family cuts images."""
    sizes = draw.choices([(8, 6), (60, 40), (200, 20)], k=draw.choice([0, 1, 3]))
    asked = {"from": "human", "value": "<image>\n" * len(sizes) + "what is it ?"}
    record = {"conversations": [asked, {"from": "gpt", "value": draw.choice(["red", "a blue a yes"])}]}
    return RawSample(f"s{i}", [("png", picture((i, 99, 9), size=size)) for size in sizes], record)


def prepare(folder: Path, family: str, steps: int) -> str:
    folder.mkdir()
    family_traits.write(folder / "model", family)
    draw = random.Random(SEED)
    made = shown if family_traits.lacking("video", family) else sample
    write_shards(folder / "data", [made(i, draw) for i in range(60)], per_shard=11, name="mixed")
    raw = yaml.safe_load(Path(tiny_talk.recipe(folder, "run", stage=3)).read_text())
    raw["method"] = LORA | ({"target_modules": OF_TEXT} if family in FROZEN_TOWER else {})
    raw["backbone"]["max_text_length"] = 4000
    # a slot each, so that ranks rarely have the same
    raw["data"]["global_batch"] = 3
    raw["optim"] |= {"max_steps": steps, "epochs": 1000}
    raw["engine"] |= {"stall": 60, "timeout": 300, "eval_every": 200, "save_every": 1000}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return str(folder / "recipe.yaml")


def check(folder: Path, steps: dict[str, int], limit: float) -> None:
    """Train on three ranks, which are killed after `limit` seconds."""
    recipes = [prepare(folder / family, family, number) for family, number in steps.items()]
    done = launch.run_forked("tests.helpers.rank_scripts.train_recipes", *recipes, ranks=3, timeout=limit)
    assert done.code == 0 and not done.killed, done.tail()
    assert "waiting since" not in done.output, "nobody waited for longer than engine.stall"
    for family, number in steps.items():
        rows = [json.loads(line) for line in (folder / family / "run" / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == number and not rows[-1]["bad"], family
        kinds = Manifest.load(str(folder / family / "data")).fields["train"]
        assert kinds["images"]["min"] == 0
        assert family_traits.lacking("video", family) or kinds["videos[]"]["present"] > 0


def test_no_rank_waits_whichever_has_pictures_or_videos(tmp_path):
    check(tmp_path, {"qwen2_vl": 12}, 200.0)


@pytest.mark.slow
def test_no_rank_waits_for_five_hundred_steps(tmp_path):
    check(tmp_path, {"qwen2_vl": 500}, 1500.0)


@pytest.mark.slow
@pytest.mark.parametrize("families", OTHERS, ids=lambda families: families[0])
def test_no_rank_waits_whatever_the_tower_does_with_an_image(tmp_path, families):
    """Tiles, a part of the tower that runs once an image, images in parts and without any."""
    check(tmp_path, dict.fromkeys(families, 100), 1000.0)
