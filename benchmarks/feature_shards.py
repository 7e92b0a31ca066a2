#!/usr/bin/env python
"""Training a head from feature shards, beside running the towers every step and beside one memory-mapped array.

    python benchmarks/feature_shards.py                 writes docs/benchmarks/feature_shards.md and .json
    python benchmarks/feature_shards.py --runs 1 --batches 64 --samples 2048

All three train the same head through the same engine, one process, in turn. The array is the ceiling: its reader picks
rows of one .npy by a random permutation and knows nothing of shards, records, bad samples, resume or ranks. Training
is measured from the second epoch on; reading alone, also in the first, in which the records are parsed.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import simplejpeg  # noqa: E402
import torch  # noqa: E402

from benchmarks import _page  # noqa: E402
from mmpeft_ds import recipe as recipes  # noqa: E402
from mmpeft_ds.data.bad_budget import BadBudget  # noqa: E402
from mmpeft_ds.data.batch import PackedBatch  # noqa: E402
from mmpeft_ds.data.feature_shards import read_features, write_class_texts  # noqa: E402
from mmpeft_ds.data.manifest import Manifest  # noqa: E402
from mmpeft_ds.data.stream import Step  # noqa: E402
from mmpeft_ds.data.writer import PARTS, write_manifest, write_shard  # noqa: E402
from mmpeft_ds.distributed import processes  # noqa: E402
from mmpeft_ds.engine import streams  # noqa: E402
from mmpeft_ds.engine.assembly.build import build  # noqa: E402
from mmpeft_ds.engine.assembly.resolve import resolve  # noqa: E402
from mmpeft_ds.engine.step import Stepper  # noqa: E402
from mmpeft_ds.engine.train_state import TrainState  # noqa: E402
from mmpeft_ds.precompute.feature_samples import FeatureSample  # noqa: E402
from mmpeft_ds.precompute.features import FeatureOptions, Maker, _finish, make_plan  # noqa: E402

CLASSES, VIEWS, PICTURES, PER_SHARD, WARM = 50, 4, 128, 1000, 3
TOWERS = {
    "name": "dual_encoder",
    "vision": "packaged:dinov2-focus",
    "text": "packaged:minilm",
    "image_size": 126,
    "projection": "none",
}
LABELS = [f"class_{c}" for c in range(CLASSES)]


# -------------------------------------------------------------------------------------------------------- data


def write_pictures(dir: Path) -> Manifest:
    """Random 160x160 JPEG pictures with classes, one shard."""
    rng = np.random.default_rng(0)

    def samples() -> Iterator[FeatureSample]:
        for i in range(PICTURES):
            coarse = rng.integers(0, 256, (20, 20, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            data = simplejpeg.encode_jpeg(np.ascontiguousarray(coarse), quality=90, colorspace="RGB")
            yield FeatureSample(f"{i}", None, {}, [("jpg", data)], record_of(i))

    return _write(dir, "pictures", samples(), PICTURES)


def write_features(dir: Path, count: int, towers: dict[str, Any]) -> Manifest:
    """As many samples of random features as wanted, with the widths of the towers."""
    rng, width = np.random.default_rng(1), towers["image_width"]
    samples = (
        FeatureSample(f"{i}", rng.normal(size=(1 + VIEWS, width)).astype(np.float16), {}, [], record_of(i))
        for i in range(count)
    )
    return _write(dir, "features", samples, count, {**towers, "views": VIEWS})


def record_of(i: int) -> dict[str, Any]:
    return {"label": i % CLASSES, "class_name": LABELS[i % CLASSES], "source_id": f"pictures/train-{i:09d}"}


def _write(dir: Path, name: str, samples: Any, count: int, towers: dict[str, Any] | None = None) -> Manifest:
    (dir / PARTS).mkdir(parents=True)
    samples, parts = iter(samples), []
    for number, first in enumerate(range(0, count, PER_SHARD)):
        own = [next(samples) for _ in range(min(PER_SHARD, count - first))]
        parts.append(write_shard(dir, name, "train", number, first, own))
    if towers:
        texts = torch.randn(CLASSES, 1, towers["text_width"], generator=torch.Generator().manual_seed(0))
        towers["classes"] = write_class_texts(dir, name, texts, -texts)
    source = {"name": "benchmark"}
    return write_manifest(dir, name, "CC0-1.0", source, PER_SHARD, {"train": parts}, LABELS, "train", towers)


# ----------------------------------------------------------------------------------------------------- systems


class System:
    """A head in the engine, and where its batches come from."""

    def __init__(self, folder: Path, dir: Path, batch: int, live: bool):
        where = {"images": "live", "encoder": TOWERS} if live else {}
        self.batch, self.recipe = batch, recipes.from_dict(
            {
                "run_dir": str(folder / "run"),
                "backbone": {"name": "features", "texts": "none", **where},
                "method": {"name": "linear_probe", "solver": "gradient"},
                "data": {
                    "sources": [{"dir": str(dir), "task": {"name": "classification"}}],
                    "global_batch": batch,
                    "workers": 0,
                    "last_batch": "drop",
                },
                "optim": {"lr": 1e-3, "epochs": 1},
                "engine": {"deepspeed": "ds_configs/zero1.json"},
            }
        )  # fmt: skip
        self.ranks = processes.start(self.recipe.engine.threads, self.recipe.seed)
        self.resolved = resolve(self.recipe)
        self.built = build(self.resolved, self.ranks)
        self.stream = streams.make_stream(self.resolved, self.resolved.train, self.ranks, train=True)

    def steps(self) -> Iterator[Step]:
        """Without end."""
        epoch = 0
        while True:
            yield from self.stream.epoch(epoch)
            epoch += 1

    def train(self, steps: Iterator[Step], count: int) -> float:
        """Samples a second over `count` steps, after some to warm up."""
        stepper = Stepper(self.resolved, self.built, self.ranks, 10**6, TrainState(), BadBudget(0, 1))
        began = 0.0
        for number in range(WARM + count):
            if number == WARM:
                began = time.perf_counter()
            waiting = time.perf_counter()
            step = next(steps)
            stepper.train_step(step, time.perf_counter() - waiting)
        return count * self.batch / (time.perf_counter() - began)


def array_steps(path: Path, labels: np.ndarray, batch: int) -> Iterator[Step]:
    """Steps from one memory-mapped array (n, 1 + V, D): one permutation per epoch, one random pass per visit."""
    array, rng = np.load(path, mmap_mode="r"), np.random.default_rng(0)
    names = [f"array/{i}" for i in range(len(array))]
    owner, weight = torch.arange(batch), torch.ones(batch)
    while True:
        order = rng.permutation(len(array))
        for first in range(0, len(order) - batch + 1, batch):
            rows = order[first : first + batch]
            features = torch.from_numpy(array[rows, rng.integers(1, 1 + VIEWS, batch)]).float()
            packed = PackedBatch(
                sample_id=[names[i] for i in rows.tolist()],
                weight=weight,
                images={"image_features": features},
                image_owner=owner,
                texts={},
                text_owner=owner,
                targets={"label": torch.from_numpy(labels[rows])},
                records=[{}] * batch,
                raw_texts=[""] * batch,
                bad=[],
            )
            yield Step(0, first // batch, [packed])


def reading(steps: Iterator[Step], count: int, batch: int) -> float:
    """Samples a second that batches come at, without training."""
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    return count * batch / (time.perf_counter() - began)


# --------------------------------------------------------------------------------------------------------- run


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=16_000, help="feature samples")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=60, help="of a measurement (towers: 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    args = parser.parse_args()
    gc.freeze()  # as the launchers do after their imports, so that no collection looks through the modules
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    report(args, result)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rates of every system and batch."""
    pictures = write_pictures(folder / "pictures")
    options = FeatureOptions(data=pictures.dir, out=folder / "made", views=0)
    live = System(folder, folder / "pictures", args.batches[0], live=True)
    maker = Maker(live.recipe, pictures, options, live.ranks.device, None)
    plan = make_plan(pictures, options, maker.towers())
    maker.build()
    began = time.perf_counter()
    for job in plan.todo:
        maker.write(job)
    making = PICTURES / (time.perf_counter() - began)
    _finish(maker, plan, 1.0)
    towers = dict(Manifest.load(folder / "made").towers)
    features = write_features(folder / "features", args.samples, towers)
    stored = read_features(features, "train")
    np.save(folder / "array.npy", stored.image.half().numpy())
    rows: dict[str, Any] = {}
    towers_rate = [live.train(live.steps(), 3) for _ in range(args.runs)]
    log(f"towers every step, batch {args.batches[0]}: {statistics.median(towers_rate):,.1f} samples/s")
    for batch in args.batches:
        system = System(folder, folder / "features", batch, live=False)
        found: dict[str, list[float]] = {n: [] for n in ("shards", "array", "read_first", "read", "read_array")}
        labels, ours = stored.label.numpy(), system.steps()
        reading(
            ours, args.samples // batch, batch
        )  # the records of the first epoch, which is measured on its own below
        for _ in range(args.runs):
            found["shards"].append(system.train(ours, args.steps))
            found["array"].append(system.train(array_steps(folder / "array.npy", labels, batch), args.steps))
        epoch = args.samples // batch
        for _ in range(args.runs):
            stream = streams.make_stream(system.resolved, system.resolved.train, system.ranks, train=True)
            found["read_first"].append(reading(stream.epoch(0), epoch, batch))
            found["read"].append(reading(stream.epoch(1), epoch, batch))
            stream.close()
            steps = array_steps(folder / "array.npy", labels, batch)
            next(steps)
            found["read_array"].append(reading(steps, epoch, batch))
        system.stream.close()
        rows[str(batch)] = found
        log(f"batch {batch}: " + ", ".join(f"{n} {statistics.median(v):,.0f}" for n, v in found.items()))
    return {"towers": towers_rate, "making": making, "batches": rows, "width": towers["image_width"]}


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the table, and write it beside the numbers."""
    machine = _page.machine()
    towers = statistics.median(result["towers"])
    lines = [
        "# Training a head from feature shards",
        "",
        f"{args.samples:,} samples of (1 + {VIEWS}, {result['width']}) float16, one augmented pass per visit, linear "
        f"head, ZeRO-1, one process, no loader workers; median of {args.runs} runs in turn. {machine}. "
        "`python benchmarks/feature_shards.py` repeats it.",
        "",
        "| batch | from shards, samples/s | from one array (ceiling) | share of the ceiling | times the towers |",
        "|---|---|---|---|---|",
    ]
    for batch, found in result["batches"].items():
        ours, ceiling = statistics.median(found["shards"]), statistics.median(found["array"])
        lines.append(f"| {batch} | {ours:,.0f} | {ceiling:,.0f} | {ours / ceiling:.2f} | {ours / towers:,.0f}x |")
    lines += [
        "",
        f"With the towers in every step (DINOv2 ViT-S/14 at {TOWERS['image_size']} px, batch {args.batches[0]}, from "
        f"pixels): {towers:,.1f} samples/s. Making features once: {result['making']:,.1f} images/s.",
        "",
        "Reading alone, without training; everything that a batch brings: features, labels, records, sample ids.",
        "",
        "| batch | shards, first epoch | shards, later epochs | one array | share of the array |",
        "|---|---|---|---|---|",
    ]
    for batch, found in result["batches"].items():
        first, later, array = (statistics.median(found[n]) for n in ("read_first", "read", "read_array"))
        lines.append(f"| {batch} | {first:,.0f} | {later:,.0f} | {array:,.0f} | {later / array:.2f} |")
    _page.write("feature_shards", "\n".join(lines), {"machine": machine, **result}, args.out)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
