"""A small data set written with the project's own writer, and what a backbone and a task would do with its samples."""

from pathlib import Path

import torch

from mmpeft_ds.data.decode import resize
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.stream import StreamSource
from mmpeft_ds.data.writer import PARTS, RawSample, write_manifest, write_shard
from mmpeft_ds.errors import BadSample
from tests.helpers.data.images import encoded


def one_image(i: int) -> RawSample:
    return RawSample(f"source {i}", [("jpg", encoded(i))], {"texts": [f"what is {i}"], "answers": [i]})


def write_shards(dir: Path, samples: list[RawSample], per_shard: int = 7, name: str = "toy") -> Manifest:
    """A data set directory with one split, `train`."""
    (dir / PARTS).mkdir(parents=True)
    parts = []
    for number, first in enumerate(range(0, len(samples), per_shard)):
        parts.append(write_shard(dir, name, "train", number, first, samples[first : first + per_shard]))
    write_manifest(dir, name, "CC0-1.0", {"name": "toy"}, per_shard, {"train": parts}, None, "train")
    return Manifest.load(dir)


def read(record, generator):
    if not isinstance(record.get("texts"), list):
        raise BadSample("type", "texts is no list")
    # The drawn number shows whether the choice depends on the sample alone.
    draw = int(torch.randint(1_000_000, (), generator=generator))
    return record["texts"], [(answer, draw) for answer in record["answers"]]


def transform(image, generator):
    return resize(image, (16, 16))


def collate_images(images):
    return {"pixels": torch.stack(images)}


def collate_texts(texts):
    return {"length": torch.tensor([[len(text)] for text in texts])}


def collate_targets(targets):
    return {"answer": torch.tensor([t[0] for t in targets]), "draw": torch.tensor([t[1] for t in targets])}


def source(manifest: Manifest, **changes) -> StreamSource:
    options = dict(
        manifest=manifest,
        split="train",
        read=read,
        image_transform=transform,
        collate_images=collate_images,
        collate_texts=collate_texts,
        collate_targets=collate_targets,
        fields=("texts", "answers"),
    )
    return StreamSource(**{**options, **changes})
