"""Samples/s from shards to uint8 224x224 batches: our stream compared with webdataset and megatron-energon, same work.

    python benchmarks/loader.py --peer-python /path/to/venv-with-the-peers/bin/python

Every measurement is a fresh process, in turn, three runs each, medians. Times to the first batch include the start of
the workers, rates do not, for all loaders. Without workers all have as many threads as there are cores, which ours
decodes in; `2 threads` decodes in two threads of each worker. Peers decode and resize with Pillow, as is usual; `+ our
decoder` shows what the decoder alone does for them. Writes docs/benchmarks/loader.md and .json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path[0] = str(REPO)

from benchmarks import _loader_peers, _page  # noqa: E402
from benchmarks._loader_work import BATCH, RESIZED, SEED, SHUFFLE, SIZE, Transform, our_224, pil_224, stack, timed  # noqa: E402

LOADERS = (
    "mmpeft_ds", "mmpeft_ds, 2 threads", "mmpeft_ds scaled", "mmpeft_ds resized", "webdataset",
    "webdataset + our decoder", "megatron-energon", "megatron-energon resized",
    "megatron-energon resized + our decoder", "litdata resized", "litdata resized + our decoder",
    "mosaic resized", "mosaic resized + our decoder",
)  # fmt: skip
# Loaders of others, by how their names begin.
PEERS = {
    "webdataset": _loader_peers.webdataset,
    "megatron-energon": _loader_peers.energon,
    "litdata": _loader_peers.litdata,
    "mosaic": _loader_peers.mosaic,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, default=Path("/tmp/mmpeft_ds_loader_benchmark"), help="where shards are kept"
    )
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--loaders", nargs="*", default=list(LOADERS), choices=LOADERS)
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        help="interpreter with torch, megatron-energon, litdata, mosaicml-streaming",
    )
    parser.add_argument("--out", type=Path, default=_page.FOLDER, help="folder of loader.md and .json")
    parser.add_argument("--one", nargs=4, metavar=("LOADER", "WORKERS", "WORLD", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        loader, workers, world_size, mode = args.one
        print(json.dumps(measure(loader, args.dir, int(workers), int(world_size), mode)))
        return
    prepare(args.dir, args.samples)
    decoders = decoder_quality(args.dir)
    rates = rates_in_turn(args)
    rows = [row(args, loader, rates[loader]) for loader in args.loaders]
    report(args, rows, decoders)


# The data set ------------------------------------------------------------


def photo(seed: int, height: int = 480, width: int = 640) -> np.ndarray:
    """uint8 (H, W, 3) with the 1/f spectrum of photographs, coloured, partly textured; about 100 kB as JPEG q90."""
    rng = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    radius[0, 0] = np.inf
    phases = np.exp(2j * np.pi * rng.random((3, *radius.shape)))
    luma, *colours = (np.fft.irfft2(phase / radius**1.6, s=(height, width)) for phase in phases)
    luma, colours = luma / luma.std(), [c / c.std() for c in colours]
    grain = rng.normal(0, 1, luma.shape) * np.where(luma > 0.3, 8.0, 3.0)
    grey = 127 + 50 * luma + grain
    return np.stack([grey + 10 * colours[0], grey, grey + 10 * colours[1]], -1).clip(0, 255).astype(np.uint8)


def prepare(dir: Path, samples: int) -> None:
    """Write the shards with our own writer, unless they are there."""
    import simplejpeg

    from mmpeft_ds.data.manifest import Manifest
    from mmpeft_ds.data.writer import PARTS, write_manifest, write_shard

    if (dir / "manifest.json").exists():
        stored = Manifest.load(dir).samples("train")
        if stored != samples:
            sys.exit(
                f"{dir}: holds {stored} photos, {samples} are asked for. Give --samples {stored}, or another --dir."
            )
        return
    from data_prep.common.resize import Resize, Resizer, described
    from data_prep.sources.base import RawSample

    how = Resize(SIZE).measured_on(samples)
    parts: dict[Path, list] = {dir: [], dir / RESIZED: []}
    for folder in parts:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
    total, per_shard = 0, 250
    for number, first in enumerate(range(0, samples, per_shard)):
        raw = []
        for i in range(first, min(samples, first + per_shard)):
            data = simplejpeg.encode_jpeg(photo(i), quality=90, colorspace="RGB", colorsubsampling="420")
            total += len(data)
            raw.append(RawSample(f"photo {i}", [("jpg", data)], {"number": i}))
        parts[dir].append(write_shard(dir, "photos", "train", number, first, raw))
        small, place = Resizer(how), (dir / RESIZED, "photos", "train", number, first)
        parts[dir / RESIZED].append(write_shard(*place, small.samples(raw), small.numbers))
        log(f"written {first + len(raw)} of {samples} photos, {total / (first + len(raw)) / 1000:.0f} kB each")
    for folder, source in ((dir / RESIZED, {"resize": described(how, parts[dir / RESIZED])}), (dir, {})):
        source = {"name": "benchmark", **source}
        write_manifest(folder, "photos", "CC0-1.0", source, per_shard, {"train": parts[folder]}, None, "train")


# One measurement, in its own process ------------------------------------------------------------


def measure(loader: str, dir: Path, workers: int, world_size: int, mode: str) -> dict:
    """`rate`: one epoch; `keys:N`: 100 keys from step N of an unbroken run; `resume:N`: those of a resume at N."""
    import torch

    torch.set_num_threads(threads_of_a_rank(workers))
    make = next((peer for name, peer in PEERS.items() if loader.startswith(name)), ours)
    mode, _, step = mode.partition(":")
    try:
        return make(loader, dir, workers, world_size, mode, int(step or 0))
    except ImportError as error:
        return {"missing": f"{error.name or error} is not installed"}


def threads_of_a_rank(workers: int) -> int:
    """All cores without workers, for every loader; else one."""
    return 1 if workers else len(os.sched_getaffinity(0))


def nothing(record, generator):
    return [], []


def collate_images(images):
    return {"pixels": stack(images)}


def ours(loader, dir, workers, world_size, mode, step):
    from mmpeft_ds.data.manifest import Manifest
    from mmpeft_ds.data.options import DataOptions
    from mmpeft_ds.data.stream import Stream, StreamSource

    decode = "scaled" if loader.endswith("scaled") else "full"
    threads = 2 if loader.endswith("2 threads") else 1
    options = DataOptions(
        global_batch=BATCH, workers=workers, worker_threads=threads, shuffle_block=SHUFFLE, decode=decode
    )
    manifest = Manifest.load(dir / RESIZED if loader.endswith(RESIZED) else dir)

    def open_stream(rank=0):
        source = StreamSource(manifest, "train", nothing, Transform(), collate_images, None, None)
        return Stream([source], options, rank=rank, world_size=world_size, seed=SEED)

    begin = time.perf_counter()
    if mode == "rate":
        stream = open_stream()
        next(stream.epoch(0))
        first = time.perf_counter() - begin
        stream.wait_for_workers()
        rates = timed(((b.records, b.images["pixels"]) for s in stream.epoch(1) for b in s.micro if b.images), begin)
        stream.close()
        return {**rates, "first": first}
    keys, first = [], None
    per_rank = [open_stream(rank) for rank in range(world_size)]
    epochs = [stream.epoch(0, step if mode == "resume" else 0) for stream in per_rank]
    for steps in zip(*epochs, strict=True):
        first = first or time.perf_counter() - begin
        if steps[0].step >= step:
            keys += [s for one in steps for b in one.micro for s in b.sample_id if s]
        if len(keys) >= 100:
            break
    for stream in per_rank:
        stream.close()
    return {"keys": keys[:100], "first": first}


# All measurements and the report ------------------------------------------------------------


def once(args, loader: str, workers: int, world_size: int, mode: str) -> dict:
    python = sys.executable if loader.startswith(("mmpeft_ds", "webdataset")) else args.peer_python
    command = [python, __file__, "--dir", str(args.dir), "--one", loader, str(workers), str(world_size), mode]
    threads = str(threads_of_a_rank(workers))
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"missing": f"exit code {done.returncode}: {reason[:200]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def rates_in_turn(args) -> dict:
    """Runs of every loader at every worker count: one of each, then the next of each, as a machine's speed drifts."""
    runs: dict = {loader: {workers: [] for workers in args.workers} for loader in args.loaders}
    for _, workers, loader in itertools.product(range(args.runs), args.workers, args.loaders):
        run = once(args, loader, workers, 1, "rate")
        runs[loader][workers].append(run)
        log(f"{loader}, {workers} workers: {run.get('missing') or format(run['rate'], '.0f') + ' samples/s'}")
    return runs


def row(args, loader: str, rates: dict) -> dict:
    found: dict = {"loader": loader, "rate": {}, "rates": {}, "first": {}, "resume": {}}
    for workers, runs in rates.items():
        if missing := next((r["missing"] for r in runs if "missing" in r), None):
            return {**found, "missing": missing}
        found["rates"][workers] = [r["rate"] for r in runs]
        found["rate"][workers] = statistics.median(r["rate"] for r in runs)
        found["first"][workers] = statistics.median(r["first"] for r in runs)
    half = args.samples // BATCH // 2
    for workers in args.workers if not loader.startswith(("litdata", "mosaic")) else ():
        whole = once(args, loader, workers, 1, f"keys:{half}")
        runs = [once(args, loader, workers, 1, f"resume:{half}") for _ in range(args.runs)]
        if missing := next((r["missing"] for r in (whole, *runs) if "missing" in r), None):
            sys.exit(f"{loader}, {workers} workers, resume: {missing}")
        result = {"seconds": statistics.median(r["first"] for r in runs)}
        result["same_keys"] = all(r["keys"] == whole["keys"] for r in runs)
        result["state_bytes"] = runs[0].get("state_bytes")
        other = {n: once(args, loader, workers, n, f"resume:{half}") for n in (2, 3)} if "mmpeft" in loader else {}
        result["other_ranks"] = {n: r.get("keys") == whole.get("keys") for n, r in other.items()} or None
        found["resume"][workers] = result
        log(f"{loader}, {workers} workers: resume {result}")
    return found


def decoder_quality(dir: Path) -> dict:
    """Images/s of one thread and PSNR against full Pillow decoding with Pillow's bicubic resize."""
    import tarfile

    import torch

    torch.set_num_threads(1)
    with tarfile.open(sorted(dir.glob("photos-train-*.tar"))[0]) as archive:
        photos = [archive.extractfile(m).read() for m in archive if m.name.endswith(".jpg")][:100]
    reference = [pil_224(data).astype(np.float64) for data in photos]
    measured = {"jpeg_bytes": statistics.mean(map(len, photos))}
    for name, work in {"Pillow": pil_224, "full": our_224, "scaled": lambda d: our_224(d, True)}.items():
        begin = time.perf_counter()
        images = [work(data) for data in photos]
        rate = len(photos) / (time.perf_counter() - begin)
        arrays = [i if isinstance(i, np.ndarray) else i.permute(1, 2, 0).numpy() for i in images]
        errors = [((a - r) ** 2).mean() for a, r in zip(arrays, reference, strict=True)]
        psnr = [10 * np.log10(255**2 / e) if e else float("inf") for e in errors]
        measured[name] = {"rate": rate, "psnr_mean": float(np.mean(psnr)), "psnr_min": float(np.min(psnr))}
        log(
            f"decoder {name}: {rate:.0f}/s, PSNR mean {measured[name]['psnr_mean']:.1f}, "
            f"min {measured[name]['psnr_min']:.1f}"
        )
    return measured


def report(args, rows: list[dict], decoders: dict) -> None:
    machine = f"{_page.machine()}, load at the end {os.getloadavg()}"
    lines = [
        "# Loading photos",
        "",
        f"{args.samples} JPEG photos of 640x480, quality 90, {decoders['jpeg_bytes'] / 1000:.0f} kB each; decode, "
        f"bicubic resize to {SIZE}x{SIZE} uint8, batches of {BATCH}. Median of {args.runs} runs. {machine}.",
        "",
        "| loader | "
        + " | ".join(f"{w} workers, samples/s" for w in args.workers)
        + " | first batch s | resume at half: next batch s | same next 100 keys | at 2, 3 ranks |",
        "|---|" + "---|" * (len(args.workers) + 4),
    ]
    base = next((r["rate"] for r in rows if r["loader"] == "webdataset" and "missing" not in r), {})
    for r in rows:
        if "missing" in r:
            lines.append(f"| {r['loader']} | not measured: {r['missing']} |" + " |" * (len(args.workers) + 3))
            continue
        rates = [
            f"{r['rate'][w]:.0f}" + (f" ({r['rate'][w] / base[w]:.2f}x)" if w in base else "") for w in args.workers
        ]
        first = ", ".join(f"{r['first'][w]:.2f}" for w in args.workers)
        measured = [r["resume"][w] for w in args.workers if w in r["resume"]]
        resume = ", ".join(f"{m['seconds']:.2f}" for m in measured) or "not measured"
        same = ", ".join("yes" if m["same_keys"] else "no" for m in measured) or "-"
        ranks = [m["other_ranks"] for m in measured]
        other = ", ".join("yes" if all(o.values()) else "no" for o in ranks) if all(ranks) and ranks else "-"
        lines.append("| " + " | ".join([r["loader"], *rates, first, resume, same, other]) + " |")
    lines += ["", "| one thread, decode + resize | images/s | PSNR mean / min dB against Pillow |", "|---|---|---|"]
    for name in ("Pillow", "full", "scaled"):
        d = decoders[name]
        psnr = "identical" if d["psnr_min"] == float("inf") else f"{d['psnr_mean']:.1f} / {d['psnr_min']:.1f}"
        lines.append(f"| {name} | {d['rate']:.0f} | {psnr} |")
    result = {"machine": machine, "rows": rows, "decoders": decoders}
    _page.write("loader", "\n".join(lines), result, args.out)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
