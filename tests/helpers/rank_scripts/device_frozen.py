"""Values of frozen towers, computed and then read from the store, on the stand-in for a GPU; for
`launch.run_forked(..., ranks=0)`.

device_frozen OUT.json COLUMN...     columns of `matrix.COLUMNS`; column -> pass -> reports
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmpeft_ds.data.batch import PackedBatch, Prompted, Sample, pack
from mmpeft_ds.data.frozen_store import FrozenStore, Place, StoredImage, StoreSpec
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.frozen_images import FrozenImages
from tests.helpers.device import matrix, reports, standin

SIZES = ((9, 11), (20, 12)), ((16, 16),)  # of the images of each sample


def packed(backbone: Any, samples: list[Sample]) -> PackedBatch:
    collate = backbone.collate_apart, backbone.collate_texts, lambda t: {"label": torch.tensor(t)}
    return pack(samples, *collate)


def samples_of(backbone: Any) -> list[Sample]:
    """Two, with places in a shard."""
    transform, made = backbone.image_transform(False), []
    for i, sizes in enumerate(SIZES):
        images = [transform(torch.full((3, *size), 40 * i, dtype=torch.uint8), torch.Generator()) for size in sizes]
        text = Prompted("what color is it", "red") if backbone.generates else "what color is it"
        made.append(Sample(f"toy/{i}", 1.0, images, [text], [0], place=Place(1, len(SIZES), i)))
    return made


@torch.no_grad()
def passes(made: matrix.Column, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Reports of a micro-batch whose values are computed and stored, and of one that reads them."""
    backbone, model = made.backbone, made.model.to("cuda")
    spec = StoreSpec(str(folder / "key"), "key")
    FrozenStore(spec).prepare({})
    frozen = FrozenImages(backbone, model, 2, torch.device("cuda", 0), False, spec)
    samples, found = samples_of(backbone), {}
    for name in ("computed", "read"):
        batch = packed(backbone, samples)
        number = frozen.passes([batch], [[1, 1, 1]])
        batch = batch.to("cuda")
        with reports.watching() as watch:
            batch = frozen.fill(batch, *number)
            forward(model, backbone, batch)
        found[name] = [asdict(report) for report in watch.reports]
        stored = [frozen.store.find(s.place) for s in samples]
        stubs = [[StoredImage(spelling) for spelling in spellings] for spellings in stored]
        samples = [dataclasses.replace(s, images=of_sample) for s, of_sample in zip(samples, stubs, strict=True)]
    assert (frozen.computed, frozen.taken) == (3, 3)
    return found


def main() -> None:
    out, *columns = sys.argv[1:]
    standin.start()
    torch.Tensor.pin_memory = lambda self, *_: self  # of host memory, which the stand-in has no other of
    result = {}
    for column in columns:
        with tempfile.TemporaryDirectory() as folder, matrix.column(column, Path(folder)) as made:
            result[column] = passes(made, Path(folder))
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
