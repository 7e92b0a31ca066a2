"""Outputs of frozen towers for images, computed outside the forward pass at one fixed shape, and kept on disk.

A tower that always sees the same number of images gives the same bits for an image in every batch, epoch and run, so a
stored value can stand in place of a computed one. Which values a micro-batch lacks is known before its forward
pass; under ZeRO-3 all ranks then run the tower equally often, and in steps in which nothing is lacking none of them
gathers its weights.
"""

# I images of a micro-batch, C images of a pass

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from mmpeft_ds.backbones.base import BackboneBase, ImagePrefix
from mmpeft_ds.backbones.common.tower_loading import choose_attention
from mmpeft_ds.data.batch import DUMMY, FRESH, STORED, PackedBatch
from mmpeft_ds.data.frozen_store import FrozenStore, Place, StoreSpec, Value, record_bytes, room_at
from mmpeft_ds.data.transform import hooks_of
from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine.assembly.build import Built
from mmpeft_ds.engine.assembly.resolve import Resolved, attach
from mmpeft_ds.engine.export import transform_description
from mmpeft_ds.engine.zero import fingerprint as fingerprints
from mmpeft_ds.errors import BadInput
from mmpeft_ds.host_copies import on_host, to_device
from mmpeft_ds.recipe import Recipe, where
from mmpeft_ds.recipe.options import EngineOptions
from mmpeft_ds.sites.base import base_model

OWN_ARITHMETIC = 3  # one more where this package computes a frozen prefix in another order, which rounds otherwise
AT_ONCE = 8  # images of a pass, where values are stored and the recipe does not say


class FrozenImages:
    """Computes, reads and writes the values of images.

    Args:
        model: the PeftModel or base, as the engine runs it.
        at_once: C.
        in_step: whether all ranks must run the tower equally often.
        spec: of the store; without a path nothing is stored.
    """

    def __init__(
        self,
        backbone: BackboneBase,
        model: Any,
        at_once: int,
        device: torch.device,
        in_step: bool,
        spec: StoreSpec | None = None,
    ):
        self.backbone, self.model, self.device, self.in_step = backbone, model, device, in_step
        self.at_once = 1 if backbone.images_differ else at_once
        self.spec = spec or StoreSpec()
        self.store = FrozenStore(self.spec) if self.spec.path else None
        self.computed = self.taken = 0  # images
        self._nothing: Value | None = None
        if in_step and collectives.world_size() > 1:
            self._dummy()  # while all ranks are here

    def passes(self, micro: Sequence[PackedBatch], present: Sequence[Sequence[float]]) -> list[int]:
        """Number of tower passes for each micro-batch on this rank. Collective where ranks keep in step.

        Args:
            present: `modality.present` of each, summed over ranks.
        """
        own = [-(-len(_rows(batch, FRESH)) // self.at_once) for batch in micro]
        if self.in_step and any(bits[-1] for bits in present):
            return collectives.max_scalars(own, self.device)
        return own

    @torch.no_grad()
    def fill(self, batch: PackedBatch, passes: int) -> PackedBatch:
        """The batch with the values of its images in place of pixels; what was computed is stored.

        Args:
            batch: on the device, completed.
            passes: what `passes` gave for it.
        """
        if batch.image_places is None or not len(batch.image_places):
            return batch
        places = on_host(batch.image_places).tolist()
        values: list[Value | None] = [None] * len(places)
        fresh = [row for row, (state, *_) in enumerate(places) if state == FRESH]
        for number in range(passes):
            rows = range(number * self.at_once, min((number + 1) * self.at_once, len(fresh)))
            filled = [*rows, *[rows[-1]] * (self.at_once - len(rows))] if rows else []
            images = self.backbone.some_images(batch.images, filled) if rows else self._black()
            made = self.backbone.image_values(self.model, images)
            for row, value in zip(rows, made, strict=False):
                values[fresh[row]] = value
        self._write(*([of[row] for row in fresh] for of in (places, values, batch.spellings)))
        self._read(places, values)
        for row, (state, *_) in enumerate(places):
            if state == DUMMY:
                values[row] = self._dummy()
        self.computed += len(fresh)
        self.taken += sum(state == STORED for state, *_ in places)
        return dataclasses.replace(batch, images=self.backbone.collate_values(values), image_places=None)

    def _write(self, places: list[list[int]], values: list[Value], spellings: list[str]) -> None:
        if self.store is None:
            return
        samples: dict[Place, list[int]] = {}
        for i, (_, *place, _) in enumerate(places):
            samples.setdefault(Place(*place), []).append(i)
        was_full = self.store.full
        for place, own in samples.items():
            self.store.write(place, [values[i] for i in own], [spellings[i] for i in own])
        if self.store.full and not was_full:
            print(
                f"note: rank {collectives.rank()} stores no more values of frozen towers ({self.store.full}); the run "
                "continues and computes them",
                flush=True,
            )

    def _read(self, places: list[list[int]], values: list[Value | None]) -> None:
        records: dict[Place, list[Value]] = {}
        for row, (state, *place, number) in enumerate(places):
            if state != STORED:
                continue
            place = Place(*place)
            if place not in records:
                record = self.store.read(place)
                if record is None:  # a loader process has just read it whole
                    raise BadInput(
                        f"{self.spec.path}: a record was damaged or removed while the run reads it. Start the same "
                        "command again; it is computed again."
                    )
                records[place] = record
            values[row] = {name: to_device(x, self.device) for name, x in records[place][number].items()}

    @torch.no_grad()
    def _dummy(self) -> Value:
        """The value of a black image."""
        if self._nothing is None:
            self._nothing = self.backbone.image_values(self.model, self._black())[0]
        return self._nothing

    def _black(self) -> dict[str, torch.Tensor]:
        """Images for a pass that only other ranks need."""
        transform = self.backbone.image_transform(False)
        black = transform(self.backbone.dummy("image"), torch.Generator().manual_seed(0))
        images = self.backbone.collate_images([black] * self.at_once)
        return {name: to_device(tensor, self.device) for name, tensor in images.items()}


def shapes(backbone: BackboneBase, model: Any) -> Value:
    """The value of one image on the meta device. Allocates no weights."""
    transform = backbone.image_transform(False)
    black = transform(backbone.dummy("image"), torch.Generator().manual_seed(0))
    images = {name: tensor.to("meta") for name, tensor in backbone.collate_images([black]).items()}
    with torch.device("meta"):
        (value,) = backbone.image_values(model, images)
    return value


def check(resolved: Resolved) -> None:
    """Refuse before anything is loaded what `of_built` would refuse. Raises BadInput."""
    if wanted(resolved.recipe.engine):
        with torch.device("meta"):
            model = attach(resolved, resolved.backbone.build(on_meta=True))
        checked_prefix(resolved.recipe, resolved.backbone, base_model(model))


def forecast(resolved: Resolved, model: Any) -> dict[str, Any] | None:
    """Size of what will be stored: `images`, `bytes_per_image`, `bytes`, and `free` where `dir` is; None without a
    cache. Of images that differ in size, and of data that is only assumed, the bytes are None.

    Args:
        model: with the method attached, on the meta device.

    Raises:
        BadInput: nothing can be kept.
    """
    recipe, backbone = resolved.recipe, resolved.backbone
    if not wanted(recipe.engine):
        return None
    checked_prefix(recipe, backbone, base_model(model))
    if not recipe.engine.cache_frozen.on:
        return None
    sources = {(s.manifest.dir, s.options.split): s for s in (*resolved.train, *resolved.validation)}
    counts = []
    for source in sources.values():
        fields = source.manifest.fields.get(source.options.split, {})
        counts.append(round(source.samples * fields["images"]["mean"]) if "images" in fields else None)
    images = None if None in counts else sum(counts)
    each = None if backbone.images_differ else record_bytes([shapes(backbone, base_model(model).eval())])
    directory = directory_of(recipe)
    return {
        "dir": str(directory),
        "images": images,
        "bytes_per_image": each,
        "bytes": None if None in (images, each) else images * each,
        "free": room_at(directory),
        "limit": round(recipe.engine.cache_frozen.limit * 2**30),
    }


def words(forecast: dict[str, Any]) -> str:
    """A forecast in one line."""
    free = f"{forecast['free'] / 2**30:.2f} GiB are free there"
    if forecast["bytes"] is None:
        return f"values of frozen towers go to {forecast['dir']}; their size is not known before a run; {free}"
    size = forecast["bytes"]
    line = (
        f"values of frozen towers: {size / 2**30:.2f} GiB in {forecast['dir']} for {forecast['images']:,} images of "
        f"{forecast['bytes_per_image'] / 1024:,.1f} KiB, less what is there already; {free}"
    )
    most = min(forecast["free"], forecast["limit"] or forecast["free"])
    if size > most:
        return f"{line}, so {1 - most / size:.0%} of them will be computed in every epoch. Choose another dir."
    return line


def of_built(resolved: Resolved, built: Built, ranks: Ranks) -> FrozenImages | None:
    """For a built model; None where the recipe asks for nothing. Collective.

    Raises:
        BadInput: nothing can be kept, or the directory cannot be used.
    """
    recipe, backbone = resolved.recipe, resolved.backbone
    if not wanted(recipe.engine):
        return None
    prefix = checked_prefix(recipe, backbone, base_model(built.model))
    spec = StoreSpec()
    if recipe.engine.cache_frozen.on:
        description = describe(recipe, backbone, prefix, built.fingerprint, ranks.device)
        spec = on_rank0(lambda: prepared(recipe, description))
        if not Path(spec.path).exists():  # on this machine: rank 0 is on another, with a file system of its own
            with contextlib.suppress(BadInput):  # this rank then says that it stores nothing
                prepared(recipe, description)
    in_step = built.stage == 3
    return FrozenImages(backbone, built.model, images_at_once(recipe.engine), ranks.device, in_step, spec)


def of_base(recipe: Recipe, backbone: BackboneBase, base: Any) -> FrozenImages:
    """For a base without a method on the CPU of one rank, where the recipe asks for a cache. Raises BadInput."""
    prefix, device = checked_prefix(recipe, backbone, base), torch.device("cpu")
    description = describe(recipe, backbone, prefix, fingerprints.of_frozen(base), device)
    spec = prepared(recipe, description)
    return FrozenImages(backbone, base, images_at_once(recipe.engine), device, False, spec)


def wanted(engine: EngineOptions) -> bool:
    """Whether values of images are computed apart from the forward pass."""
    return engine.cache_frozen.on or engine.tower_batch > 0


def images_at_once(engine: EngineOptions) -> int:
    """C, or 0 for all of a micro-batch."""
    return engine.tower_batch or (AT_ONCE if engine.cache_frozen.on else 0)


def checked_prefix(recipe: Recipe, backbone: BackboneBase, base: Any) -> ImagePrefix:
    """The frozen prefix of images. Raises BadInput if nothing of it can be cached."""
    key = "cache_frozen" if recipe.engine.cache_frozen.on else "tower_batch"
    if hooks_of(backbone.image_transform(False)).takes_features:
        raise BadInput(
            f"{where(recipe, f'engine.{key}')}: this backbone reads stored features, so no tower runs. Leave it out."
        )
    if backbone.image_transform(True) != backbone.image_transform(False):
        raise BadInput(
            f"{where(recipe, f'engine.{key}')}: {recipe.backbone['name']} augments pixels, so that values differ from "
            "epoch to epoch. Store views: launchers/features.py --views, or leave it out."
        )
    prefix = backbone.image_prefix(base)
    if prefix is None:
        raise BadInput(
            f"{where(recipe, f'engine.{key}')}: {recipe.method['name']} on {recipe.backbone['name']} leaves no frozen "
            "tower that images alone pass. Leave it out, or let the method train after the vision tower alone."
        )
    return prefix


def prepared(recipe: Recipe, description: dict[str, Any]) -> StoreSpec:
    """The directory of a key, made ready. Raises BadInput."""
    options = recipe.engine.cache_frozen
    key = key_of(description)
    spec = StoreSpec(str(directory_of(recipe) / key), key, round(options.limit * 2**30))
    FrozenStore(spec).prepare(description)
    return spec


def directory_of(recipe: Recipe) -> Path:
    """The directory of the caches of all keys."""
    return Path(recipe.engine.cache_frozen.dir).expanduser().absolute()


def key_of(description: dict[str, Any]) -> str:
    """Hash of a description, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode()).hexdigest()[:32]


def describe(
    recipe: Recipe,
    backbone: BackboneBase,
    prefix: ImagePrefix,
    fingerprint: dict[str, str],
    device: torch.device,
) -> dict[str, Any]:
    """All that the value of an image depends on besides its bytes.

    Args:
        fingerprint: of the frozen tensors of the base, of which those of the prefix are taken.
    """
    engine, data = recipe.engine, recipe.data
    inside = tuple(f"{path}." for path in prefix.modules)
    weights = {n: v for n, v in sorted(fingerprint.items()) if f"{n}.".startswith(inside)}
    return {
        "weights": weights,
        "choice": prefix.choice,
        "transform": transform_description(backbone),
        "decode": [data.decode, data.pixels, data.max_pixels],
        "dtype": engine.dtype,
        "quantise": recipe.backbone.get("quantise", "none"),
        "attention": choose_attention(backbone.attention, backbone.dtype),
        "matmul": engine.matmul if device.type == "cuda" else "",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "images_at_once": images_at_once(engine),
        "versions": [torch.__version__, transformers.__version__, OWN_ARITHMETIC],
    }


def _rows(batch: PackedBatch, state: int) -> list[int]:
    if batch.image_places is None:
        return []
    return (on_host(batch.image_places)[:, 0] == state).nonzero()[:, 0].tolist()
