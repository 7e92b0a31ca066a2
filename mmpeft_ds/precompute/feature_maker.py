"""Features of a shard of images and texts by frozen towers: decode, transform, embed, write."""

# I images, T texts, C classes, V augmented passes, Dv and Dt widths of the features

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mmpeft_ds.data.batch import PackedBatch, Sample, changes_of, pack
from mmpeft_ds.data.decode import picture_reader
from mmpeft_ds.data.feature_shards import class_name_in_words, negated
from mmpeft_ds.data.identity import PICTURE, content_id
from mmpeft_ds.data.manifest import Manifest, sample_key
from mmpeft_ds.data.order import key_of
from mmpeft_ds.data.packing import make_of_most
from mmpeft_ds.data.parsing import one_sample
from mmpeft_ds.data.shards import image_names, members, record_of
from mmpeft_ds.data.transform import apply, hooks_of
from mmpeft_ds.data.views import RandomView
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.precompute.feature_samples import FeatureSample, thumbnail
from mmpeft_ds.precompute.shard_jobs import Job, ShardMaker, ShardNotes
from mmpeft_ds.recipe import Recipe, components
from mmpeft_ds.stop import StopFlag

TEMPLATES = ("a photo of a {}.",)
PLACE = "{}"


@dataclass(frozen=True)
class FeatureOptions:
    """Options of the features of a data set.

    Attributes:
        data: directory of the source.
        out: directory of the feature shards.
        name: of the new data set; empty: as the source, so that both have the same sample ids.
        splits: empty: all.
        views: V augmented passes of each image.
        view_scale: share of the area that an augmented pass covers.
        seed: of the augmented passes.
        dtype: that features are stored in.
        templates, negative_templates: texts of the classes with `{}` in place of the name; negative ones by
            default (None) are the others, negated.
        thumbnails: longer side of a small picture kept with each sample, 0 = none.
        batch: images in one forward pass.
        threads: number of threads that decode and transform ahead of the towers.
        overwrite: delete features that were made in `out` before.
    """

    data: str
    out: Path
    name: str = ""
    splits: tuple[str, ...] = ()
    views: int = 0
    view_scale: tuple[float, float] = (0.08, 1.0)
    seed: int = 0
    dtype: Literal["float16", "float32"] = "float16"
    templates: tuple[str, ...] = TEMPLATES
    negative_templates: tuple[str, ...] | None = None
    thumbnails: int = 0
    batch: int = 64
    threads: int = 1
    overwrite: bool = False


@dataclass
class _Prepared:
    """A decoded and transformed sample; or the kind of its fault."""

    key: str
    record: dict[str, Any] = field(default_factory=dict)
    images: list[Any] = field(default_factory=list)
    pictures: list[tuple[str, bytes]] = field(default_factory=list)
    views: int = 1
    cut: int = 0  # captions whose end the text tower does not read
    bad: str = ""


class Maker(ShardMaker[_Prepared]):
    """Turns shards of a source into feature shards.

    Args:
        recipe: its backbone section names the towers, `engine.dtype` their precision.
        source: images and texts.
        device: where the towers run.

    Raises:
        BadInput: if the backbone gives no features, or the source holds features already.
    """

    def __init__(
        self, recipe: Recipe, source: Manifest, options: FeatureOptions, device: torch.device, stop: StopFlag | None
    ):
        recipe = encoder_recipe(recipe)
        if source.towers:
            raise BadInput(f"{source.dir}: holds features already; give --data the images they were made from.")
        together = max(1, options.batch // (1 + options.views))
        super().__init__(recipe, source, options.out, options.name or source.name, together, options.threads, stop)
        self.options, self.device = options, device
        self.backbone: Any = resolve.make_backbone(components(recipe).backbone, recipe.engine, source.labels)
        if not self.backbone.embeds:
            raise BadInput(
                f"{recipe.origin('backbone.name')}: {recipe.backbone.get('name')!r} gives no features. "
                "Use dual_encoder or clip."
            )
        self.transform = self.backbone.image_transform(False)
        if hooks_of(self.transform).takes_features:
            raise BadInput("backbone.images: stored; the towers must read pixels here. Set images: live.")
        self.view = RandomView(options.view_scale, hooks_of(self.transform).min_size)
        self.model: Any = None

    def towers(self) -> dict[str, Any]:
        """All that the features depend on, as `Manifest.towers` has it, but for what only the built model knows."""
        o = self.options
        image_width, text_width = self.backbone.feature_widths
        texts = bool(text_width and self.source.labels)
        negative = o.negative_templates
        return {
            "key": self.backbone.towers_key(),
            "compute": self.recipe.engine.dtype,
            "backbone": {"name": self.recipe.backbone["name"], **dataclasses.asdict(self.backbone.options)},
            "dtype": o.dtype,
            "pixels": self.recipe.data.pixels,
            "views": o.views,
            "view_scale": list(o.view_scale),
            "seed": o.seed,
            "image_width": int(image_width),
            "text_width": int(text_width or 0),
            "templates": list(o.templates) if texts else [],
            "negative_templates": list(map(negated, o.templates) if negative is None else negative) if texts else [],
            "thumbnails": o.thumbnails,
        }

    def build(self) -> None:
        """Load the towers."""
        self.model = self.backbone.build().to(self.device).requires_grad_(False).eval()

    @torch.inference_mode()
    def class_texts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(C, T, D) text features of the classes, for the templates and the negative ones."""
        towers = self.towers()
        names = [class_name_in_words(label) for label in self.source.labels]
        texts_of_classes = []
        for templates in (towers["templates"], towers["negative_templates"]):
            # Not str.format: a class name may hold braces.
            texts = [template.replace(PLACE, name) for name in names for template in templates]
            rows = [
                self.backbone.embed_texts(self.model, texts[i : i + self.options.batch]).float().cpu()
                for i in range(0, len(texts), self.options.batch)
            ]
            width = towers["text_width"]
            texts_of_classes.append(
                (torch.cat(rows) if rows else torch.zeros(0, width)).view(len(names), len(templates), width)
            )
        return texts_of_classes[0], texts_of_classes[1]

    def make(self, job: Job, number: int, prepared: list[_Prepared], notes: ShardNotes) -> Iterator[FeatureSample]:
        """The good samples with their features; bad ones go into `notes`."""
        good = self._good(prepared)
        batch, refused = None, []
        if good:
            batch, refused = make_of_most(good, self._packed, lambda: self._good(self.usual(job.split)))
        for i in refused:
            good[i].bad = "collate"
        notes.bad += [(p.key, p.bad) for p in prepared if p.bad]
        notes.counts.update(cut_captions=sum(p.cut for p in prepared))
        if batch is not None:
            yield from self._embedded(self._good(good), batch)

    @staticmethod
    def _good(prepared: Sequence[_Prepared]) -> list[_Prepared]:
        return [p for p in prepared if not p.bad]

    def prepare(self, job: Job, number: int, piece: bytes | BadSample) -> _Prepared:
        """One sample, decoded and transformed: the evaluation view of each image and its augmented passes."""
        key = sample_key(job.split, job.first + number)
        try:
            with one_sample():
                if isinstance(piece, BadSample):
                    raise piece
                key, parts = members(piece)
                record = _captioned(parts)
                if "npy" in parts:
                    raise BadSample("features", "the sample holds an array, not pixels")
                made = _Prepared(key, record, views=1 + self.options.views)
                names = image_names(parts)
                if names:  # features of equal pictures may differ in their last bit
                    record.setdefault(PICTURE, content_id(parts[name] for name in names))
                for place, name in enumerate(names):
                    image = picture_reader(self.recipe.data)(parts[name])
                    made.images += self._views(image, f"{self.source.name}/{key}", place)
                    if self.options.thumbnails:
                        made.pictures.append(("jpg", thumbnail(image, self.options.thumbnails)))
                if not made.images and not record["captions"]:
                    raise BadSample("field", "neither an image nor captions")
                if record["captions"] and self.backbone.feature_widths[1]:
                    collated = self.backbone.collate_texts(record["captions"])
                    made.cut = int((changes_of(collated, len(record["captions"]))[:, 0] > 0).sum())
        except BadSample as bad:
            return _Prepared(key, bad=bad.kind)
        return made

    def _views(self, image: torch.Tensor, sample_id: str, place: int) -> list[Any]:
        views = [apply(self.transform, image, None)]
        for number in range(self.options.views):
            # Seeded by the sample alone, so that any rank, order and rerun draws the same.
            generator = torch.Generator().manual_seed(
                key_of(self.options.seed, "view", sample_id, place, number) % 2**63
            )
            views.append(apply(self.transform, self.view(image, generator), None))
        return views

    @torch.inference_mode()
    def _embedded(self, prepared: Sequence[_Prepared], batch: PackedBatch) -> Iterator[FeatureSample]:
        """The same samples with their features; `batch` holds them packed."""
        image_ID, text_TD = self.backbone.embed(self.model, batch.to(self.device))
        images, texts = self._stored(image_ID), self._stored(text_TD)
        at_image = at_text = 0
        for sample in prepared:
            features, arrays, captions = None, {}, sample.record["captions"]
            if sample.images:
                own = images[at_image : at_image + len(sample.images)]
                several = len(own) > sample.views
                features = own.reshape(-1, sample.views, own.shape[-1]) if several else own
                at_image += len(sample.images)
            if captions and texts is not None:
                arrays["text"] = texts[at_text : at_text + len(captions)]
                at_text += len(captions)
            record = {**sample.record, "source_id": f"{self.source.name}/{sample.key}"}
            if not captions:
                del record["captions"]
            yield FeatureSample(record.pop("source_name", sample.key), features, arrays, sample.pictures, record)

    def _packed(self, prepared: Sequence[_Prepared]) -> PackedBatch:
        with_texts = bool(self.backbone.feature_widths[1])
        samples = [
            Sample(p.key, 1.0, p.images, texts, [None] * len(texts), p.record)
            for p in prepared
            for texts in [list(p.record["captions"]) if with_texts else []]
        ]
        return pack(samples, self.backbone.collate_images, self.backbone.collate_texts, lambda _: {})

    def _stored(self, rows: torch.Tensor | None) -> np.ndarray | None:
        """`rows` in the dtype that is stored. Raises BadInput if it cannot hold them."""
        if rows is None:
            return None
        computed = rows.float().cpu()
        stored = computed.to(getattr(torch, self.options.dtype))
        if not bool(torch.isfinite(stored).all()):
            raise BadInput(
                f"the towers gave features that {self.options.dtype} cannot hold (largest {computed.abs().max():g}). "
                "Use --dtype float32, or --compute float32 if the towers themselves ran in half precision."
            )
        return stored.numpy()


def encoder_recipe(recipe: Recipe) -> Recipe:
    """A recipe whose backbone section is the encoder, which recipes of heads name in `backbone.encoder`."""
    section = recipe.backbone.get("encoder")
    if not section:
        return recipe
    changed = copy.deepcopy(recipe)
    changed.backbone = dict(section)
    changed.origin = recipe.origin
    return changed


def _captioned(parts: dict[str, bytes]) -> dict[str, Any]:
    """The json of a sample, with `captions` as a list of texts. Raises BadSample."""
    record = record_of(parts)
    captions = record.setdefault("captions", [])
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise BadSample("type", "captions is no list of texts")
    return record
