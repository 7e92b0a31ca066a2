"""Captions of a shard of images by a generative model: decode, transform, generate, write."""

# n captions per image

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpeft_ds import adapter
from mmpeft_ds.data.batch import PackedBatch, Prompted, Sample, pack
from mmpeft_ds.data.blind import ClassNameFilter
from mmpeft_ds.data.decode import picture_reader
from mmpeft_ds.data.manifest import Manifest, sample_key
from mmpeft_ds.data.order import key_of
from mmpeft_ds.data.packing import REFUSALS, make_of_most, refusal
from mmpeft_ds.data.parsing import npy_array, one_sample
from mmpeft_ds.data.shards import image_names, members, record_of
from mmpeft_ds.data.transform import apply, hooks_of
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.zero.fingerprint import all_tensors, frozen_fingerprint
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.precompute.feature_samples import FeatureSample
from mmpeft_ds.precompute.shard_jobs import Job, ShardMaker, ShardNotes
from mmpeft_ds.recipe import Recipe, components
from mmpeft_ds.stop import StopFlag


@dataclass(frozen=True)
class DescribeOptions:
    """Options of the captions of a data set.

    Attributes:
        data: directory of the source.
        out: directory of the new shards.
        name: of the new data set; empty: as the source, so that both have the same sample ids.
        splits: empty: all.
        prompt: text that the model continues.
        captions: n, number per image; more than one needs sampling.
        generation: options of transformers' `generate`.
        seed: of sampling.
        field: of the record that gets the list of captions, n for each image in order.
        replace: records may have that field already; its contents are left out.
        remove_class_names: take the names of all classes of the data set out of every caption.
        batch: images in one forward pass.
        threads: number of threads that decode ahead of the model.
    """

    data: str
    out: Path
    name: str = ""
    splits: tuple[str, ...] = ()
    prompt: str = ""
    captions: int = 1
    generation: dict[str, Any] = field(default_factory=lambda: {"num_beams": 1, "max_new_tokens": 19})
    seed: int = 0
    field: str = "captions"
    replace: bool = False
    remove_class_names: bool = False
    batch: int = 32
    threads: int = 1


@dataclass
class _Prepared:
    """A sample of the source, its images decoded and transformed; or the kind of its fault."""

    key: str
    name: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    encoded: list[tuple[str, bytes]] = field(default_factory=list)
    arrays: dict[str, Any] = field(default_factory=dict)
    images: list[Any] = field(default_factory=list)
    bad: str = ""


class CaptionMaker(ShardMaker[_Prepared]):
    """Turns shards of images into the same shards with captions.

    Args:
        recipe: `data` and `engine` sections, and the backbone unless there is an adapter directory.
        device: where the model runs.

    Raises:
        BadInput: if the model cannot generate text, or reads stored features.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Manifest,
        options: DescribeOptions,
        device: torch.device,
        stop: StopFlag | None = None,
        adapter_dir: Path | None = None,
    ):
        super().__init__(
            recipe, source, options.out, options.name or source.name, options.batch, options.threads, stop
        )
        self.options, self.device = options, device
        self.filter = ClassNameFilter(source.labels) if options.remove_class_names else None
        if adapter_dir is None:
            self.backbone: Any = resolve.make_backbone(components(recipe).backbone, recipe.engine, source.labels)
            section = recipe.backbone["name"]
            self._check_generates(section)
            if (statistics := resolve.feature_statistics(recipe, self.backbone, source)) is not None:
                self.backbone.use_statistics(statistics)
            self.model = self.backbone.build().to(device).requires_grad_(False).eval()
        else:
            loaded = adapter.load(adapter_dir, device)
            recipe, self.backbone, self.model = loaded.recipe, loaded.backbone, loaded.model
            section = recipe.backbone["name"]
            self._check_generates(section)
        self.transform = self.backbone.image_transform(False)
        if hooks_of(self.transform).takes_features:
            raise BadInput("backbone: reads stored features; the model must see pixels here.")
        fingerprints = frozen_fingerprint(all_tensors(self.model))
        self.origin = {
            "model": dataclasses.asdict(self.backbone.options).get("model") or str(adapter_dir or ""),
            "backbone": section,
            "adapter": adapter_dir is not None,
            "weights": weights_hash(fingerprints),
            "dtype": recipe.engine.dtype,
            "pixels": self.recipe.data.pixels,
            "prompt": options.prompt,
            "captions": options.captions,
            "generation": options.generation,
            "seed": options.seed,
            "batch": options.batch,
            "field": options.field,
            "remove_class_names": options.remove_class_names,
        }

    def _check_generates(self, name: str) -> None:
        if not self.backbone.generates:
            raise BadInput(f"backbone.name: {name!r} generates no text. Use blip, mllm or vision_text_decoder.")

    def make(self, job: Job, number: int, prepared: list[_Prepared], notes: ShardNotes) -> Iterator[FeatureSample]:
        """All samples with their captions; counts go into `notes`."""
        self._mark_refused(job.split, [sample for sample in prepared if not sample.bad])
        good = [sample for sample in prepared if not sample.bad]
        generated = iter(self._captions(good, key_of(self.options.seed, "describe", job.split, job.first + number)))
        for sample in prepared:
            captions = [] if sample.bad else [next(generated) for _ in self._texts(sample)]
            kept = captions if self.filter is None else [self.filter(c) for c in captions]
            notes.bad += [(sample.key, sample.bad)] if sample.bad else []
            filtered = sum(k != c for k, c in zip(kept, captions, strict=True))
            notes.counts.update(samples=1, captions=len(kept), empty=sum(not c for c in kept), filtered=filtered)
            record = {**sample.record, self.options.field: kept}
            features = sample.arrays.pop("", None)
            yield FeatureSample(sample.name, features, sample.arrays, sample.encoded, record)

    def _mark_refused(self, split: str, samples: list[_Prepared]) -> None:
        """Mark those samples as bad without which the others can be packed. Raises BadInput if none can."""
        if not samples:
            return

        def usual() -> list[_Prepared]:
            return [sample for sample in self.usual(split) if not sample.bad]

        def packed(some: list[_Prepared]) -> PackedBatch:
            return self._packed(self._slots(some))

        try:
            _, refused = make_of_most(samples, packed, usual)
        except REFUSALS as error:
            raise BadInput(f"--prompt: {_no_image(error)}") from error
        if (
            len(refused) == len(samples)
            and (errors := [refusal(packed, sample) for sample in usual()])
            and all(errors)
        ):
            raise BadInput(f"--prompt: {_no_image(errors[0])}")
        for i in refused:
            samples[i].bad, samples[i].images = "collate", []

    def _slots(self, samples: list[_Prepared]) -> list[Sample]:
        """A slot for each image, which asks n times for a caption."""
        n = self.options.captions
        prompts = [Prompted(self.options.prompt)] * n
        return [Sample(sample.key, 1.0, [i], prompts, [None] * n) for sample in samples for i in sample.images]

    def _packed(self, slots: list[Sample]) -> PackedBatch:
        return pack(slots, self.backbone.collate_images, self.backbone.collate_texts, lambda _: {})

    def _texts(self, sample: _Prepared) -> range:
        return range(len(sample.images) * self.options.captions)

    @torch.inference_mode()
    def _captions(self, samples: list[_Prepared], seed: int) -> list[str]:
        """n captions for each image of the samples, in order."""
        slots, texts = self._slots(samples), []
        torch.manual_seed(seed % 2**63)  # depends on the place in the data set, not on the number of ranks
        for start in range(0, len(slots), self.options.batch):
            batch = self._packed(slots[start : start + self.options.batch]).to(self.device)
            try:
                if batch.changes is not None and batch.changes[:, 0].any():
                    limit = self.backbone.prompt_limit
                    raise BadInput(f"--prompt: too long for backbone.{limit}. Shorten it, or raise the limit.")
                texts += self.backbone.generate(self.model, batch, **self.options.generation)
            except (ValueError, TypeError, BadSample) as error:
                # transformers lists in several lines the options that it does not know.
                raise BadInput(f"--generate: {' '.join(str(error).split())[:300]}") from error
        if len(texts) != self.options.captions * len(slots):
            raise BadInput(
                f"--generate: gave {len(texts)} texts for {len(slots)} images. Give --captions, not "
                "num_return_sequences."
            )
        return [" ".join(text.split()) for text in texts]

    def prepare(self, job: Job, number: int, piece: bytes | BadSample) -> _Prepared:
        """One sample, its images decoded and transformed."""
        key = sample_key(job.split, job.first + number)
        sample = _Prepared(key, key)
        try:
            with one_sample():
                if isinstance(piece, BadSample):
                    raise piece
                _, parts = members(piece)
                names = image_names(parts)
                sample.encoded = [(name.rpartition(".")[2], parts[name]) for name in names]
                record = record_of(parts)
                sample.name, sample.record = str(record.pop("source_name", key)), record
                sample.arrays = _arrays(parts)
                for name in names:
                    sample.images.append(apply(self.transform, picture_reader(self.recipe.data)(parts[name]), None))
                if not names:
                    raise BadSample("image", "none")
        except BadSample as bad:
            sample.bad, sample.images = bad.kind, []
        return sample


def _no_image(error: Exception) -> str:
    return f"no image can be packed with it ({' '.join(str(error).split())[:300]})"


def weights_hash(fingerprints: dict[str, str]) -> str:
    """One hash of the fingerprints of all tensors of a model."""
    return hashlib.sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest()


def _arrays(parts: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Arrays of a sample by name; the one without a name is its features. Raises BadSample."""
    return {name.removesuffix("npy").rstrip("."): npy_array(d) for name, d in parts.items() if name.endswith("npy")}
