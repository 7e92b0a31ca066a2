"""Thumbnails of the samples of feature shards, for display."""

from __future__ import annotations

from torch import Tensor

from mmpeft_ds.data.decode import decode
from mmpeft_ds.data.formats import READ
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.shards import ShardReader, members
from mmpeft_ds.errors import BadInput, BadSample

MAX_PIXELS = 1 << 22


class Thumbnails:
    """Sample id -> its first image, (3, H, W) in [0, 1]; None if there is none, or it cannot be read."""

    def __init__(self, manifest: Manifest, split: str):
        self.manifest, self.split = manifest, split

    def __call__(self, sample_id: str) -> Tensor | None:
        number = sample_id.rpartition("-")[2]
        if not number.isdigit() or not sample_id.startswith(f"{self.manifest.name}/{self.split}-"):
            return None
        shard, place = 0, int(number)
        for info in self.manifest.shards(self.split):
            if place < info.samples:
                break
            shard, place = shard + 1, place - info.samples
        reader = ShardReader(self.manifest, self.split)
        try:
            (piece,) = reader.read([(shard, place)])
            parts = {} if isinstance(piece, BadSample) else members(piece)[1]
            name = next((n for n in sorted(parts) if n.rpartition(".")[2] in READ), None)
            return None if name is None else decode(parts[name], MAX_PIXELS).float() / 255
        except (BadSample, BadInput, IndexError):
            return None
        finally:
            reader.close()
