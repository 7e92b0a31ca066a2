"""Your own data: one JSON object per line, in one or more files per split.

    {"image": "a.jpg", "caption": "two dogs"}                             or "captions": [...]
    {"image": "a.jpg", "question": "how many?", "answer": "2"}            or "answers": [10 annotators]
    {"image": ["l.jpg", "r.jpg"], "questions": [{"question": "same?", "answer": "yes"}, ...]}
    {"image": "a.jpg", "label": "cat"}                                    or an integer
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "..."}]}

`image` is one path, a list of paths or absent (text only). `video` is the path of a video, of which --frames frames
are stored with their times, or {"frames": [paths of pictures], "times": [seconds]}, or a list of these. `features`
is the path of a .npy array, or a list of them, one per image, in place of images; `--features-are` says whether
the rows of an array are the places of a grid or regions, which the numbers do not tell. A line may hold several of
these; `id` names the sample. Any other key is kept under `extra`, which no task reads, and named when the data set
is prepared; one that looks like a key above, or names a file, is refused (see common/unknown_keys.py).
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_prep.sources.base import RawSample, Source
from data_prep.sources.common import feature_rows
from data_prep.sources.common.json_lines import (
    captions_of,
    check_storable,
    conversations_of,
    each_once,
    extra_keys,
    no_constant,
    questions_of,
    type_key,
)
from data_prep.sources.common.line_checks import SHOWN, Film, LineChecks
from data_prep.sources.common.unknown_keys import check_unknown
from data_prep.sources.common.videos import check_options, with_videos
from mmpeft_ds.data import video_files
from mmpeft_ds.data.formats import STORED_SUFFIXES
from mmpeft_ds.data.parsing import npy_array
from mmpeft_ds.data.video import times_of
from mmpeft_ds.data.video_files import ENDINGS, QUALITY, Frames
from mmpeft_ds.errors import BadInput, BadSample

EACH = 64  # of so many lines the place of one is kept
MAX_CLASSES = 1_000_000
CONTENT = ("caption", "captions", "question", "questions", "label", "conversations")
FILES = ("image", "video", "videos", "features")
OF_QUESTION = ("question", "answer", "answers", "question_id", "type", "weight")


@dataclass
class Options:
    """Options of the source.

    Attributes:
        train: JSONL files of the training split.
        val: JSONL files of the validation split.
        test: JSONL files of the test split.
        image_root: folder that image paths are relative to (default: the folder of the JSONL file).
        min_answer_count: answers given less often in training are not in the closed answer list.
        max_answers: length of the closed answer list at most; 0 stores none.
        features_are: what the rows of an array under `features` are: the places of a square `grid` in row order, or
            `regions` in any order, such as those of a detector.
        frames: how many frames of each video are stored.
        quality: of the stored JPEG frames, 1 to 95.
        keep: keys to keep under `extra` although they look like keys that tasks read, or name files.
        licence: written to the manifest.
    """

    train: list[Path] = field(default_factory=list)
    val: list[Path] = field(default_factory=list)
    test: list[Path] = field(default_factory=list)
    image_root: Path | None = None
    min_answer_count: int = 1
    max_answers: int = 5000
    features_are: Literal["grid", "regions"] | None = None
    keep: list[str] = field(default_factory=list)
    frames: int = 8
    quality: int = QUALITY
    licence: str = "unknown"


class Jsonl(Source):
    Options = Options

    def __init__(self, options: Options):
        self.options = options
        self.licence = options.licence
        check_options(options)
        self._files = {s: getattr(options, s) for s in ("train", "val", "test") if getattr(options, s)}
        if not self._files:
            raise BadInput("jsonl: no input. Give --train FILE.jsonl [FILE.jsonl ...], --val, --test.")
        for split, path in ((split, path) for split, files in self._files.items() for path in files):
            if not path.is_file():
                raise BadInput(f"--{split} {path}: no such file. Give the path of a JSONL file.")

    def splits(self) -> list[str]:
        """Reads every line and looks for every image before anything is written."""
        checks = LineChecks()
        for split, files in self._files.items():
            for file in files:
                for number, line in _lines(file):
                    try:
                        images, record, videos = self._parse(line, file, split)
                        check_storable(record)
                    except ValueError as error:
                        checks.problems.append((f"{file}:{number}", str(error)))
                        continue
                    checks.extra.update(extra_keys(record))
                    checks.look_for(f"{file}:{number}", images, videos)
        checks.refuse(" ".join(str(f) for files in self._files.values() for f in files))
        feature_rows.check({rows: path for rows, path in checks.arrays.items() if rows > 1}, self.options.features_are)
        if checks.extra:
            kept = ", ".join(f"{key} ({count:,})" for key, count in checks.extra.most_common(SHOWN))
            print(f"kept under `extra`, which no task reads: {kept}", file=sys.stderr)
        return list(self._files)

    def fingerprint(self) -> dict[str, str]:
        """sha256 of every JSONL file. Images are named in them; their bytes are not read twice for this."""
        digests = {}
        for split, files in self._files.items():
            for i, file in enumerate(files):
                with open(file, "rb") as stream:
                    digest = hashlib.sha256()
                    while block := stream.read(1 << 20):
                        digest.update(block)
                digests[f"{split}[{i}]"] = digest.hexdigest()
        return digests

    def labels(self, split: str) -> list[str] | None:
        """Class names, or else the most frequent answers (equals in alphabetic order), or None."""
        if self._classes:
            return self._classes
        counts: Counter[str] = Counter()
        for _, line, _ in self._objects(split):
            for question in questions_of(line):
                counts.update(answer for answer in question["answers"] if answer.strip())
        kept = [a for a, n in counts.items() if n >= self.options.min_answer_count]
        return sorted(kept, key=lambda a: (-counts[a], a))[: self.options.max_answers] or None

    def count(self, split: str) -> int:
        return sum(places.lines for _, places in self._places[split])

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        for file, places in self._places[split]:
            if start >= places.lines:
                start -= places.lines
                continue
            begin = places.begins[start // EACH].tolist()
            for number, line in islice(_lines(file, *begin), start % EACH, None):
                try:
                    images, record, videos = self._parse(line, file, split)
                    frames = [self._frames(film) for film in videos]
                    encoded = [(p.suffix[1:], p.read_bytes()) for p in images if p.suffix != ".npy"]
                    features = _stacked([p for p in images if p.suffix == ".npy"])
                except (ValueError, OSError) as error:
                    raise BadInput(f"{file}:{number}: {error}") from error
                name = str(json.loads(line).get("id", f"{file.name}:{number}"))
                yield with_videos(RawSample(name, encoded, record, features), frames)
            start = 0

    @cached_property
    def _places(self) -> dict[str, list[tuple[Path, _Places]]]:
        """Split -> (file, its lines); lets a shard begin anywhere."""
        return {split: [(file, _places_of(file)) for file in files] for split, files in self._files.items()}

    @cached_property
    def _classes(self) -> list[str]:
        """Class names of the first split in the order of the class index; empty if its lines have no labels.

        Text labels are numbered in alphabetic order; integer labels keep their number and may bring a `class_name`.
        """
        labels: set[int | str] = set()
        names: dict[int | str, str] = {}
        for _, line, _ in self._objects(next(iter(self._files))):
            if _is_label(line.get("label")):
                labels.add(line["label"])
                if "class_name" in line:
                    names.setdefault(line["label"], str(line["class_name"]))
        if not labels or len({type(label) for label in labels}) > 1:
            return []
        if isinstance(next(iter(labels)), str):
            return sorted(labels)
        return [names.get(i, str(i)) for i in range(max(labels) + 1)]

    def _objects(self, split: str) -> Iterator[tuple[int, dict[str, Any], Path]]:
        """(line number, object, file) of the lines that hold an object."""
        for file in self._files[split]:
            for number, line in _lines(file):
                try:
                    parsed = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(parsed, dict):
                    yield number, parsed, file

    def _parse(self, line: bytes, file: Path, split: str) -> tuple[list[Path], dict[str, Any], list[Film]]:
        """(paths of images and features, record, videos) of one line; ValueError says what is wrong with it."""
        try:
            parsed = json.loads(line.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=each_once)
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 (byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"is no JSON object ({error.msg} at column {error.colno})") from error
        except RecursionError as error:
            raise ValueError("is nested too deeply") from error
        if not isinstance(parsed, dict):
            raise ValueError(f"is a JSON {type(parsed).__name__}, expected an object {{...}}")
        extra = self._extra(parsed, file)
        if not any(name in parsed for name in CONTENT):
            raise ValueError(f"has none of {', '.join(CONTENT)}")
        images = self._paths(parsed, "image", sorted(STORED_SUFFIXES), file)
        features = self._paths(parsed, "features", [".npy"], file)
        videos = self._videos(parsed.get("video", parsed.get("videos")), file)
        if features and videos:
            raise ValueError("'video' beside 'features': a model reads one of them")
        pictured = bool(images or features or videos)
        record: dict[str, Any] = {}
        if "caption" in parsed or "captions" in parsed:
            record["captions"] = captions_of(parsed)
        if "question" in parsed or "questions" in parsed:
            record["questions"] = questions_of(
                parsed,
                strict=True,
                extra=lambda one: self._extra_of(one, (*OF_QUESTION, type_key(one)), file, pictured),
            )
        if "label" in parsed:
            record.update(self._label(parsed, split))
        if "conversations" in parsed:
            record["conversations"] = conversations_of(
                parsed["conversations"],
                {"<image>": len(images), "<video>": len(videos)},
                lambda turn: self._extra_of(turn, ("from", "value"), file, pictured),
            )
        return images + features, {**record, "extra": extra} if extra else record, videos

    def _extra(self, found: dict[str, Any], file: Path) -> dict[str, Any]:
        """The fields of a line that no task reads. Raises ValueError if one was probably meant for a task."""
        read = ["id", *FILES, *CONTENT, "class_name"]
        if "class_name" in found and "label" not in found:
            raise ValueError("'class_name' goes with an integer under 'label', and there is none")
        if "question" in found:
            read += [*OF_QUESTION, type_key(found)]
        elif isinstance(found.get("questions"), list) and all(isinstance(q, str) for q in found["questions"]):
            read.append("answers")
        aside = next((key for key in ("answer", "answers") if key in found and key not in read), None)
        if aside and "questions" in found:
            raise ValueError(f"{aside!r} stands beside 'questions': put it into the question that it belongs to")
        if aside:
            raise ValueError(f"{aside!r} without a 'question': say what is asked, or call it 'caption'")
        return self._extra_of(found, read, file, any(found.get(name) for name in FILES))

    def _extra_of(
        self, found: dict[str, Any], read: Collection[str | None], file: Path, pictured: bool
    ) -> dict[str, Any]:
        """The entries of an object that are not `read`. Raises ValueError if one was meant to be.

        Args:
            pictured: the line has a picture or features.
        """
        for one in ("caption", "question", "answer", "video"):
            several = f"{one}s"
            if one in found and several in found:
                raise ValueError(f"has both {one!r} and {several!r}: one of them would be left aside. Keep one")
        unknown = [key for key in found if key not in read]
        check_unknown(found, unknown, self.options.keep, self._folders(file), pictured)
        return {key: found[key] for key in unknown}

    def _folders(self, file: Path) -> set[Path]:
        """Folders to which a path in a line may be relative."""
        return {self.options.image_root or file.parent, file.parent}

    def _paths(self, found: dict[str, Any], key: str, extensions: list[str], file: Path) -> list[Path]:
        value = found.get(key)
        if value is None:
            return []
        paths = value if isinstance(value, list) else [value]
        if not all(isinstance(p, str) and p for p in paths):
            raise ValueError(f"{key!r} must be a path or a list of paths")
        root = self.options.image_root or file.parent
        for path in paths:
            if Path(path).suffix.lower() not in extensions:
                raise ValueError(f"{key} {path!r} has none of the extensions {' '.join(extensions)}")
        return [root / path for path in paths]

    def _videos(self, given: Any, file: Path) -> list[Film]:
        """Videos of a line: their files, or the files of their frames with their times."""
        if given is None:
            return []
        root, videos = self.options.image_root or file.parent, []
        for video in given if isinstance(given, list) else [given]:
            if isinstance(video, str) and Path(video).suffix.lower() in ENDINGS:
                videos.append(Film([root / video]))
                continue
            if not isinstance(video, dict) or video.keys() != {"frames", "times"}:
                endings = " ".join(sorted(ENDINGS))
                raise ValueError(f"'video' needs a path with one of {endings}, or {{'frames': [...], 'times': [...]}}")
            frames = self._paths(video, "frames", sorted(STORED_SUFFIXES), file)
            try:
                (times,) = times_of({"videos": [video]}, len(frames))
            except BadSample as bad:
                raise ValueError(bad.detail) from bad
            if len(frames) != len(times.of_frames):
                raise ValueError(f"a video has {len(frames)} frames and {len(times.of_frames)} times")
            videos.append(Film(frames, video["times"]))
        return videos

    def _frames(self, film: Film) -> Frames:
        if film.times is None:
            return video_files.sample(film.files[0], self.options.frames, self.options.quality)
        pictures = [(path.suffix[1:], path.read_bytes()) for path in film.files]
        return Frames(
            pictures, film.times, False, times_of({"videos": [{"times": film.times}]}, len(pictures))[0].duration
        )

    def _label(self, found: dict[str, Any], split: str) -> dict[str, Any]:
        label = found["label"]
        if not _is_label(label):
            raise ValueError(f"'label' must be a text or an integer in [0, {MAX_CLASSES:,})")
        if not self._classes:
            raise ValueError("labels are texts in some lines and integers in others, or the first split has none")
        if isinstance(label, int):
            if label >= len(self._classes):
                raise ValueError(f"label {label} does not occur in split {next(iter(self._files))!r}")
            name = self._classes[label]
            if str(found.get("class_name", name)) != name:
                raise ValueError(f"label {label} is class {found['class_name']!r} here, but {name!r} in another line")
            return {"label": label, "class_name": name}
        if str(found.get("class_name", label)) != label:
            raise ValueError(f"'class_name' {found['class_name']!r} beside the text {label!r} under 'label': keep one")
        if label not in self._class_index:
            raise ValueError(f"label {label!r} does not occur in split {next(iter(self._files))!r}")
        return {"label": self._class_index[label], "class_name": label}

    @cached_property
    def _class_index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self._classes)}


def _stacked(paths: list[Path]) -> np.ndarray | None:
    """The arrays of .npy files: one as it is, several along a new first dimension."""
    arrays = [_array(path) for path in paths]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(f"features of one line differ in shape: {arrays[0].shape}, {arrays[1].shape}")
    return None if not arrays else arrays[0] if len(arrays) == 1 else np.stack(arrays)


def _array(path: Path) -> np.ndarray:
    try:
        return npy_array(path.read_bytes())
    except BadSample as error:
        raise ValueError(f"{path}: {error}") from error


def _is_label(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return bool(value) if isinstance(value, str) else isinstance(value, int) and 0 <= value < MAX_CLASSES


class _Places(NamedTuple):
    """Number of lines of a file that are not blank, and (line number, byte offset) of the first of each `EACH`."""

    lines: int
    begins: np.ndarray


def _lines(file: Path, first: int = 1, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of the lines that are not blank, from line `first` on, which begins at `offset`."""
    with open(file, "rb") as stream:
        stream.seek(offset)
        for number, line in enumerate(stream, first):
            if line.strip():
                yield number, line


def _places_of(file: Path) -> _Places:
    begins, lines, offset = array("q"), 0, 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                if lines % EACH == 0:
                    begins.extend((number, offset))
                lines += 1
            offset += len(line)
    return _Places(lines, np.asarray(begins).reshape(-1, 2))


ENTRY = Jsonl
