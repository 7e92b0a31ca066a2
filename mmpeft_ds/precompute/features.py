"""Precomputed features: image and text shards are streamed once through frozen towers, into feature shards.

One shard of the source becomes one feature shard, see shard_jobs.py.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from mmpeft_ds.data.feature_shards import write_class_texts
from mmpeft_ds.data.manifest import FILE, NAME, Manifest, local_path, sample_key
from mmpeft_ds.data.parts import PARTS, Part
from mmpeft_ds.data.shards import members
from mmpeft_ds.data.subset import fingerprint
from mmpeft_ds.data.writer import write_manifest, write_shard
from mmpeft_ds.distributed import processes
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.engine.assembly import hub
from mmpeft_ds.errors import BadInput
from mmpeft_ds.precompute.feature_maker import PLACE, TEMPLATES, FeatureOptions, Maker
from mmpeft_ds.precompute.feature_samples import stored_sample
from mmpeft_ds.precompute.shard_jobs import PLAN, Job, Plan, carry_out, open_plan
from mmpeft_ds.recipe import Recipe
from mmpeft_ds.stop import StopFlag
from mmpeft_ds.tower_keys import same_key

__all__ = ["TEMPLATES", "FeatureOptions", "run"]


def run(recipe: Recipe, options: FeatureOptions) -> int:
    """Precompute the features of a data set with the towers of the recipe's backbone. Every rank calls it.

    Returns:
        exit code: 0 done or already there, 1 stopped by a signal or because the launcher has died.

    Raises:
        BadInput: on all ranks, in one line.
    """
    with StopFlag(recipe.engine.stop_grace) as stop:
        # The number of threads changes the rounding of matrix products, and the bytes must not depend on it.
        recipe.engine.threads = recipe.engine.threads or 1
        check_options(options)
        source = Manifest.load(options.data)
        ranks = processes.start(**recipe.start_options())
        hub.share(hub.named(recipe), recipe.engine.attention, ranks)
        maker = Maker(recipe, source, options, ranks.device, stop)
        plan = on_rank0(lambda: make_plan(source, options, maker.towers()))
        if plan.done:
            if ranks.rank == 0:
                print(f"{options.out}: these features are already there, nothing to do")
            return 0
        began = time.perf_counter()
        maker.build()
        stop.begin()
        finished = carry_out(maker, plan, ranks, "features")
        if not finished:
            if ranks.rank == 0:
                print(f"{options.out}: stopped; the same command continues")
            return 1
        seconds = time.perf_counter() - began
        on_rank0(lambda: _finish(maker, plan, seconds))
    return 0


def check_options(options: FeatureOptions) -> None:
    """Raise BadInput if the options cannot work."""
    low, high = options.view_scale
    if options.views < 0 or options.thumbnails < 0 or options.batch < 1 or options.threads < 1:
        raise BadInput("--views and --thumbnails are 0 or more, --batch and --threads 1 or more.")
    if not 0 < low <= high <= 1:
        raise BadInput(f"--view-scale: {low} to {high} is no range of shares in (0, 1].")
    for template in (*options.templates, *(options.negative_templates or ())):
        if template.count(PLACE) != 1:
            raise BadInput(f"template {template!r}: must hold {{}} once, where the name of the class belongs.")
    if not options.templates:
        raise BadInput("--templates: empty. Give one template a line, such as: a photo of a {}.")
    if options.name and not NAME.fullmatch(options.name):
        raise BadInput(f"--name: {options.name!r} may hold a-z, 0-9, _ and - only.")
    if local_path(str(options.out)) is None:
        raise BadInput(f"--out {options.out}: feature shards are written to a local directory.")


def make_plan(source: Manifest, options: FeatureOptions, towers: dict[str, Any]) -> Plan:
    """Plan the shards in `options.out`, on rank 0, and write there what is being made.

    Raises:
        BadInput: the directory holds something else: features of other towers or options, or another data set.
    """
    out, splits = options.out, list(options.splits) or list(source.splits)
    wanted = {
        "name": options.name or source.name,
        "source": {split: fingerprint(source, split) for split in splits},
        "towers": towers,
    }

    def of_manifest(there: Manifest) -> dict[str, Any]:
        if not there.towers:
            raise BadInput(f"{out}: holds a data set of pixels. Choose another --out.")
        kept = {k: v for k, v in there.towers.items() if k in towers}
        return {"name": there.name, "source": there.source.get("fingerprint"), "towers": kept}

    if options.overwrite:
        _clear(out)
    return open_plan(
        source,
        out,
        wanted["name"],
        splits,
        wanted,
        of_manifest,
        lambda have, want: _refuse_difference(out, have, want),
    )


def _finish(maker: Maker, plan: Plan, seconds: float) -> None:
    """Write class texts, keys without gaps, side files and, last, the manifest."""
    options, source, out, name = maker.options, maker.source, maker.options.out, maker.name
    parts: dict[str, list[Part]] = {}
    left_out: dict[str, Any] = {}
    cut = 0
    for job, part, notes in maker.finished(plan):
        counted = left_out.setdefault(job.split, {"count": 0, "samples": []})
        counted["count"] += len(notes.bad)
        counted["samples"] += notes.bad
        cut += notes.counts["cut_captions"]
        part = renumbered(out, name, job, part, sum(p.shard.samples for p in parts.get(job.split, [])))
        if part.shard.samples:
            parts.setdefault(job.split, []).append(part)
        else:
            (out / part.shard.file).unlink()
    for job in plan.jobs:
        if job.split not in parts:
            raise BadInput(f"{source.dir}: split {job.split!r} has no readable sample. data_prep/verify.py lists why.")
    towers = {**maker.towers(), "logit_scale": float(maker.backbone.logit_scale_of(maker.model))}
    if towers["templates"]:
        positive, negative = maker.class_texts()
        towers["classes"] = write_class_texts(out, name, positive, negative)
    splits = list(parts)
    description = {
        "name": "features",
        "options": {"data": source.name},
        "fingerprint": {split: fingerprint(source, split) for split in splits},
        "left_out": {split: bad for split, bad in left_out.items() if bad["count"]},
        **({"cut_captions": cut} if cut else {}),
    }
    label_split = "train" if "train" in splits else splits[0]
    manifest = write_manifest(
        out,
        name,
        source.licence,
        description,
        source.samples_per_shard,
        parts,
        source.labels,
        label_split,
        towers,
    )
    shutil.rmtree(out / PARTS)
    made = sum(job.count for job in plan.todo)
    images = sum(_total(manifest, split, "features") for split in splits) // towers["image_width"]
    texts = sum(_total(manifest, split, "text") for split in splits) // max(towers["text_width"], 1)
    bad = sum(counted["count"] for counted in left_out.values())
    print(f"{manifest.name}: features of towers {towers['key']} in {out}")
    for split in splits:
        shards = manifest.splits[split]
        size = sum(s.bytes for s in shards) / 1e6
        print(f"  {split:8} {manifest.samples(split):>9,} samples  {len(shards):>5,} shards  {size:>9,.1f} MB")
    print(f"  {images:,} views of images, {texts:,} captions; {bad:,} bad samples left out (source.left_out)")
    if cut:
        print(f"  {cut:,} captions are longer than the text tower reads; their features lack the end of the text")
    if made:
        print(f"  {made:,} samples in {seconds:.1f} s: {made * (1 + options.views) / seconds:,.1f} images/s")


def renumbered(out: Path, name: str, job: Job, part: Part, first: int) -> Part:
    """The shard with keys from `first` on; it is written again if samples of shards before it were left out."""
    data = (out / part.shard.file).read_bytes()
    pieces = [data[begin : begin + length] for begin, length in part.offsets]
    if not pieces or members(pieces[0])[0] == sample_key(job.split, first):
        return part
    return write_shard(out, name, job.split, job.number, first, map(stored_sample, pieces))


def _total(manifest: Manifest, split: str, name: str) -> int:
    counts = manifest.fields[split].get(name, {})
    return round(counts.get("mean", 0) * counts.get("present", 0))


def _refuse_difference(out: Path, have: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise BadInput if `out` holds features of other options, naming those that differ."""
    wanted = json.loads(json.dumps(wanted))
    differs = [
        f"{key} {have.get(key)}, now {wanted[key]}" for key in ("name", "source") if have.get(key) != wanted[key]
    ]
    before = {"pixels": "shown", **have.get("towers", {})}  # those of before there was a choice
    if not same_key(before.get("key"), wanted["towers"]["key"]):
        differs.append(f"towers {before.get('key')}, now {wanted['towers']['key']}")
    differs += [
        f"{key} {before.get(key)}, now {value}"
        for key, value in wanted["towers"].items()
        if key not in ("key", "backbone") and before.get(key) != value
    ]
    if differs:
        raise BadInput(
            f"{out}: holds features made with {'; '.join(differs)}. Choose another --out, or replace them: "
            "--overwrite."
        )


def _clear(out: Path) -> None:
    """Delete the feature shards of `out` and their side files, and nothing else."""
    names = set()
    if (out / FILE).exists():
        manifest = Manifest.load(out)
        if not manifest.towers:
            raise BadInput(
                f"--overwrite {out}: holds a data set of pixels, which is left alone. Choose another --out."
            )
        names.add(manifest.name)
    if (out / PARTS / PLAN).exists():
        names.add(json.loads((out / PARTS / PLAN).read_text("utf-8"))["name"])
    (out / FILE).unlink(missing_ok=True)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    for name in names:
        ours = re.compile(re.escape(name) + r"(-[a-z0-9_]+(-\d{6}\.tar|\.index\.npy)|\.classes\.safetensors)")
        for path in out.iterdir():
            if ours.fullmatch(path.name):
                path.unlink()
