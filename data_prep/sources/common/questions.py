"""Questions with the answers of annotators, in the forms that VQA data sets share.

A sample is a picture with all its `questions`: {question, answers, question_id, type, question_type, scores}. `scores`
are the soft targets over the list of answers, as specs/datasets.md 2.3 gives them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.common import annotations
from data_prep.sources.common.index import Aside, Entry, Index
from mmpeft_ds.errors import BadInput
from mmpeft_ds.metrics.vqa import normalize_answer, soft_score

Rule = Literal["official", "normalised"]
ANSWERS = "answers"  # kind of lookup: annotations by the id of their question


def answer_list(files: Iterable[Path], at_least: int) -> list[str]:
    """The closed list of answers by the published rule: the main answers of all questions, normalised, that stand for
    at least so many questions; the most frequent first, equals in alphabetic order.

    Args:
        files: annotation files of training and validation; with VQAv2's and 9 the list has 3,129 entries, among them
            the empty one.
    """
    counts: Counter[str] = Counter()
    for file in files:
        for row in annotations.items(file, "annotations"):
            if isinstance(main := row.get("multiple_choice_answer"), str):
                counts[normalize_answer(main).replace(",", "")] += 1
    return most_frequent(counts, at_least)


def most_frequent(counts: Counter[str], at_least: int = 1) -> list[str]:
    """Answers that stand so often, the most frequent first, equals in alphabetic order."""
    return sorted((a for a, n in counts.items() if n >= at_least), key=lambda answer: (-counts[answer], answer))


def given_answers(rows: Iterable[Any], at_least: int) -> list[str]:
    """The closed list of all answers that annotators gave so often, as they were written, `most_frequent` first.

    Args:
        rows: annotations, each with `answers`, a list of {answer}. Those of another form count nothing.
    """
    counts: Counter[str] = Counter()
    for row in rows:
        given = row.get("answers") if isinstance(row, dict) else None
        for one in given if isinstance(given, list) else ():
            if isinstance(one, dict) and isinstance(answer := one.get("answer"), str) and answer:
                counts[answer] += 1
    return most_frequent(counts, at_least)


def soft_targets(answers: list[str], listed: Collection[str], rule: Rule) -> dict[str, float]:
    """Answer of the list -> score by how many annotators gave it, in the order in which they first did.

    Args:
        rule: `official`: answers as they were written, although the list is normalised, as published targets have it;
            `normalised`: after normalisation.
    """
    counts = Counter(normalize_answer(a).replace(",", "") if rule == "normalised" else a for a in answers)
    return {answer: round(soft_score(n, len(answers)), 6) for answer, n in counts.items() if answer in listed}


def put_answers(index: Index, file: Path) -> None:
    """Keep the annotations of a file, to be looked up by the id of their question."""
    rows = (row for row in annotations.items(file, "annotations") if isinstance(row, dict))
    index.put(ANSWERS, ((str(row["question_id"]), row) for row in rows if "question_id" in row))


def official(
    file: Path,
    split: str,
    index: Index,
    path: Callable[[dict[str, Any]], str],
    listed: Collection[str],
    rule: Rule,
    answered: bool,
) -> Iterator[Entry]:
    """Entries of a questions file of VQA's form, joined by id with what `put_answers` kept.

    Args:
        path: of a question, its picture below the folder of the pictures. May raise Aside.
        listed: the closed list of answers, a set; without it questions have no `scores`.
        answered: whether the split has answers; a question without is then set aside.
    """

    def entry(pair: tuple[Any, Any]) -> Entry:
        row, found = pair
        number = row["question_id"]
        item = {"question": annotations.text(row["question"]), "answers": [], "question_id": number}
        if answered:
            if found is None:
                raise Aside("question without annotation", str(number))
            item |= of_annotation(found)
            if listed:
                item["scores"] = soft_targets(item["answers"], listed, rule)
        name = path(row)
        return Entry(name, [name], item, {"image_id": row["image_id"]}, key=str(number))

    rows = index.joined(ANSWERS, annotations.items(file, "questions"), "question_id")
    return index.parsed(split, rows, entry)


def of_annotation(row: dict[str, Any]) -> dict[str, Any]:
    """Answers and types of an annotation of VQA's form."""
    item = {"answers": [annotations.text(given["answer"]) for given in row["answers"]]}
    for ours, theirs in (("type", "answer_type"), ("question_type", "question_type")):
        if isinstance(row.get(theirs), str):
            item[ours] = row[theirs]
    return item


def scored(
    rows: Iterable[Any], split: str, index: Index, path: Callable[[str], str], answers: bool = True
) -> Iterator[Entry]:
    """Entries of LXMERT's form: {img_id, sent, question_id, label: {answer: score}, answer_type?, question_type?}.

    It has the soft targets and no annotators. Where `put_answers` kept their answers they stand beside; else a single
    answer of full score is the answer, and other questions are scored by the targets.
    """

    def entry(pair: tuple[Any, Any]) -> Entry:
        row, found = pair
        label = row.get("label") or {}
        item = {"question": annotations.text(row["sent"]), "question_id": row["question_id"], "answers": []}
        if answers:
            item["scores"] = {annotations.text(answer): float(score) for answer, score in label.items()}
            if list(label.values()) == [1]:
                item["answers"] = list(label)
        for ours, theirs in (("type", "answer_type"), ("question_type", "question_type")):
            if isinstance(row.get(theirs), str):
                item[ours] = row[theirs]
        if answers and found:
            item |= of_annotation(found)
        name = path(row["img_id"])
        return Entry(name, [name], item, {"image_id": row["img_id"]}, key=str(row["question_id"]))

    return index.parsed(split, index.joined(ANSWERS, rows, "question_id"), entry)


def record(items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The record of a picture with its questions."""
    return fields | {"questions": items}


def check_listed(labels: Any, file: Path) -> list[str]:
    """A list of answers as it is published. Raises BadInput if it is none, or names one twice."""
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels) or not labels:
        raise BadInput(f"{file}: no list of answers. Download it again.")
    if twice := [label for label, n in Counter(labels).items() if n > 1]:
        raise BadInput(f"{file}: {twice[0]!r} stands twice in the list of answers.")
    return labels
