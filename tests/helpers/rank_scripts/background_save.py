"""Ranks of test_background_save_ranks.py: a step saved in the foreground and, while the training goes on, in the
background.

    ... tests.helpers.rank_scripts.background_save WORK bytes     both saves under every stage; results in WORK/R.json
    ... tests.helpers.rank_scripts.background_save WORK full      rank 0 finds no room
    ... tests.helpers.rank_scripts.background_save WORK dies      rank 1 is killed before it has sent its part
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import deepspeed
import torch.distributed as dist

from mmpeft_ds import console
from mmpeft_ds.distributed import processes
from mmpeft_ds.engine import checkpoint, checkpoint_files
from mmpeft_ds.engine.background import Background
from mmpeft_ds.engine.zero import full_state, snapshot
from mmpeft_ds.errors import BadInput
from tests.helpers.device.counters import counted
from tests.helpers.rank_scripts.checkpoint import MORE, STEPS, make_named, save, train

CASES = (
    *(f"stage{stage}" for stage in range(4)),
    "stage3-bf16",
    "stage1-sgd",
    "stage3-sgd",
    "stage1-muon",
    "stage3-muon",
)


def live(self, tensors):
    """`HostCopies.take` that copies nothing."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def behind(folder: Path, engine, trainables, background: Background, step: int) -> Path:
    """A checkpoint in the background, which looks at nothing before some more steps are done."""
    go = threading.Event()
    with mock.patch.object(snapshot.HostCopies, "wait", lambda self: go.wait(60)):
        with counted() as counts:
            save(folder, engine, trainables, step, {}, background=background)
        assert not sum(counts.collectives.values()), "the training waits for other ranks"
        train(engine, step, MORE)
        assert not (folder / "checkpoints").exists()
        go.set()
        background.wait()
    return folder / "checkpoints" / checkpoint_files.name(step)


def both(work: Path, name: str, background: Background) -> dict:
    """Whether both saves of a step wrote the same bytes, twice, and whether one that copies nothing does."""
    engine, trainables = make_named(name, int(name[5]))
    step, results = STEPS, {}
    train(engine, 0, STEPS)
    for turn in ("first", "again", "live"):
        save(work / name / turn, engine, trainables, step, {})
        nothing = mock.patch.object(snapshot.HostCopies, "take", live if turn == "live" else snapshot.HostCopies.take)
        with nothing:
            path = behind(work / name / f"{turn} behind", engine, trainables, background, step)
        step += MORE
        if dist.get_rank() == 0:
            expected, written = contents(work / name / turn / "checkpoints" / path.name), contents(path)
            same = [file for file in expected if written.get(file) == expected[file]]
            results[turn] = {"same": same, "files": list(expected), "damage": checkpoint_files.damage(path)}
    engine.destroy()
    return results


def written(work: Path) -> None:
    background = Background()
    results = {name: both(work, name, background) for name in CASES}
    (work / f"{dist.get_rank()}.json").write_text(json.dumps(results))


def full(work: Path) -> None:
    """Every rank learns of a full disk, in one line, when it asks; the next save may succeed."""
    engine, trainables = make_named("stage1", 1)
    train(engine, 0, 1)
    background, told = Background(), []
    with mock.patch.object(checkpoint_files, "write", side_effect=OSError(28, "No space left on device", "weights")):
        save(work, engine, trainables, 1, {}, background=background)
        try:
            background.wait()
        except BadInput as error:
            told.append(str(error))
    failed = background.failed
    save(work, engine, trainables, 1, {}, background=background)
    background.wait()
    facts = {"told": told, "failed": failed, "then": background.failed, "name": checkpoint.newest_valid(work).name}
    (work / f"{dist.get_rank()}.json").write_text(json.dumps(facts))


def dies(work: Path) -> None:
    engine, trainables = make_named("stage1", 1)
    train(engine, 0, 1)
    background = Background()
    save(work, engine, trainables, 1, {}, background=background)
    background.wait()
    if dist.get_rank() == 1:
        with mock.patch.object(full_state, "of_held", lambda *args, **kwargs: time.sleep(60)):
            save(work, engine, trainables, 2, {}, background=background)
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)
    save(work, engine, trainables, 2, {}, background=background)
    background.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("mode", choices=("bytes", "full", "dies"))
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()
    if args.mode == "dies":
        processes.start()
        return dies(args.work)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    {"bytes": written, "full": full}[args.mode](args.work)
    dist.barrier()
    return None


if __name__ == "__main__":
    console.run(main)
