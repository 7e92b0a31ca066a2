"""Captions of the images of a data set by a generative model: new shards with them, all else as it was.

One shard of the source becomes one shard, see shard_jobs.py. A sample that cannot be read keeps its place, without a
caption.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mmpeft_ds.data.manifest import NAME, Manifest, local_path
from mmpeft_ds.data.parts import PARTS, Part
from mmpeft_ds.data.subset import fingerprint
from mmpeft_ds.data.writer import write_manifest
from mmpeft_ds.distributed import processes
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.engine.assembly import hub
from mmpeft_ds.errors import BadInput
from mmpeft_ds.precompute.caption_maker import CaptionMaker, DescribeOptions
from mmpeft_ds.precompute.shard_jobs import Plan, ShardNotes, carry_out, open_plan
from mmpeft_ds.recipe import Recipe
from mmpeft_ds.stop import StopFlag


def run(recipe: Recipe, options: DescribeOptions, adapter_dir: Path | None = None) -> int:
    """Make captions of the images of a data set. Every rank calls it.

    Args:
        recipe: its backbone section names the model, unless an adapter directory does.

    Returns:
        exit code: 0 done or already there, 1 stopped by a signal or because the launcher has died.

    Raises:
        BadInput: on all ranks, in one line.
    """
    with StopFlag(recipe.engine.stop_grace) as stop:
        # The number of threads changes the rounding of matrix products, and the bytes must not depend on it.
        recipe.engine.threads = recipe.engine.threads or 1
        source = Manifest.load(options.data)
        _check(source, options)
        ranks = processes.start(**recipe.start_options())
        if adapter_dir is None:
            hub.share(hub.named(recipe), recipe.engine.attention, ranks)
        maker = CaptionMaker(recipe, source, options, ranks.device, stop, adapter_dir)
        plan = on_rank0(lambda: _plan(maker))
        if plan.done:
            if ranks.rank == 0:
                print(f"{options.out}: these captions are already there, nothing to do")
            return 0
        stop.begin()
        if not carry_out(maker, plan, ranks, "describe"):
            if ranks.rank == 0:
                print(f"{options.out}: stopped; the same command continues")
            return 1
        on_rank0(lambda: _finish(maker, plan))
    return 0


def _check(source: Manifest, o: DescribeOptions) -> None:
    if min(o.captions, o.batch, o.threads) < 1:
        raise BadInput("--captions, --batch and --threads are 1 or more.")
    if o.captions > 1 and not o.generation.get("do_sample"):
        raise BadInput("--captions: more than one needs sampling, or all are the same. Add --generate do_sample=true.")
    if not o.field.isidentifier() or o.field == "source_name":
        raise BadInput(f"--field: {o.field!r} cannot name a field of the records. Use a word, such as captions.")
    if o.name and not NAME.fullmatch(o.name):
        raise BadInput(f"--name: {o.name!r} may hold a-z, 0-9, _ and - only.")
    if local_path(str(o.out)) is None:
        raise BadInput(f"--out {o.out}: shards are written to a local directory.")
    if source.towers:
        raise BadInput(f"{source.dir}: holds features, not pixels; give --data the images they were made from.")
    for split in o.splits or source.splits:
        source.shards(split)
        if o.field in source.fields.get(split, {}) and not o.replace:
            raise BadInput(
                f"{source.dir}: records of split {split!r} have {o.field!r} already. Choose another --field, or "
                "--replace."
            )


def _plan(maker: CaptionMaker) -> Plan:
    """Plan the shards, on rank 0, and write into the new directory what is being made there. Raises BadInput."""
    source, options = maker.source, maker.options
    out, splits = options.out, list(options.splits) or list(source.splits)
    fingerprints = {split: fingerprint(source, split) for split in splits}
    wanted = {"name": maker.name, "fingerprint": fingerprints, "options": _options(maker)}

    def of_manifest(there: Manifest) -> dict[str, Any]:
        if there.source.get("name") != "describe":
            raise BadInput(f"{out}: holds another data set. Choose another --out.")
        return {"name": there.name, **{k: there.source[k] for k in ("fingerprint", "options")}}

    return open_plan(
        source,
        out,
        maker.name,
        splits,
        wanted,
        of_manifest,
        lambda have, want: _refuse_difference(out, have, want),
    )


def _finish(maker: CaptionMaker, plan: Plan) -> None:
    """Write the side files and, last, the manifest, which says where the captions come from."""
    source, out = maker.source, maker.options.out
    parts: dict[str, list[Part]] = {}
    notes: dict[str, ShardNotes] = {}
    for job, part, of_shard in maker.finished(plan):
        parts.setdefault(job.split, []).append(part)
        notes.setdefault(job.split, ShardNotes()).add(of_shard)
    description = {
        "name": "describe",
        "options": _options(maker),
        "fingerprint": {split: fingerprint(source, split) for split in parts},
        "of": {"name": source.name, "source": source.source},
        "described": {
            split: {"bad": len(total.bad), "bad_samples": total.bad, **total.counts} for split, total in notes.items()
        },
    }
    label_split = "train" if "train" in parts else next(iter(parts))
    manifest = write_manifest(
        out,
        maker.name,
        source.licence,
        description,
        source.samples_per_shard,
        parts,
        source.labels,
        label_split,
        features_are=source.features_are,
    )
    if source.statistics:  # of the images, which have not changed
        manifest.statistics = source.statistics
        manifest.save(out)
    shutil.rmtree(out / PARTS)
    print(f"{manifest.name}: captions of {maker.origin['model'] or maker.origin['backbone']} in {out}")
    for split, total in notes.items():
        print(
            f"  {split:8} {total.counts['samples']:>9,} samples  {total.counts['captions']:>9,} captions, "
            f"{total.counts['filtered']:,} of them filtered, {total.counts['empty']:,} empty; {len(total.bad):,} bad "
            "samples without one"
        )


def _options(maker: CaptionMaker) -> dict[str, Any]:
    return json.loads(json.dumps({"data": maker.source.name, **maker.origin}))


def _refuse_difference(out: Path, have: dict[str, Any], wanted: dict[str, Any]) -> None:
    differs = [
        f"{key} {have.get(key)}, now {wanted[key]}" for key in ("name", "fingerprint") if have[key] != wanted[key]
    ]
    before, now = {"pixels": "shown", **have["options"]}, wanted["options"]  # the first of before there was a choice
    differs += [f"{key} {before.get(key)}, now {value}" for key, value in now.items() if before.get(key) != value]
    if differs:
        raise BadInput(f"{out}: holds captions made with {'; '.join(differs)}. Choose another --out, or delete it.")
