"""Ranks of test_reading_ranks.py: read checkpoints of multimodal language models into partitioned parameters.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.read_parts OUT FOLDER...

Writes OUT/FOLDER-RANK.pt: the whole weights by name as this rank sees them, and by how many bytes its memory grew at
most while it read, without pages of files.
"""

import sys
import threading
from pathlib import Path
from types import TracebackType

import torch
from transformers.integrations import HfDeepSpeedConfig

from mmpeft_ds.backbones.mllm.backbone import MllmBackbone
from mmpeft_ds.backbones.mllm.options import Options
from mmpeft_ds.distributed import processes
from mmpeft_ds.distributed.own_process import building
from mmpeft_ds.distributed.partitioned import gathered


class Growth:
    """Context that measures by how many bytes the anonymous memory of this process grows at most."""

    def __enter__(self) -> "Growth":
        self.start = self.most = _anonymous()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self.bytes = self.most - self.start

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.most = max(self.most, _anonymous())


def _anonymous() -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("RssAnon")) * 1024


def read(folder: str) -> dict:
    backbone = MllmBackbone(Options(model=folder), None)
    with building(), Growth() as growth:
        model = backbone.build()
    weights = {}
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            weights[name] = parameter.detach().clone()
    partitioned = all(hasattr(p, "ds_id") for p in model.parameters())
    return {"weights": weights, "buffers": dict(model.named_buffers()), "growth": growth.bytes, "parts": partitioned}


def main() -> None:
    out, *folders = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    ranks = processes.start(threads=1)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    partitioning = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})
    for folder in folders:
        torch.save(read(folder), Path(out) / f"{Path(folder).name}-{ranks.rank}.pt")
    del partitioning
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
