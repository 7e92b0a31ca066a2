"""Your own data: one JSON object a line, in one or more files a split.

    {"image": "a.jpg", "caption": "two dogs"}                             or "captions": [...]
    {"image": "a.jpg", "question": "how many?", "answer": "2"}            or "answers": [10 annotators]
    {"image": ["l.jpg", "r.jpg"], "questions": [{"question": "same?", "answer": "yes"}, ...]}
    {"image": "a.jpg", "label": "cat"}                                    or an integer
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "..."}]}

`image` is one path, a list of paths (several images, video frames) or absent (text only). `features` is the path of a
.npy array, or a list of them, one an image, in the place of images; `--features-are` says whether the rows of an array
are the places of a grid or regions, which the numbers do not tell. A line may hold several of these; `id` names the
sample. Any other key is kept under `extra`, which no task reads, and named when the data set is prepared; one that
looks like a key above, or names a file, is refused (see common/unknown_keys.py).
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.sources.base import RawSample, Source
from data_prep.sources.common.unknown_keys import check_unknown
from mmpeft_ds.data.formats import REGION_COUNTS, STORED_SUFFIXES
from mmpeft_ds.data.parsing import check_questions, json_object, npy_array
from mmpeft_ds.errors import BadInput, BadSample

SHOWN = 20
BLOCK = 1024  # lines whose places are taken from a table at a time
MAX_CLASSES = 1_000_000
CONTENT = ("caption", "captions", "question", "questions", "label", "conversations")
FILES = ("image", "features")
OF_QUESTION = ("question", "answer", "answers", "question_id", "type")


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
    licence: str = "unknown"


class Jsonl(Source):
    Options = Options

    def __init__(self, options: Options):
        self.options = options
        self.licence = options.licence
        self._files = {s: getattr(options, s) for s in ("train", "val", "test") if getattr(options, s)}
        if not self._files:
            raise BadInput("jsonl: no input. Give --train FILE.jsonl [FILE.jsonl ...], --val, --test.")
        for path in (p for files in self._files.values() for p in files):
            if not path.is_file():
                raise BadInput(f"{path}: no such file.")

    def splits(self) -> list[str]:
        """Reads every line and looks for every image before anything is written."""
        problems: list[str] = []
        missing: dict[str, str] = {}
        extra: Counter[str] = Counter()
        arrays: dict[str, Path] = {}  # the first of each split
        for split, files in self._files.items():
            for file in files:
                for number, line in _lines(file):
                    try:
                        images, record = self._parse(line, file, split)
                        _check_storable(record)
                    except ValueError as error:
                        problems.append(f"{file}:{number}: {error}")
                        continue
                    extra.update(_extra_keys(record))
                    for path in images:
                        if path.suffix == ".npy":
                            arrays.setdefault(split, path)
                        if str(path) not in missing and not path.is_file():
                            missing[str(path)] = f"{file}:{number}: {path} does not exist"
        problems += missing.values()
        for problem in problems[:SHOWN]:
            print(problem, file=sys.stderr)
        if problems:
            more = f", {SHOWN} of them shown above" if len(problems) > SHOWN else ", shown above"
            names = " ".join(str(f) for files in self._files.values() for f in files)
            raise BadInput(
                f"{names}: {len(problems)} problems{more}. Nothing was written. Mend these lines or remove them."
            )
        for path in arrays.values():
            self._check_rows(path)
        if extra:
            kept = ", ".join(f"{key} ({count:,})" for key, count in extra.most_common(SHOWN))
            print(f"kept under `extra`, which no task reads: {kept}", file=sys.stderr)
        return list(self._files)

    def _check_rows(self, path: Path) -> None:
        """Ask what the rows of stored features are where that was not said and matters. Raises BadInput."""
        try:
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: cannot be read as an array ({error}). Store it with numpy.save.") from error
        if self.options.features_are or len(shape) != 2 or shape[0] == 1:
            return
        if shape[0] in REGION_COUNTS:
            raise BadInput(
                f"{path}: {shape[0]} rows, which can be a square grid or the regions of a detector. Say which: "
                "--features-are grid or --features-are regions."
            )
        print(f"note: {path}: {shape[0]} rows are taken for a grid; --features-are says it for sure", file=sys.stderr)

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
            for question in _questions(line):
                counts.update(answer for answer in question["answers"] if answer.strip())
        kept = [a for a, n in counts.items() if n >= self.options.min_answer_count]
        return sorted(kept, key=lambda a: (-counts[a], a))[: self.options.max_answers] or None

    def count(self, split: str) -> int:
        return sum(len(table) for _, table in self._tables[split])

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        for file, table in self._tables[split]:
            if start >= len(table):
                start -= len(table)
                continue
            with open(file, "rb") as stream:
                # As plain numbers a whole table takes ten times its memory, and a shard reads few lines of it.
                blocks = (table[at : at + BLOCK].tolist() for at in range(start, len(table), BLOCK))
                for number, offset in chain.from_iterable(blocks):
                    stream.seek(offset)
                    line = stream.readline()
                    try:
                        images, record = self._parse(line, file, split)
                        encoded = [(p.suffix[1:], p.read_bytes()) for p in images if p.suffix != ".npy"]
                        features = _stacked([p for p in images if p.suffix == ".npy"])
                    except (ValueError, OSError) as error:
                        raise BadInput(f"{file}:{number}: {error}") from error
                    name = str(json.loads(line).get("id", f"{file.name}:{number}"))
                    yield RawSample(name, encoded, record, features)
            start = 0

    @cached_property
    def _tables(self) -> dict[str, list[tuple[Path, np.ndarray]]]:
        """Split -> (file, (lines, 2) of line number and byte offset); lets a shard begin anywhere."""
        return {split: [(file, _line_table(file)) for file in files] for split, files in self._files.items()}

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

    def _parse(self, line: bytes, file: Path, split: str) -> tuple[list[Path], dict[str, Any]]:
        """(paths of images and features, record) of one line; ValueError says what is wrong with it."""
        try:
            parsed = json.loads(line.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_each_once)
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
        pictured = bool(images or features)
        record: dict[str, Any] = {}
        if "caption" in parsed or "captions" in parsed:
            record["captions"] = _captions(parsed)
        if "question" in parsed or "questions" in parsed:
            record["questions"] = _questions(
                parsed,
                strict=True,
                extra=lambda one: self._extra_of(one, (*OF_QUESTION, _type_key(one)), file, pictured),
            )
        if "label" in parsed:
            record.update(self._label(parsed, split))
        if "conversations" in parsed:
            record["conversations"] = _conversations(
                parsed["conversations"],
                len(images),
                lambda turn: self._extra_of(turn, ("from", "value"), file, pictured),
            )
        return images + features, {**record, "extra": extra} if extra else record

    def _extra(self, found: dict[str, Any], file: Path) -> dict[str, Any]:
        """What no task reads of a line. Raises ValueError if a task was meant to."""
        read = ["id", *FILES, *CONTENT, "class_name"]
        if "class_name" in found and "label" not in found:
            raise ValueError("'class_name' goes with an integer under 'label', and there is none")
        if "question" in found:
            read += [*OF_QUESTION, _type_key(found)]
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
        for one, several in (("caption", "captions"), ("question", "questions"), ("answer", "answers")):
            if one in found and several in found:
                raise ValueError(f"has both {one!r} and {several!r}: one of them would be left aside. Keep one")
        unknown = [key for key in found if key not in read]
        check_unknown(found, unknown, self.options.keep, self._folders(file), pictured)
        return {key: found[key] for key in unknown}

    def _folders(self, file: Path) -> set[Path]:
        """Where a path in a line may begin."""
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


def _captions(found: dict[str, Any]) -> list[str]:
    captions = found.get("captions", found.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    if not (isinstance(captions, list) and captions and all(isinstance(c, str) and c.strip() for c in captions)):
        raise ValueError("'caption' must be a text, 'captions' a list of texts, none of them empty")
    return captions


def _questions(
    found: dict[str, Any], strict: bool = False, extra: Callable[[dict], dict] = lambda one: {}
) -> list[dict[str, Any]]:
    """Questions in the one form of the shards; wrong ones raise ValueError if `strict`, else are left out.

    Args:
        extra: what is to be kept of an entry of `questions` that no task reads.
    """
    asked = found.get("questions")
    if asked is None:
        asked = [found] if "question" in found else []
    elif isinstance(asked, list) and asked and all(isinstance(q, str) for q in asked):
        answers = found.get("answers")
        if not (isinstance(answers, list) and len(answers) == len(asked)):
            if strict:
                raise ValueError(f"'answers' must be a list of {len(asked)}, one entry for each of 'questions'")
            return []
        asked = [{"question": q, "answers": a} for q, a in zip(asked, answers, strict=True)]
    if not (isinstance(asked, list) and (asked or not strict)):
        if strict:
            raise ValueError("'questions' must be a list that is not empty")
        return []
    read = []
    for one in asked:
        try:
            question = _question(one)
            more = extra(one) if one is not found else {}
            read.append({**question, "extra": more} if more else question)
        except ValueError:
            if strict:
                raise
    return read


def _question(one: Any) -> dict[str, Any]:
    if not isinstance(one, dict):
        raise ValueError("'questions' must hold texts or objects with 'question' and 'answer' or 'answers'")
    text, answers = one.get("question"), one.get("answers", one.get("answer"))
    if not (isinstance(text, str) and text.strip()):
        raise ValueError("'question' must be a text that is not empty")
    answers = answers if isinstance(answers, list) else [answers]
    # VQAv2's annotation file wraps each annotator's answer.
    answers = [a.get("answer") if isinstance(a, dict) else a for a in answers]
    if not (answers and all(isinstance(a, str) for a in answers)):
        raise ValueError(f"question {text[:40]!r} needs 'answer' (a text) or 'answers' (a list of texts)")
    if not any(a.strip() for a in answers):
        raise ValueError(f"question {text[:40]!r} has no answer but empty ones")
    read: dict[str, Any] = {"question": text, "answers": answers}
    if "question_id" in one:
        read["question_id"] = one["question_id"]
    if (name := _type_key(one)) is not None:
        read["type"] = one[name]
    return read


def _type_key(one: dict[str, Any]) -> str | None:
    """The key that says of what type a question is; the last two are VQAv2's."""
    return next((name for name in ("type", "answer_type", "question_type") if name in one), None)


def _extra_keys(record: dict[str, Any]) -> Iterator[str]:
    """Names of what is kept of a record without being read."""
    yield from record.get("extra", {})
    for name in ("questions", "conversations"):
        for item in record.get(name, []):
            yield from (f"{name}[].{key}" for key in item.get("extra", {}))


def _conversations(turns: Any, images: int, extra: Callable[[dict], dict]) -> list[dict[str, Any]]:
    """Turns in the form of the shards; `extra` gives what is to be kept of a turn that no task reads."""
    if not (isinstance(turns, list) and turns):
        raise ValueError("'conversations' must be a list that is not empty")
    for i, turn in enumerate(turns):
        if not (isinstance(turn, dict) and isinstance(turn.get("value"), str) and turn["value"].strip()):
            raise ValueError(f"turn {i} of 'conversations' needs a 'value' that is a text")
        if turn.get("from") not in ("human", "gpt", "system"):
            raise ValueError(
                f"turn {i} of 'conversations' is from {turn.get('from')!r}, expected human, gpt or system"
            )
    named = sum(turn["value"].count("<image>") for turn in turns)
    if named not in (0, images):
        raise ValueError(f"'conversations' name <image> {named} times but the line has {images} images")
    read = []
    for turn in turns:
        more = extra(turn)
        read.append({"from": turn["from"], "value": turn["value"], **({"extra": more} if more else {})})
    return read


def _is_label(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return bool(value) if isinstance(value, str) else isinstance(value, int) and 0 <= value < MAX_CLASSES


def _check_storable(record: dict[str, Any]) -> None:
    """Some texts and numbers that JSON admits cannot be written again: half a surrogate pair, 1e999."""
    try:
        json_object(json.dumps(record, ensure_ascii=False, allow_nan=False).encode())
        check_questions(record)
    except BadSample as error:
        raise ValueError(error.detail) from error
    except UnicodeEncodeError as error:
        raise ValueError(f"holds \\u{ord(error.object[error.start]):04x}, half of a character") from error
    except ValueError as error:
        raise ValueError("holds a number that is too large for a float") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"has the key {twice!r} twice")
    return parsed


def _no_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is no JSON")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of the lines that are not blank."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, line


def _line_table(file: Path) -> np.ndarray:
    table, offset = array("q"), 0  # 16 bytes a line
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                table.extend((number, offset))
            offset += len(line)
    return np.asarray(table).reshape(-1, 2)


ENTRY = Jsonl
