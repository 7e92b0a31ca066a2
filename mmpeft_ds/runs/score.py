"""Scores of a file of predictions against references: result files of evaluation servers, and what evaluate.py wrote.

Source of the forms: specs/datasets.md 2.3, 2.5, 5, 6, 6.1.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.shards import ShardReader, members
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.metrics.captions import caption_scores
from mmpeft_ds.metrics.vqa import ANNOTATORS, Measure, answer_score, any_score
from mmpeft_ds.tasks.captioning.priors import WHICH, by_picture

Pair = tuple[str, list[str]]  # prediction, references


@dataclass(frozen=True)
class Kind:
    """A kind of predictions: names of the id, the predicted text and the references in files; and the word for
    items."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    references: tuple[str, ...]
    unit: str


KINDS = {
    "captions": Kind(
        ("image_id", "sample_id"), ("caption", "prediction"), ("references", "captions", "caption"), "captions"
    ),
    "vqa": Kind(
        ("question_id", "questionId", "image", "sample_id"),
        ("answer", "prediction"),
        ("answers", "answer"),
        "questions",
    ),
    "nlvr2": Kind(
        ("identifier", "question_id"), ("prediction", "answer"), ("answers", "label", "answer"), "sentences"
    ),
}


@dataclass(frozen=True)
class Source:
    """Source of references: a file, a prepared data set, or (neither) the predictions file itself."""

    file: Path | None = None
    data: str | None = None
    split: str = ""


def pairs(measure: str, predictions: Path, source: Source) -> list[Pair]:
    """Prediction and references of each item, in the order of the references, which is that of the evaluation.

    Raises:
        BadInput: see `named_pairs`.
    """
    return [pair for _, pair in named_pairs(measure, predictions, source)]


def named_pairs(measure: str, predictions: Path, source: Source) -> list[tuple[str, Pair]]:
    """`pairs`, each with the id of its item; captions of one picture's samples in one, as evaluation scores them.

    Raises:
        BadInput: a file that cannot be read; ids that are unknown, missing or doubled.
    """
    kind = KINDS[measure]
    rows = list(_rows(predictions))
    if not rows:
        raise BadInput(f"{predictions}: holds no prediction.")
    if source.file is None and source.data is None:
        pairs_of_items = [
            (
                str(_value(row, kind.ids, predictions)),
                (_text(row, kind, predictions), _own_references(row, kind, predictions)),
            )
            for row in rows
        ]
        return _of_pictures(pairs_of_items, rows) if measure == "captions" else pairs_of_items
    said: dict[str, str] = {}
    doubled = []
    for row in rows:
        name = str(_value(row, kind.ids, predictions))
        doubled += [name] if name in said else []
        said[name] = _text(row, kind, predictions)
    if doubled:
        raise BadInput(f"{predictions}: {len(doubled):,} ids stand twice, first {doubled[0]}. Keep one line each.")
    place = source.file or source.data
    known = _references(kind, source)
    unknown = [name for name in said if name not in known]
    absent = [name for name in known if name not in said]
    if unknown or absent:
        parts = [f"{len(unknown):,} that {place} does not have, first {unknown[0]}"] if unknown else []
        parts += [f"{len(absent):,} of {len(known):,} missing, first {absent[0]}"] if absent else []
        raise BadInput(f"{predictions}: ids do not match: {'; '.join(parts)}. Both sides need the same ids.")
    pairs_of_items = [(name, (said[name], references)) for name, references in known.items()]
    if measure != "captions":
        return pairs_of_items
    of_name = {str(_value(row, kind.ids, predictions)): row for row in rows}
    return _of_pictures(pairs_of_items, [of_name[name] for name in known])


def _of_pictures(found: list[tuple[str, Pair]], rows: Sequence[dict[str, Any]]) -> list[tuple[str, Pair]]:
    """Items whose rows are of one picture as one, with the first prediction and the references of all."""
    numbered = [{name: row[name] for name in WHICH if name in row} | {"item": i} for i, row in enumerate(rows)]
    merged = []
    for same in by_picture(numbered):
        name, (said, _) = found[same[0]["item"]]
        merged.append((name, (said, [text for part in same for text in found[part["item"]][1][1]])))
    return merged


def scores(measure: str, pairs: Sequence[Pair], vqa_measure: Measure = "official") -> dict[str, float]:
    """CIDEr, BLEU and ROUGE-L of captions, or the mean accuracy of answers by the chosen evaluator; where questions
    have more than one answer but fewer than ten, also `accuracy_any`: predictions that are one of the answers."""
    if measure == "captions":
        return caption_scores([said for said, _ in pairs], [references for _, references in pairs])
    means = {"accuracy": fmean(answer_score(said, answers, vqa_measure) for said, answers in pairs)}
    if any(1 < len(answers) < ANNOTATORS for _, answers in pairs):
        means["accuracy_any"] = fmean(any_score(said, answers) for said, answers in pairs)
    return means


def nlvr2_scores(named: Sequence[tuple[str, Pair]]) -> dict[str, float]:
    """`accuracy` and `consistency` of NLVR2, in any case of letters: consistency is the share of sentences that are
    judged rightly for each of their pairs of pictures.

    Args:
        named: of `named_pairs`; an id is split-set-pair-sentence.

    Raises:
        BadInput: an id of another form.
    """
    of_sentence: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for name, (said, (label, *_)) in named:
        parts = name.split("-")
        if len(parts) != 4:
            raise BadInput(f"{name!r} is no identifier of NLVR2, split-set-pair-sentence such as dev-850-0-0.")
        of_sentence[parts[1], parts[3]].append(said.strip().lower() == label.strip().lower())
    right = [right for answers in of_sentence.values() for right in answers]
    return {"accuracy": fmean(right), "consistency": fmean(map(all, of_sentence.values()))}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Entries of a JSON list, of a JSON object (see `_entries`), of JSON lines, or of lines `identifier,label`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        # not splitlines, which also splits at line breaks that may stand within a JSON string (U+2028, U+0085)
        lines = [line for line in text.split("\n") if line.strip()]
        if path.suffix == ".csv":
            entries: Any = [dict(zip(("identifier", "prediction"), line.split(","), strict=True)) for line in lines]
        elif path.suffix == ".jsonl" or len(lines) > 1 and _is_object(lines[0]):  # NLVR2's lines end in .json
            entries = [json.loads(line) for line in lines]
        else:
            entries = json.loads(text)
            entries = _entries(entries) if isinstance(entries, dict) else entries
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(
            f"{path}: cannot be read ({e}). Give a JSON list, JSON lines ending in .jsonl, or NLVR2's lines "
            "identifier,True ending in .csv."
        ) from e
    if not isinstance(entries, list) or not all(isinstance(row, dict) for row in entries):
        raise BadInput(
            f"{path}: is no list of objects. Give a list of {{image_id, caption}} or {{question_id, answer}}."
        )
    yield from entries


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _entries(annotations: dict[str, Any]) -> Any:
    """Entries of an object: GQA's, id -> question, or `annotations`, in the order of `images` where COCO has them."""
    if annotations and all(isinstance(question, dict) for question in annotations.values()):
        return [{"questionId": name, **question} for name, question in annotations.items()]
    entries, images = annotations.get("annotations", annotations), annotations.get("images")
    if not isinstance(entries, list) or not isinstance(images, list):
        return entries
    place = {str(image.get("id")): number for number, image in enumerate(images) if isinstance(image, dict)}
    return sorted(entries, key=lambda e: place.get(str(e.get("image_id")), -1) if isinstance(e, dict) else -1)


def _value(row: dict[str, Any], names: Sequence[str], where: Any) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise BadInput(f"{where}: an entry has none of {', '.join(names)}: {json.dumps(row)[:80]}")


def _text(row: dict[str, Any], kind: Kind, where: Any) -> str:
    text = _value(row, kind.texts, where)
    if not isinstance(text, str):
        raise BadInput(f"{where}: a prediction is no text: {json.dumps(row)[:80]}")
    return text


def _listed(value: Any, where: Any) -> list[str]:
    """References as texts: one text, a list of texts, or a list of {answer}; numbers become texts."""
    values = value if isinstance(value, list) else [value]
    values = [v["answer"] if isinstance(v, dict) and "answer" in v else v for v in values]
    if strange := [v for v in values if not isinstance(v, str | int | float)]:
        raise BadInput(f"{where}: a reference is no text: {json.dumps(strange[0])[:80]}")
    return [str(v) for v in values]


def _own_references(row: dict[str, Any], kind: Kind, where: Path) -> list[str]:
    references = _listed(row.get(kind.references[0], []), where)
    if not references:
        raise BadInput(f"{where}: has entries without `{kind.references[0]}`. Name them: --references, or --data DIR.")
    return references


def _references(kind: Kind, source: Source) -> dict[str, list[str]]:
    """Id -> references; captions of one image may stand in several entries."""
    place = source.file or source.data
    known: dict[str, list[str]] = {}
    for row in _rows(source.file) if source.file else _items(kind, str(source.data), source.split):
        name = str(_value(row, kind.ids, place))
        references = _listed(_value(row, kind.references, place), place)
        if kind.unit != "captions" and name in known:
            raise BadInput(f"{place}: {name} stands twice. Keep one entry.")
        known.setdefault(name, []).extend(references)
    if empty := [name for name, references in known.items() if not references]:
        raise BadInput(
            f"{place}: {len(empty):,} {kind.unit} have no reference, first {empty[0]}. Score another split."
        )
    return known


def _items(kind: Kind, data: str, split: str) -> Iterator[dict[str, Any]]:
    """Records, or their questions, of a split; images are not read."""
    manifest = Manifest.load(data)
    if split not in manifest.splits:
        raise BadInput(f"--split {split}: {data} has {', '.join(manifest.splits)}.")
    reader = ShardReader(manifest, split)
    try:
        for number, shard in enumerate(manifest.shards(split)):
            for piece in reader.read([(number, sample) for sample in range(shard.samples)]):
                if isinstance(piece, BadSample):
                    continue
                record = json.loads(members(piece)[1]["json"])
                yield from [record] if kind.unit == "captions" else record.get("questions", [])
    finally:
        reader.close()
