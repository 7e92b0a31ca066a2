"""Let a model that writes describe the images of a data set: new shards with its captions, everything else as it was.

One shard of the source becomes one shard, see `shard_jobs.py`. A sample that cannot be described keeps its place,
without a caption.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mmpeft_ds.data.manifest import NAME, Manifest, local_path
from mmpeft_ds.data.subset import fingerprint
from mmpeft_ds.data.writer import PARTS, Part, write_manifest
from mmpeft_ds.distributed import processes
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.engine.stop import StopFlag
from mmpeft_ds.errors import BadInput
from mmpeft_ds.precompute.caption_maker import DescribeOptions, Describer
from mmpeft_ds.precompute.shard_jobs import Plan, Told, carry_out, open_plan
from mmpeft_ds.recipe import Recipe


def run(recipe: Recipe, options: DescribeOptions, adapter_dir: Path | None = None) -> int:
    """Describe the images that `options` name. Every rank calls it.

    Args:
        recipe: its backbone section names the model, unless an adapter directory does.

    Returns:
        exit code: 0 done or already there, 1 stopped by a signal or because the launcher has died.

    Raises:
        BadInput: on all ranks, in one line.
    """
    with StopFlag(recipe.engine.stop_grace) as stop:
        # With other threads a matrix product rounds otherwise, and the bytes would depend on the ranks a machine has.
        recipe.engine.threads = recipe.engine.threads or 1
        ranks = processes.start(recipe.engine.threads, recipe.seed)
        source = Manifest.load(options.data)
        _check(source, options)
        describer = Describer(recipe, source, options, ranks.device, stop, adapter_dir)
        plan = on_rank0(lambda: _plan(describer))
        if plan.done:
            if ranks.rank == 0:
                print(f"{options.out}: these captions are already there, nothing to do")
            return 0
        if not carry_out(describer, plan, ranks, "describe"):
            if ranks.rank == 0:
                print(f"{options.out}: stopped; the same command continues")
            return 1
        on_rank0(lambda: _finish(describer, plan))
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


def _plan(describer: Describer) -> Plan:
    """What is to be done, on rank 0; notes in the new directory what is being made there. Raises BadInput."""
    source, options = describer.source, describer.options
    out, splits = options.out, list(options.splits) or list(source.splits)
    prints = {split: fingerprint(source, split) for split in splits}
    wanted = {"name": describer.name, "fingerprint": prints, "options": _options(describer)}

    def of_manifest(there: Manifest) -> dict[str, Any]:
        if there.source.get("name") != "describe":
            raise BadInput(f"{out}: holds another data set. Choose another --out.")
        return {"name": there.name, **{k: there.source[k] for k in ("fingerprint", "options")}}

    return open_plan(
        source,
        out,
        describer.name,
        splits,
        wanted,
        of_manifest,
        lambda have, want: _refuse_difference(out, have, want),
    )


def _finish(describer: Describer, plan: Plan) -> None:
    """Side files and, last, the manifest with where the captions come from."""
    source, out = describer.source, describer.options.out
    parts: dict[str, list[Part]] = {}
    told: dict[str, Told] = {}
    for job, part, here in describer.finished(plan):
        parts.setdefault(job.split, []).append(part)
        told.setdefault(job.split, Told()).add(here)
    description = {
        "name": "describe",
        "options": _options(describer),
        "fingerprint": {split: fingerprint(source, split) for split in parts},
        "of": {"name": source.name, "source": source.source},
        "described": {
            split: {"bad": len(total.bad), "bad_samples": total.bad, **total.counts} for split, total in told.items()
        },
    }
    label_split = "train" if "train" in parts else next(iter(parts))
    manifest = write_manifest(
        out, describer.name, source.licence, description, source.samples_per_shard, parts, source.labels, label_split
    )
    if source.statistics:  # of the images, which are the same
        manifest.statistics = source.statistics
        manifest.save(out)
    shutil.rmtree(out / PARTS)
    print(f"{manifest.name}: captions of {describer.origin['model'] or describer.origin['backbone']} in {out}")
    for split, total in told.items():
        print(
            f"  {split:8} {total.counts['samples']:>9,} samples  {total.counts['captions']:>9,} captions, "
            f"{total.counts['filtered']:,} of them filtered, {total.counts['empty']:,} empty; {len(total.bad):,} bad "
            "samples without one"
        )


def _options(describer: Describer) -> dict[str, Any]:
    return json.loads(json.dumps({"data": describer.source.name, **describer.origin}))


def _refuse_difference(out: Path, have: dict[str, Any], wanted: dict[str, Any]) -> None:
    differs = [
        f"{key} {have.get(key)}, now {wanted[key]}" for key in ("name", "fingerprint") if have[key] != wanted[key]
    ]
    before, now = have["options"], wanted["options"]
    differs += [f"{key} {before.get(key)}, now {value}" for key, value in now.items() if before.get(key) != value]
    if differs:
        raise BadInput(f"{out}: holds captions made with {'; '.join(differs)}. Choose another --out, or delete it.")
