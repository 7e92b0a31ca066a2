#!/usr/bin/env python
"""Training steps with and without `engine.cache_frozen`, from the second epoch on, on the routing paper's shapes.

    python benchmarks/frozen_cache.py                  both models; writes docs/benchmarks/frozen_cache.*
    python benchmarks/frozen_cache.py --images 16 --batch 8 --rounds 3
    python benchmarks/frozen_cache.py --model questions --out runs

ViT-L/16 with RoBERTa-large reads five questions per image; ViT-L/16 with GPT-2 medium writes one caption per image.
Weights are random, pictures are JPEGs of 640 x 480. One rank with one thread trains routed adapters in the text tower.
Epochs without and with stored values take turns in one process, on one model. The time is that of the processor, with
loading and decoding, so other programs disturb it less than the clock. The targets: 2 times the samples per second
with five questions per image, 4 times with one caption.
"""

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402

TARGETS = {"questions": 2.0, "captions": 4.0}
TITLES = {
    "questions": "ViT-L/16 + RoBERTa-large, five questions per image",
    "captions": "ViT-L/16 + GPT-2 medium, one caption per image",
}
QUESTIONS = [
    "what colour is the left of the two birds?",
    "how many people stand behind the table?",
    "is the man in the picture wearing a hat?",
    "what is the woman on the right holding?",
    "what kind of animal is this?",
]
CAPTION = "a man on a small boat looks at two birds over the water"


def write_data(folder: Path, images: int) -> None:
    """Shards of `images` pictures, each with its questions and a caption."""
    import numpy as np
    from PIL import Image

    from mmpeft_ds.data.writer import PARTS, RawSample, write_manifest, write_shard

    samples = []
    for i in range(images):
        coarse = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((640, 480), Image.BICUBIC).save(buffer, "JPEG", quality=90)
        asked = [{"question": q, "answers": [f"answer {(i + k) % 7}"]} for k, q in enumerate(QUESTIONS)]
        record = {"questions": asked, "captions": [CAPTION]}
        samples.append(RawSample(name=str(i), images=[("jpg", buffer.getvalue())], record=record, features=None))
    (folder / PARTS).mkdir(parents=True)
    parts = {"train": [write_shard(folder, "made", "train", 0, 0, samples)]}
    labels = [f"answer {k}" for k in range(7)]
    write_manifest(folder, "made", "CC0-1.0", {"name": "made"}, images, parts, labels, "train")


def write_towers(folder: Path) -> None:
    """Configurations of the towers, and a tokenizer of few tokens; the tables are as large as published."""
    from transformers import GPT2Config, RobertaConfig, ViTConfig

    from tests.helpers.models.tiny_tokenizers import byte_pairs

    large = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    ViTConfig(image_size=224, patch_size=16, **large).save_pretrained(folder / "vision")
    tokenizer = byte_pairs([*QUESTIONS, CAPTION])
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id,
               eos_token_id=tokenizer.sep_token_id)  # fmt: skip
    RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **large, **ids
    ).save_pretrained(folder / "questions")
    ids.pop("pad_token_id")
    GPT2Config(n_embd=1024, n_layer=24, n_head=16, **ids).save_pretrained(folder / "captions")
    for name in TITLES:
        tokenizer.save_pretrained(folder / name)


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Processor seconds per sample of one model, by epoch, without and with stored values; and the losses."""
    from mmpeft_ds import recipe as recipes
    from mmpeft_ds.data.bad_budget import BadBudget
    from mmpeft_ds.data.frozen_store import size_of
    from mmpeft_ds.distributed import processes
    from mmpeft_ds.engine import frozen_images
    from mmpeft_ds.engine.assembly.build import build
    from mmpeft_ds.engine.assembly.resolve import resolve
    from mmpeft_ds.engine.step import Stepper
    from mmpeft_ds.engine.streams import make_stream
    from mmpeft_ds.engine.train_state import TrainState

    task = {"questions": {"name": "vqa", "loss": "bce"}, "captions": {"name": "captioning"}}[args.model]
    backbone = {"questions": "vision_text_encoder", "captions": "vision_text_decoder"}[args.model]
    towers = {"vision": str(folder / "vision"), "text": str(folder / args.model), "random_weights": True}
    recipe = recipes.from_dict(
        {
            "run_dir": str(folder / "run"),
            "backbone": {"name": backbone, **towers},
            "method": {"name": "routed_adapter", "route": "matmul1", "r": 64, "train_norms": True},
            "data": {
                "sources": [{"dir": str(folder / "data"), "task": task}],
                "global_batch": args.batch,
                "workers": 0,
            },
            "optim": {"max_steps": 1000, "warmup": 0.0, "schedule": "constant", "lr": 1e-4},
            "engine": {
                "deepspeed": "ds_configs/zero1.json",
                "threads": 1,
                "tower_batch": args.batch,
                "cache_frozen": {"dir": str(folder / "frozen")},
            },
        }
    )
    ranks = processes.start(recipe.engine.threads, recipe.seed)
    resolved = resolve(recipe)
    stream = make_stream(resolved, resolved.train, ranks, train=True)
    built = build(resolved, ranks)
    built.frozen = kept = frozen_images.of_built(resolved, built, ranks)
    stepper = Stepper(resolved, built, ranks, 1000, TrainState(), BadBudget(0, 1))

    def epoch(number: int, stored: bool) -> dict:
        stepper.frozen = kept if stored else None
        stream.keep_frozen(kept.spec if stored else None)
        before = kept.computed
        began, clock = time.process_time(), time.perf_counter()
        rows = [stepper.train_step(step, 0.0) for step in stream.epoch(number)]
        seconds, clock = time.process_time() - began, time.perf_counter() - clock
        samples = sum(row["samples"] for row in rows)
        return {
            "cpu_seconds_a_sample": seconds / samples,
            "samples_per_second": samples / clock,
            "computed": kept.computed - before,
        }

    first = epoch(0, True)  # fills the store, and warms up
    rounds = [(epoch(2 * i + 1, False), epoch(2 * i + 2, True)) for i in range(args.rounds)]
    assert all(with_store["computed"] == 0 for _, with_store in rounds)
    stream.close()
    return {
        "model": args.model,
        "first_epoch": first,
        "without": [without for without, _ in rounds],
        "with": [with_store for _, with_store in rounds],
        "bytes_an_image": size_of(folder / "frozen") / args.images,
    }


def table(results: list[dict], args: argparse.Namespace) -> str:
    """The page."""
    lines = [
        "# Caching frozen towers: steps with stored values of the vision tower",
        "",
        f"`python benchmarks/frozen_cache.py --images {args.images} --batch {args.batch} --rounds {args.rounds}` on "
        f"{_page.machine()}. One rank, one thread, float32; processor seconds per sample (a question, or a caption), "
        "median of the rounds; epochs without and with stored values in turn.",
        "",
        "| model | first epoch, which stores | without | with | ratio | target | KiB per image |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        without, stored = (
            statistics.median(r["cpu_seconds_a_sample"] for r in result[key]) for key in ("without", "with")
        )
        first = result["first_epoch"]["cpu_seconds_a_sample"]
        lines.append(
            f"| {TITLES[result['model']]} | {first:.3f} | {without:.3f} | {stored:.3f} | **{without / stored:.2f}** | "
            f"{TARGETS[result['model']]:.0f} | {result['bytes_an_image'] / 1024:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure both models, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="pictures of an epoch")
    parser.add_argument("--batch", type=int, default=4, help="pictures of a step")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each kind")
    parser.add_argument("--model", choices=TITLES, help="only this one")
    parser.add_argument("--out", type=Path, default=_page.FOLDER)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        (args.measure / f"{args.model}.json").write_text(json.dumps(measure(args, args.measure)))
        return
    folder = Path(tempfile.mkdtemp(prefix="frozen-"))
    try:
        write_data(folder / "data", args.images)
        write_towers(folder)
        results = []
        for name in [args.model] if args.model else TITLES:
            shutil.rmtree(folder / "frozen", ignore_errors=True)
            sizes = ["--images", str(args.images), "--batch", str(args.batch), "--rounds", str(args.rounds)]
            command = [sys.executable, __file__, "--model", name, "--measure", str(folder), *sizes]
            subprocess.run(command, check=True, cwd=ROOT)
            results.append(json.loads((folder / f"{name}.json").read_text()))
        _page.write("frozen_cache", table(results, args), {"machine": _page.machine(), "results": results}, args.out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
