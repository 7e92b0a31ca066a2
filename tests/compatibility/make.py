"""Writes the run directories beside this file, with the code of commit 612641e; see README.md.

PYTHONPATH=OLD:OLD/tests python tests/compatibility/make.py tests/compatibility     # OLD: a checkout of 612641e
"""

# isort: skip_file
# The modules are where they were in that commit.

import json
import os
import shutil
import sys
from pathlib import Path

import torch
import yaml
from engine import toy_study, toy_vqa
from safetensors.torch import load_file

from data_prep import fewshot
from mmpeft_ds import adapter, recipe
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.engine import resolve, trainer
from mmpeft_ds.engine.forward import answer

STEPS, LONGER = 3, 6


def composed() -> dict:
    """A ViT and a BERT of 16 channels with routed LoRA, trained norms and biases, and a trained head."""
    toy_vqa.tiny.make_towers(Path())
    manifest = toy_vqa.write_data(Path("shards"), train=12, val=4)
    backbone = resolve.make_backbone(toy_vqa.recipe(Path()), toy_vqa.LABELS)
    vector = [0.5 + i / (toy_vqa.tiny.WIDTH - 1) for i in range(toy_vqa.tiny.WIDTH)]
    manifest.statistics[backbone.statistics_key()] = {"mean": vector, "std": vector[::-1], "count": 12}
    manifest.save(Path("shards"))
    raw = recipe.to_dict(toy_vqa.recipe(Path()))
    for source in (*raw["data"]["sources"], *raw["data"]["validation"]):
        source["dir"] = "shards"
    return raw


def features() -> dict:
    """Tip-Adapter-F on stored features: a bank, weights that train, and numbers that a search finds."""
    toy_study.SIZES = {"train": 3, "val": 2}
    toy_study.write_style(Path("shards"), "plain", toy_study.CLASSES)
    fewshot.main(["shards", "--shots", "2", "--seeds", "1"])
    task = {"name": "classification"}
    return {
        "run_dir": "run",
        "backbone": {"name": "features"},
        "method": {"name": "tip_adapter", "train_keys": True},
        "data": {
            "sources": [{"dir": "shards", "task": task, "subset": "fewshot/2-seed1.json"}],
            "validation": [{"dir": "shards", "split": "val", "task": task}],
            "global_batch": 6,
            "workers": 0,
        },
        "optim": {},
        "engine": {"deepspeed": "ds_configs/zero1.json", "threads": 1},
    }


def questions() -> tuple[list, list]:
    """What is asked of the composed model: pictures from the shards' own making, several questions each."""
    return [toy_vqa.png(i) for i in range(2000, 2004)], [toy_vqa.QUESTIONS[: 1 + i % 3] for i in range(4)]


def stored_features() -> tuple[list, list]:
    """Rows of features that the head is asked about."""
    drawn = torch.randn(5, 1 + toy_study.VIEWS, toy_study.WIDTH, generator=torch.Generator().manual_seed(3))
    return list(drawn), [""] * 5


def main(out: Path) -> None:
    """Train each for a few steps, keep the run as it is then, and note how it goes on and what the adapter answers."""
    for name, prepare, asked in (("composed", composed, questions), ("features", features, stored_features)):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir()
        os.chdir(out / name)
        raw = prepare() | {"run_dir": "run", "seed": 3, "monitor": {"tensorboard": False, "samples": 0}}
        raw["optim"] |= {"lr": 0.03, "max_steps": STEPS, "warmup": 0.0, "schedule": "constant"}
        raw["engine"] |= {"keep_last": 1}
        Path("recipe.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        trainer.run(recipe.load("recipe.yaml"))
        loaded = adapter.load("run/adapter")
        images, texts = asked()
        with torch.no_grad():
            batch = loaded.batch(images, texts)
            logits = answer(loaded.model, loaded.backbone, loaded.task, batch).logits
        shutil.copytree("run", "kept")
        trainer.run(recipe.load("recipe.yaml", [f"optim.max_steps={LONGER}"]))
        rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
        newest = Path("run/checkpoints") / Path("run/checkpoints/latest").read_text().strip()
        weights = load_file(newest / "weights.safetensors")
        expected = {
            "labels": Manifest.load("shards").labels,
            "predictions": [row["prediction"] for row in loaded.predict(images, texts)],
            "logits": logits.tolist(),
            "losses": {row["step"]: row["loss"] for row in rows},
            "gradient_norms": {row["step"]: row["grad_norm"] for row in rows},
            "weight_norms": {name: tensor.double().norm().item() for name, tensor in weights.items()},
        }
        shutil.rmtree("run")
        Path("kept").rename("run")
        Path("run/.lock").unlink()
        shutil.rmtree("shards/.parts")
        Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
