"""Ranks of test_lora_starts_ranks.py: starts and tokens of LoRA, saved, exported and continued, in one launch.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.lora_starts CASES.json OUT

Each case is {name, config, recipe, then}: `then` are the changes with which it continues. Rank 0 writes OUT/NAME.pt.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mmpeft_ds import merging
from mmpeft_ds.distributed import processes
from mmpeft_ds.engine import checkpoint
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import fingerprint
from mmpeft_ds.methods.common.layers import kept_buffers
from tests.helpers.rank_scripts.ds_keys import AFTER, BEFORE, make, train


def run_case(case: dict, folder: Path, ranks: processes.Ranks) -> dict:
    made, state = make(case, folder, ranks), TrainState()
    model, backbone = made.built.model, made.resolved.backbone
    batch = merging.probe(backbone)
    first = merging.outputs(model.eval(), backbone, batch)
    rows = train(made, state, BEFORE, ranks)
    prints = fingerprint.of_frozen(model)
    engine, trainables = made.built.engine, made.built.trainables
    (folder / case["name"]).mkdir(exist_ok=True)
    path = checkpoint.save(
        folder / case["name"], engine, trainables, state, recipe={}, fingerprint=prints, keep_last=1
    )
    bare = dataclasses.replace(made.resolved, train=[], validation=[])
    export_adapter(folder / case["name"] / "adapter", engine, bare, {})
    trained = merging.outputs(model.eval(), backbone, batch)
    after = train(made, state, AFTER, ranks)
    engine.destroy()
    again = make(case | case["then"], folder, ranks)
    drawn = {name: buffer.clone() for name, buffer in kept_buffers(again.built.model).items()}
    now = fingerprint.of_frozen(again.built.model)
    state = checkpoint.load(path, again.built.engine, again.built.trainables, now)
    kept = kept_buffers(again.built.model)
    resumed = train(again, state, AFTER, ranks)
    again.built.engine.destroy()
    return {
        "rows": rows,
        "first": first,
        "trained": trained,
        "after": after,
        "resumed": resumed,
        "moved": max((float((kept[name] - drawn[name]).abs().max()) for name in kept), default=0.0),
    }


def main() -> None:
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    cases, out = json.loads(Path(args[0]).read_text()), Path(args[1])
    ranks = processes.start(threads=1)
    for case in cases:
        result = run_case({"looking": False, **case}, out, ranks)
        if ranks.rank == 0:
            torch.save(result, out / f"{case['name']}.pt")
            print("case done", case["name"], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
