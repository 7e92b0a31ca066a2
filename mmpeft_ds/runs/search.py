"""Search among new pictures with an adapter that was trained for retrieval: the best pictures of each text, or the
best texts of each picture.

OUT/results.jsonl      one object per hit: text, image, rank from 1, score (cosine)
OUT/results.png        contact sheet of the hits
OUT/index.safetensors  features of the pictures, which the next search takes over as long as files and adapter are
                       the same
"""

# N pictures, Q texts, E feature width

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmpeft_ds import adapter, files
from mmpeft_ds.contact_sheet import Layout, Tile, draw
from mmpeft_ds.data.pictures import shown
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.progress import Progress
from mmpeft_ds.runs.inputs import device_of
from mmpeft_ds.runs.predict import identity
from mmpeft_ds.tasks.retrieval.task import Retrieval, image_features

RESULTS, SHEET, INDEX = "results.jsonl", "results.png", "index.safetensors"
SAVE_EVERY = 60  # seconds between writing features while pictures are read
FILLER = "a"  # the text beside a picture, or the picture beside a text, of which nothing is used


@dataclass
class Hits:
    """Result of a search.

    Attributes:
        hits: objects with `text`, `image`, `rank` from 1 and `score`, in order of query and rank.
        errors: picture -> why it could not be read.
        cut: texts that were too long, so that their end was not read.
    """

    hits: list[dict[str, Any]]
    errors: dict[str, str] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)


class Searcher:
    """Features of pictures and texts from one adapter, comparable by their cosine.

    Args:
        directory: adapter directory of a run with the task `retrieval`.

    Raises:
        BadInput: the adapter has no such task.
    """

    def __init__(self, directory: Path, device: torch.device):
        tasks = adapter.tasks_of(directory)
        self.task = next((i for i, task in enumerate(tasks) if isinstance(task, Retrieval)), None)
        if self.task is None:
            named = ", ".join(type(task).__name__.lower() for task in tasks)
            raise BadInput(
                f"{directory}: trained for {named}; a search needs the task retrieval. Ask this adapter with "
                "launchers/predict.py."
            )
        self.loaded = adapter.load(directory, device, pictures=True)

    def picture(self, path: Path) -> Any:
        """A picture, read and transformed. Raises BadInput."""
        return self.loaded.sample(str(path), path, [FILLER], self.task)

    @torch.no_grad()
    def pictures(self, samples: Sequence[Any]) -> Tensor:
        """(n, E) unit vectors of pictures, on the CPU."""
        batch = self.loaded.pack(samples, self.task)
        return image_features(forward(self.loaded.model, self.loaded.backbone, batch), batch).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch: int, cut: list[str]) -> Tensor:
        """(Q, E) unit vectors of texts, on the CPU; those that were too long to be read whole go into `cut`."""
        backbone, rows = self.loaded.backbone, []
        for start in range(0, len(texts), batch):
            sample = self.loaded.sample("texts", backbone.dummy("image"), texts[start : start + batch], self.task)
            packed = self.loaded.pack([sample], self.task)
            cut += [
                text for text, tokens in zip(packed.raw_texts, packed.changes[:, 0].tolist(), strict=True) if tokens
            ]
            rows.append(forward(self.loaded.model, backbone, packed).text_features.float().cpu())
        return torch.cat(rows)


def search(
    directory: Path,
    pictures: Sequence[Path],
    texts: Sequence[str],
    *,
    out: Path,
    top: int = 12,
    batch: int = 32,
    device: str = "auto",
    of_pictures: bool = False,
) -> Hits:
    """Rank the pictures for each text, or with `of_pictures` the texts for each picture, and write `out`.

    Raises:
        BadInput: no such adapter or device, an adapter without retrieval, or no picture that can be read.
    """
    with files.writing(out):  # before the model is loaded, which takes long
        out.mkdir(parents=True, exist_ok=True)
    searcher = Searcher(directory, device_of(device))
    index = Index(out / INDEX, identity(directory, searcher.task))
    result = Hits([])
    image_NE = index.features(pictures, searcher, batch, result.errors)
    read = [p for p in pictures if str(p) not in result.errors]
    if not read:
        raise BadInput(f"none of the {len(pictures):,} pictures can be read. {next(iter(result.errors.values()))}")
    score_QN = searcher.texts(texts, batch, result.cut) @ image_NE.T
    scores = score_QN.T if of_pictures else score_QN
    values, order = scores.topk(min(top, scores.shape[1]))
    for query, (row, places) in enumerate(zip(values.tolist(), order.tolist(), strict=True)):
        for rank, (score, place) in enumerate(zip(row, places, strict=True), start=1):
            text, picture = (place, query) if of_pictures else (query, place)
            result.hits.append({"text": texts[text], "image": str(read[picture]), "rank": rank, "score": score})
    with files.writing(out):
        files.write_atomic(out / RESULTS, b"".join(map(files.json_line, result.hits)))
        sheet = contact_sheet(result.hits, of_pictures)
        with files.replacing(out / SHEET) as partial:
            sheet.save(partial, Path(SHEET).suffix[1:])
    return result


def contact_sheet(hits: Sequence[dict[str, Any]], of_pictures: bool) -> Any:
    """The hits of each query below its text; or each picture above its best texts."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for hit in hits:
        groups.setdefault(hit["image" if of_pictures else "text"], []).append(hit)
    if of_pictures:
        tiles = [
            Tile(_thumbnail(image), [Path(image).name, *(f"{h['score']:.3f}  {h['text']}" for h in own)])
            for image, own in groups.items()
        ]
        return draw([("", tiles)], Layout(tile=300, columns=4, lines=10))
    sheet = []
    for text, own in groups.items():
        lines = [[f"{hit['rank']}.  {hit['score']:.3f}", Path(hit["image"]).name] for hit in own]
        sheet.append((text, [Tile(_thumbnail(hit["image"]), below) for hit, below in zip(own, lines, strict=True)]))
    return draw(sheet, Layout(lines=3))


def _thumbnail(path: str) -> list[Any]:
    try:
        return [shown(Path(path).read_bytes())]
    except (OSError, BadSample):
        return []


def _rows_of(
    searcher: Searcher, samples: list[tuple[Path, Any]], errors: dict[str, str]
) -> Iterator[tuple[Path, Tensor]]:
    """Path and features of each sample; those that do not go together are read alone."""
    try:
        rows = searcher.pictures([sample for _, sample in samples]) if samples else []
    except BadInput as problem:
        if len(samples) == 1:
            errors[str(samples[0][0])] = str(problem)
            return
        for one in samples:
            yield from _rows_of(searcher, [one], errors)
        return
    yield from zip((path for path, _ in samples), rows, strict=True)


class Index:
    """Picture features of earlier searches, by path, size and time of change.

    Args:
        made_by: what the adapter is; features of another one are not used.
    """

    def __init__(self, path: Path, made_by: str):
        self.path, self.made_by = path, made_by
        self.rows: dict[str, Tensor] = {}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                if metadata["adapter"] == made_by:
                    self.rows = dict(zip(json.loads(metadata["keys"]), file.get_tensor("features"), strict=True))
        except (OSError, SafetensorError, KeyError, ValueError):  # none yet, or half of one: made again
            pass

    def features(
        self, pictures: Sequence[Path], searcher: Searcher, batch: int, errors: dict[str, str]
    ) -> Tensor | None:
        """(N, E) of the pictures that can be read, in order; why others cannot goes into `errors`."""
        keys = {path: self._key(path) for path in pictures}
        left = [path for path in pictures if keys[path] not in self.rows]
        known, saved = len(self.rows), time.monotonic()
        try:
            with Progress("read pictures", len(left), "pictures") as progress:
                for start in range(0, len(left), batch):
                    samples = []
                    for path in left[start : start + batch]:
                        try:
                            samples.append((path, searcher.picture(path)))
                        except BadInput as problem:
                            errors[str(path)] = str(problem)
                    for path, row in _rows_of(searcher, samples, errors):
                        self.rows[keys[path]] = row
                    if len(self.rows) > known and time.monotonic() - saved > SAVE_EVERY:  # a kill leaves these
                        self._save()
                        known, saved = len(self.rows), time.monotonic()
                    progress.advance(len(left[start : start + batch]))
        finally:  # also where somebody stops it: the next search continues from here
            if len(self.rows) > known:
                self._save()
        rows = [self.rows[keys[path]] for path in pictures if str(path) not in errors]
        return torch.stack(rows) if rows else None

    @staticmethod
    def _key(path: Path) -> str:
        """Key of a picture in the index; a missing picture gets one too, and fails when it is read."""
        try:
            stat = path.stat()
        except OSError:
            return str(path)
        return f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"adapter": self.made_by, "keys": json.dumps(list(self.rows))}
        with files.replacing(self.path) as partial:
            files.save_tensors(partial, {"features": torch.stack(list(self.rows.values()))}, metadata)
