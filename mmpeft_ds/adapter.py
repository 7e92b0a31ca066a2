"""Adapter directories: the result of a run, which stock peft loads onto a base model and `load` with its base.

adapter_config.json, adapter_model.safetensors    as of peft; float32 masters of everything trained
recipe.yaml                 resolved recipe
backbone.json               name and options of the backbone, and the base model's configuration
labels.json                 answers in class order, or null
image_transform.json        transform of decoded images
feature_statistics.json     mean and deviation of the condition, or null
bank.safetensors            of feature models: class texts and support samples that the head reads
towers.json                 of feature models: the towers that made the stored features
classifier.safetensors      of heads that have such a form: a classifier that needs neither bank nor graph
base_fingerprint.json       of every frozen tensor, under its name in the bare base model
metrics.json                metrics of the run
checksums.json              sha256 of every file but README.md and metrics.json
README.md                   model card
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mmpeft_ds import recipe as recipes
from mmpeft_ds.adapter_files import REMEDY, read_backbone, read_json, read_labels, read_statistics, whole
from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.backbones.common import quantised
from mmpeft_ds.data import decode, video_files
from mmpeft_ds.data.batch import Sample, as_frames, check_images, pack
from mmpeft_ds.data.packing import REFUSALS
from mmpeft_ds.data.transform import apply, hooks_of
from mmpeft_ds.data.video import Video, stacked, times_of
from mmpeft_ds.engine.assembly.forward import answer
from mmpeft_ds.engine.export import transform_description
from mmpeft_ds.engine.zero import fingerprint
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.redaction import found
from mmpeft_ds.tasks.base import TaskBase

logger = logging.getLogger(__name__)
# Of a quantised base; see `load`.
Weights = Literal["as trained", "dequantised", "original"]


@dataclass
class Loaded:
    """Base and adapter, ready to answer.

    Attributes:
        model: PeftModel in eval mode.
        backbone: transforms, tokenisation and forward arguments.
        tasks: those of the recipe's train sources.
        labels: answers in class order, or None.
        recipe: with which it was trained.
        frames: read of each video, spread evenly over its length.
    """

    model: PeftModel
    backbone: BackboneBase
    tasks: list[TaskBase]
    labels: list[str] | None
    recipe: recipes.Recipe
    device: torch.device
    frames: int = 8

    @property
    def task(self) -> TaskBase:
        """The first of `tasks`."""
        return self.tasks[0]

    def predict(
        self,
        images: Sequence[Any],
        texts: Sequence[str | Sequence[str]] | None = None,
        batch: int = 32,
        task: int = 0,
    ) -> list[dict[str, Any]]:
        """Answer questions about images.

        Args:
            images: N entries: a path of an image or a video, encoded bytes of an image, a uint8 (3, H, W) tensor, a
                `data.video.Video`, a list of these, or None for no image;
                for a backbone that takes stored features, .npy files or tensors of one image each.
            texts: N entries: a text, or several texts about the same entry, for which the vision tower runs once;
                None where the task needs no text, such as captioning.
            batch: entries at a time.
            task: which of `tasks` is asked.

        Returns:
            one row per text in order: `prediction`, `text`, `sample_id` (path or number of the entry), further values
            of the task, `cut_tokens` where a text was too long and so many of its tokens were not read, and
            `control_tokens` where so many in a text were read as plain characters.

        Raises:
            BadInput: naming the image that cannot be read; no such task; texts that a task needs are missing or empty.
        """
        if texts is None:
            texts = [self.texts_for([], task)] * len(images)
        if given := [text for asked in texts for text in ([asked] if isinstance(asked, str) else asked)]:
            self.texts_for(given, task)  # none of them empty
        if len(images) != len(texts):
            raise BadInput(f"predict: {len(images)} images but {len(texts)} texts; give one entry of texts an image")
        rows: list[dict[str, Any]] = []
        for start in range(0, len(images), batch):
            chosen = range(start, min(start + batch, len(images)))
            samples = [self.sample(self._name(images[i], i), images[i], texts[i], task) for i in chosen]
            rows += self.answer(samples, task)
        return rows

    def texts_for(self, given: Sequence[str], task: int = 0) -> list[str]:
        """`texts_for` the task of that number."""
        return texts_for(self.asked(task), given)

    def asked(self, task: int) -> TaskBase:
        """The task of that number. Raises BadInput."""
        if not 0 <= task < len(self.tasks):
            raise BadInput(f"predict: no task {task}; this adapter was trained on {len(self.tasks)}, counted from 0")
        return self.tasks[task]

    @torch.no_grad()
    def answer(self, samples: Sequence[Sample], task: int = 0) -> list[dict[str, Any]]:
        """The rows of `predict` for samples that `sample` has made, in one forward pass."""
        packed = self.pack(samples, task)
        rows = self.tasks[task].predict(answer(self.model, self.backbone, self.tasks[task], packed), packed)
        changes = packed.changes.tolist()
        if len(rows) == len(changes):
            for row, (cut, _, control) in zip(rows, changes, strict=True):
                row |= {k: n for k, n in (("cut_tokens", cut), ("control_tokens", control)) if n}
        return rows

    def batch(self, images: Sequence[Any], texts: Sequence[str | Sequence[str]], first: int = 0, task: int = 0) -> Any:
        """The packed batch that `predict` sends through the model, on its device."""
        entries = enumerate(zip(images, texts, strict=True), start=first)
        return self.pack([self.sample(self._name(e, n), e, asked, task) for n, (e, asked) in entries], task)

    def sample(self, name: str, entry: Any, asked: str | Sequence[str], task: int = 0) -> Sample:
        """One entry of `predict`, read and transformed. Raises BadInput naming the image that cannot be used."""
        asks, videos = self.asked(task), self.backbone.video_transform()
        entries = [] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry]
        asked = [asked] if isinstance(asked, str) else list(asked)
        sample, times = Sample(name, 1.0), []
        sample.record, sample.targets = asks.ask(asked)
        for given in entries:
            medium = self._read(given)
            if isinstance(medium, Video) and videos is not None:
                sample.videos.append(self._transformed(videos, medium, given, name))
                sample.times.append(medium.times.of_frames)
                continue
            if isinstance(medium, Video) and self.backbone.no_videos:
                raise BadInput(f"{self._name(given, name)}: is a video, but {self.backbone.no_videos}.")
            times += [medium.times] if isinstance(medium, Video) else []
            for image in medium.frames if isinstance(medium, Video) else [medium]:
                sample.images.append(self._transformed(self.backbone.image_transform(False), image, given, name))
        try:
            check_images(len(sample.images), self.backbone.most_images)
            sample.texts = as_frames([asks.prompted(text) for text in asked], times)
        except BadSample as bad:
            raise BadInput(f"{name}: {bad}") from bad
        return sample

    def _read(self, given: Any) -> Tensor | Video:
        """An image or a video, decoded. Raises BadInput."""
        read = decode.picture_reader(self.recipe.data)
        if isinstance(given, str | Path) and video_files.is_video(Path(given)):
            if problem := video_files.problem(Path(given)):
                raise BadInput(f"{given}: {problem}.")
            frames = video_files.sample(Path(given), self.frames, video_files.QUALITY)
            (times,) = times_of({"videos": [frames.record()]}, len(frames.pictures))
            return stacked([read(data) for _, data in frames.pictures], times)
        return given if isinstance(given, Video) else _pixels(given, read)

    def _transformed(self, transform: Callable[..., Any], medium: Tensor | Video, given: Any, name: str) -> Any:
        try:
            return apply(transform, medium)
        except BadSample as bad:
            pixels = isinstance(medium, Tensor) and medium.dtype == torch.uint8
            stored = pixels and hooks_of(transform).takes_features
            hint = " This model reads stored features, .npy files." if stored else ""
            raise BadInput(f"{self._name(given, name)}: cannot be used ({bad}).{hint}") from bad

    def pack(self, samples: Sequence[Sample], task: int) -> Any:
        """The packed batch of samples, on the device. Raises BadInput if they do not go together."""
        b = self.backbone
        try:
            packed = pack(samples, b.collate_images, b.collate_texts, self.tasks[task].collate, b.collate_videos)
        except REFUSALS as error:
            names = samples[0].sample_id + (f" and {len(samples) - 1} more" if len(samples) > 1 else "")
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"{names}: cannot be packed into a batch ({reason})") from error
        return packed.to(self.device)

    @staticmethod
    def _name(entry: Any, otherwise: Any) -> str:
        return str(entry) if isinstance(entry, (str, Path)) else str(otherwise)


def load(
    directory: str | Path,
    device: torch.device | str = "cpu",
    overrides: list[str] | None = None,
    pictures: bool = False,
    weights: Weights = "as trained",
) -> Loaded:
    """Rebuild base and adapter from an adapter directory and the base weights that it names.

    Args:
        directory: the `adapter` folder of a run.
        device: where the model is put, such as `cpu` or `cuda:0`.
        overrides: changes of its recipe (`a.b=value`), for a base that is built in another form; images may then be
            transformed otherwise.
        pictures: read picture files even where the adapter was trained on stored features: the frozen towers that
            made these are built as well.
        weights: of a quantised base: `as trained`; `dequantised`, plain layers with the weights that those multiply
            by; or `original`, as the checkpoint has them, of which a warning is logged. For another base the same.

    Raises:
        BadInput: if the directory is not whole, its files do not fit together, or the base model is not the one this
            was trained on.
    """
    from mmpeft_ds.engine.assembly.resolve import float32_heads
    from mmpeft_ds.engine.assembly.saved_adapter import attach_saved

    directory = whole(directory)
    overrides = [*(overrides or []), *(reading_pictures(directory) if pictures else [])]
    form = read_backbone(directory)["options"].get("quantise", "none")
    if weights == "original" and form != "none":
        overrides.append("backbone.quantise=none")
    recipe = recipe_of(directory, overrides)
    now_form = recipe.backbone.get("quantise", "none")
    if now_form not in ("none", form):
        raise BadInput(
            f"backbone.quantise: {now_form}, but {directory} was trained over weights in the form {form}: it would be "
            "another base. Leave it out."
        )
    sections, labels = recipes.components(recipe), read_labels(directory)
    backbone = _backbone(directory, recipe, labels)
    if not overrides:
        _check_transform(directory, backbone)
    tasks = _tasks(recipe, labels)
    base = backbone.build()
    backbone.read_classes(base)
    check_classes(directory, base.config)
    float32_heads(base)
    fingerprints = fingerprint.frozen_fingerprint(_as_trained(base, form if now_form == "none" else "none", backbone))
    saved = read_json(directory / "base_fingerprint.json", dict)
    fingerprint.compare(saved, fingerprints, str(directory), missing_ok=True, otherwise="")
    if now_form != form:
        logger.warning("%s: trained over %s weights, and loaded over the original ones.", directory, form)
    if weights == "dequantised":
        base = quantised.dequantise(base)
    model = attach_saved(directory, base, sections.method)
    unknown = sorted({name for name, _ in fingerprint.frozen_tensors(model)} - saved.keys())
    # A base in another form may have a tower that training did without.
    if unknown and not overrides and weights == "as trained":
        says = f"says nothing of {len(unknown)} frozen tensors, first {unknown[0]}"
        raise BadInput(f"{directory / 'base_fingerprint.json'}: {says}. {REMEDY}")
    model.active_peft_config.inference_mode = True
    model = model.requires_grad_(False).to(device).eval()
    return Loaded(model, backbone, tasks, labels, recipe, torch.device(device))


def _check_transform(directory: Path, backbone: BackboneBase) -> None:
    """Refuse a base model whose images would be transformed differently from training. Raises BadInput."""
    trained_with, now = read_json(directory / "image_transform.json", dict), transform_description(backbone)
    if now != trained_with:
        keys = [key for key in sorted(trained_with | now) if trained_with.get(key) != now.get(key)]
        changes = ", ".join(
            f"{' '.join(key.split())} was {trained_with.get(key)!r} and is {now.get(key)!r}" for key in keys
        )
        raise BadInput(
            f"{directory}: images were transformed otherwise in training: {changes}. Restore the image processor's "
            "file of the base model, or the library versions of that run."
        )


def _as_trained(base: PreTrainedModel, form: str, backbone: BackboneBase) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a bare base; the weights of its linear layers in the form of training, if that is not `none`."""
    if form == "none":
        yield from fingerprint.all_tensors(base)
        return
    plain = {f"{path}.weight" for path, _ in quantised.linear_layers(base)}
    yield from ((name, tensor) for name, tensor in fingerprint.all_tensors(base) if name not in plain)
    yield from quantised.as_quantised(base, form, backbone.dtype)


def tasks_of(directory: str | Path) -> list[TaskBase]:
    """The tasks of an adapter directory, without its model. Raises BadInput."""
    directory = whole(directory)
    return _tasks(recipe_of(directory), read_labels(directory))


def recipe_of(directory: Path, overrides: list[str] | None = None) -> recipes.Recipe:
    """The recipe of an adapter directory, with the place of the base model on this machine. Raises BadInput."""
    recipe = recipes.written(directory / "recipe.yaml", overrides)
    recipe.backbone = found(recipe.backbone, directory)
    return recipe


def _backbone(directory: Path, recipe: recipes.Recipe, labels: list[str] | None) -> BackboneBase:
    """The backbone of an adapter directory, with what it reads there, not built yet. Raises BadInput."""
    from mmpeft_ds.engine.assembly.resolve import make_backbone, make_method
    from mmpeft_ds.engine.assembly.saved_adapter import read_bank

    sections = recipes.components(recipe)
    method, config = make_method(sections.method)
    observed = method.observes_attention(config)
    backbone = make_backbone(sections.backbone, recipe.engine, labels, _towers(directory), observed)
    if backbone.reads_bank:
        backbone.use_bank(read_bank(directory / "bank.safetensors"))
    statistics = read_statistics(directory)  # also where they are not used: what does not belong there is damage
    if backbone.wants_statistics:
        if statistics is None:
            raise BadInput(f"{directory / 'feature_statistics.json'}: holds none, and this model needs them. {REMEDY}")
        backbone.use_statistics(statistics)
    return backbone


def check_classes(directory: Path, config: PretrainedConfig) -> None:
    """Refuse a list of answers that is not as long as in training, where no trained tensor shows it."""
    saved = read_backbone(directory)["config"].get("num_classes")
    now = vars(config).get("num_classes")
    if saved != now:
        raise BadInput(f"{directory}: labels.json names {now} classes, and the head was trained for {saved}. {REMEDY}")


def texts_for(task: TaskBase, given: Sequence[str]) -> list[str]:
    """The texts to ask `task`: those given, or one empty text where it needs none. Raises BadInput if one that it
    needs is missing or empty."""
    if task.example_text is None:
        return list(given) or [""]
    if given and all(text.strip() for text in given):
        return list(given)
    problem = "a text to ask is empty" if given else "nothing to ask"
    name = type(task).__name__.lower()
    raise BadInput(f"{problem}: task {name} needs a text, such as --text {json.dumps(task.example_text)}.")


def _tasks(recipe: recipes.Recipe, labels: list[str] | None) -> list[TaskBase]:
    """Each task of the train sources once."""
    from mmpeft_ds.engine.assembly.resolve import make_task

    sections = recipes.components(recipe).tasks
    tasks = []
    for i, source in enumerate(recipe.data.sources):
        if source.task not in [s.task for s in recipe.data.sources[:i]]:
            tasks.append(make_task(sections[f"data.sources.{i}"], labels))
    return tasks


def reading_pictures(directory: Path) -> list[str]:
    """Changes of an adapter's recipe with which its model reads picture files in place of stored features; none
    where it does so already, or where nobody knows what made the features."""
    options = read_backbone(directory)["options"]
    if options.get("images") != "stored":
        return []
    changes = ["backbone.images=live"]
    if "encoder" in options and options["encoder"] is None:
        towers = _towers(directory)
        if not towers.get("backbone"):
            raise BadInput(f"{directory}: trained on stored features, and towers.json does not say what made them.")
        changes.append(f"backbone.encoder={json.dumps(towers['backbone'])}")
    return changes + (["backbone.texts=live"] if options.get("texts") == "stored" else [])


def _pixels(image: Any, read: Callable[[bytes], Tensor]) -> Tensor:
    if isinstance(image, Tensor):
        return image
    try:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        if data[:6] == b"\x93NUMPY":  # stored features
            stored = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
            if not stored.isfinite().all():
                raise ValueError("it holds numbers that are not finite")
            return stored
        return read(data)
    except (OSError, ValueError, TypeError, BadSample) as e:
        name = "an image given as bytes" if isinstance(image, bytes) else image
        raise BadInput(f"{name}: cannot be read as an image ({e})") from e


def _towers(directory: Path) -> dict[str, Any]:
    """Description of the towers that made the stored features; empty where there are none."""
    path = directory / "towers.json"
    return found(read_json(path, dict), directory) if path.is_file() else {}
