"""Samples/s from shards to uint8 224x224 batches: our stream compared with webdataset and megatron-energon, same work.

    python benchmarks/loader.py --peer-python /path/to/venv-with-energon/bin/python

Every measurement is a fresh process, in turn, three runs each, medians. Times to the first batch include the start of
the workers, rates do not, for all loaders. Peers decode and resize with Pillow, as is usual; `webdataset + our
decoder` shows what the decoder alone does for them. Writes docs/benchmarks/loader.md and .json.
"""

from __future__ import annotations

import argparse
import io
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

from benchmarks import _page  # noqa: E402
from mmpeft_ds.data.transform import ImageTransform  # noqa: E402

SIZE, BATCH, SHUFFLE, SEED = 224, 64, 1000, 1
LOADERS = (
    "mmpeft_ds", "mmpeft_ds scaled", "mmpeft_ds resized", "webdataset", "webdataset + our decoder", "megatron-energon",
)  # fmt: skip
# In it are the same photos as `prepare.py --resize` stores them.
RESIZED = "resized"
# A rate is taken over the batches after these, so that batches made while waiting for the first do not count.
WARM_UP = 8


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
        "--peer-python", default=sys.executable, help="interpreter that has megatron-energon and torch"
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

    torch.set_num_threads(1)
    make = {"megatron-energon": energon}.get(loader, webdataset if loader.startswith("webdataset") else ours)
    mode, _, step = mode.partition(":")
    try:
        return make(loader, dir, workers, world_size, mode, int(step or 0))
    except ImportError as error:
        return {"missing": f"{error.name or error} is not installed"}


def timed(batches, begin: float) -> dict:
    """Rate and time to the first batch of an iterable of (keys, images)."""
    times, counts = [], []
    for keys, images in batches:
        assert tuple(images.shape[1:]) in ((3, SIZE, SIZE), (SIZE, SIZE, 3))
        times.append(time.perf_counter())
        counts.append(len(keys))
    seconds = times[-1] - times[WARM_UP - 1]
    return {"rate": sum(counts[WARM_UP:]) / seconds, "first": times[0] - begin, "samples": sum(counts)}


def pil_224(data: bytes):
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.BICUBIC))


class Transform(ImageTransform):
    min_size = (SIZE, SIZE)

    def __call__(self, image, generator=None):
        from mmpeft_ds.data.decode import resize

        return resize(image, (SIZE, SIZE))


def our_224(data: bytes, scaled: bool = False):
    from mmpeft_ds.data.decode import decode

    return Transform()(decode(data, min_size=Transform.min_size if scaled else None))


def stack(images):
    import torch

    return torch.stack([torch.as_tensor(image) for image in images])


def nothing(record, generator):
    return [], []


def collate_images(images):
    return {"pixels": stack(images)}


def ours(loader, dir, workers, world_size, mode, step):
    from mmpeft_ds.data.manifest import Manifest
    from mmpeft_ds.data.options import DataOptions
    from mmpeft_ds.data.stream import Stream, StreamSource

    decode = "scaled" if loader.endswith("scaled") else "full"
    options = DataOptions(global_batch=BATCH, workers=workers, shuffle_block=SHUFFLE, decode=decode)

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


def webdataset(loader, dir, workers, world_size, mode, step):
    import webdataset as wds

    work = our_224 if "our decoder" in loader else pil_224
    urls = sorted(str(p) for p in dir.glob("photos-train-*.tar"))
    begin = time.perf_counter()
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=SEED, nodesplitter=wds.split_by_node)
        .shuffle(SHUFFLE, seed=SEED)
        .map(lambda s: (s["__key__"], work(s["jpg"])))
        .batched(BATCH, collation_fn=lambda pairs: ([k for k, _ in pairs], stack([i for _, i in pairs])))
    )
    batches = wds.WebLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    if mode == "rate":
        return timed(batches, begin)
    # It keeps no position: a resume reads (and decodes) everything before it again.
    keys = []
    for i, (batch, _) in enumerate(batches):
        if i == step:
            first = time.perf_counter() - begin
        if i >= step:
            keys += batch
        if len(keys) >= 100:
            return {"keys": keys[:100], "first": first}
    raise AssertionError("fewer batches than asked for")


def energon(loader, dir, workers, world_size, mode, step):
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    @edataclass
    class Decoded(Sample):
        image: np.ndarray

    @stateless
    def cook(sample: dict) -> Decoded:
        return Decoded(**basic_sample_keys(sample), image=pil_224(sample["jpg"]))

    class Work(DefaultTaskEncoder):
        decoder = None
        cookers = [Cooker(cook)]

        def batch(self, samples):
            return [s.__key__ for s in samples], stack([s.image for s in samples])

        def encode_batch(self, batch):
            return batch

    def open_loader(rank=0):
        config = WorkerConfig(rank=rank, world_size=world_size, num_workers=workers, seed_offset=SEED)
        dataset = get_train_dataset(
            link_for_energon(dir),
            worker_config=config,
            batch_size=BATCH // world_size,
            shuffle_buffer_size=SHUFFLE,
            max_samples_per_sequence=100,
            task_encoder=Work(),
        )
        return get_savable_loader(dataset, prefetch_factor=4)

    begin = time.perf_counter()
    if mode == "rate":
        # It repeats for ever: take as many batches as an epoch has.
        shards = json.loads((dir / "manifest.json").read_text())["splits"]["train"]
        return timed(itertools.islice(open_loader(), sum(s["samples"] for s in shards) // BATCH), begin)
    state_file = dir / f"energon-{workers}-{world_size}.state"
    import torch

    if mode == "keys":
        loader = open_loader()
        batches = iter(loader)
        for _ in range(step):
            next(batches)
        torch.save(loader.save_state_rank(), state_file)
        return {"keys": [key for _ in range(3) for key in next(batches)[0]][:100]}
    state = torch.load(state_file, weights_only=False)
    begin = time.perf_counter()
    loader = open_loader()
    loader.restore_state_rank(state)
    batches = iter(loader)
    keys = list(next(batches)[0])
    first = time.perf_counter() - begin
    while len(keys) < 100:
        keys += next(batches)[0]
    return {"keys": keys[:100], "first": first, "state_bytes": state_file.stat().st_size}


def link_for_energon(dir: Path) -> Path:
    """A folder with links to the same tars and energon's own index beside them."""
    folder = dir / "energon"
    if not (folder / ".nv-meta" / "dataset.yaml").exists():
        folder.mkdir(exist_ok=True)
        for tar in dir.glob("photos-train-*.tar"):
            if not (folder / tar.name).exists():
                os.link(tar, folder / tar.name)
        command = [str(Path(sys.executable).with_name("energon")), "prepare", "--non-interactive", "--force-overwrite"]
        command += ["--no-progress", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", str(folder)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


# All measurements and the report ------------------------------------------------------------


def once(args, loader: str, workers: int, world_size: int, mode: str) -> dict:
    python = args.peer_python if loader == "megatron-energon" else sys.executable
    command = [python, __file__, "--dir", str(args.dir), "--one", loader, str(workers), str(world_size), mode]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
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
    for workers in args.workers:
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
        resume = ", ".join(f"{r['resume'][w]['seconds']:.2f}" for w in args.workers)
        same = ", ".join("yes" if r["resume"][w]["same_keys"] else "no" for w in args.workers)
        ranks = [r["resume"][w]["other_ranks"] for w in args.workers]
        other = ", ".join("yes" if all(o.values()) else "no" for o in ranks) if all(ranks) else "-"
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
