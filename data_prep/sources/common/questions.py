"""Questions with the answers of annotators, in the forms that VQA data sets share.

A sample is a picture with all its `questions`: {question, answers, question_id, type, question_type, scores}. `scores`
are the soft targets over the list of answers, as specs/datasets.md 2.3 gives them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.common import annotations
from data_prep.sources.common.entry import WRONG_FORM, Aside, Entry
from data_prep.sources.common.index import Index
from mmpeft_ds.errors import BadInput
from mmpeft_ds.metrics.vqa import normalize_answer, soft_score

Rule = Literal["official", "normalised"]
# Kinds of lookup: annotations by the id of their question; main answers by question and answer.
ANSWERS, MAIN = "answers", "main answers"
NO_ANSWER = "question without an answer"
BOTH = "of both"
REPEATED, UNASKED = "annotation given before", "annotation without a question"


def answer_list(index: Index, files: Iterable[Path], at_least: int) -> list[str]:
    """The closed list of answers by the published rule: the main answers of all questions, normalised, that stand for
    at least so many different questions; the most frequent first, equals in alphabetic order.

    Args:
        files: annotation files of training and validation; with VQAv2's and 9 the list has 3,129 entries, among them
            the empty one.
    """

    def mains(rows: Iterable[Any]) -> Iterator[tuple[str, str]]:
        for row in rows:
            with contextlib.suppress(*WRONG_FORM):
                answer = normalize_answer(annotations.text(row["multiple_choice_answer"])).replace(",", "")
                yield f"{row['question_id']} {answer}", answer

    for file in files:
        index.put(MAIN, mains(annotations.items(file, "annotations")))
    return most_frequent(index.tally(MAIN), at_least)


def given_answers(
    index: Index,
    rows: Iterable[Any],
    of_row: Callable[[Any], Iterable[Any]],
    key: Callable[[Any], Any] = lambda row: None,
    at_least: int = 1,
) -> list[str]:
    """Answers that stand in the rows so often, the most frequent first, equals in alphabetic order.

    Args:
        of_row: the answers of a row. Empty ones do not count, nor rows of another form: they are set aside when the
            split is read.
        key: id of a row; a second row with it is set aside too, and does not count. None: it has none.
    """

    def usable() -> Iterator[tuple[str | None, list[str]]]:
        for row in rows:
            with contextlib.suppress(*WRONG_FORM):
                if answers := [text for answer in of_row(row) if (text := annotations.text(answer)).strip()]:
                    yield None if (number := key(row)) is None else str(number), answers

    counts: Counter[str] = Counter()
    for answers in index.first_of_each("rows of a list", usable()):
        counts.update(answers)
    return most_frequent(counts, at_least)


def most_frequent(counts: Mapping[str, int], at_least: int = 1) -> list[str]:
    """Answers that stand so often, the most frequent first, equals in alphabetic order."""
    return sorted((a for a, n in counts.items() if n >= at_least), key=lambda answer: (-counts[answer], answer))


def soft_targets(answers: list[str], listed: Collection[str], rule: Rule) -> dict[str, float]:
    """Answer of the list -> score by how many annotators gave it, in the order in which they first did.

    Args:
        rule: `official`: answers as they were written, although the list is normalised, as published targets have it;
            `normalised`: after normalisation.
    """
    counts = Counter(normalize_answer(a).replace(",", "") if rule == "normalised" else a for a in answers)
    return {answer: round(soft_score(n, len(answers)), 6) for answer, n in counts.items() if answer in listed}


def put_answers(index: Index, file: Path, half: str, split: str) -> None:
    """Keep the annotations of a file, to be looked up by the id of their question; of two the last counts, as in the
    official tools.

    Args:
        half: what `official` calls the file; BOTH for `scored`, which takes those of all files.
        split: whose report names annotations that are repeated, or of another form; empty for none.
    """

    def annotation(row: Any) -> list[tuple[str, Any]]:
        return [(str(annotations.identifier(row["question_id"])), row)]

    rows = annotations.items(file, "annotations")
    index.put_once(f"{ANSWERS} {half}", split, rows, annotation, "annotation", REPEATED)


def official(
    file: Path,
    half: str,
    split: str,
    index: Index,
    path: Callable[[dict[str, Any]], str],
    listed: Collection[str],
    rule: Rule,
    answered: bool,
    first: bool,
) -> Iterator[Entry]:
    """Entries of a questions file of VQA's form, joined by id with what `put_answers` kept.

    Args:
        half: of `put_answers`.
        path: of a question, its picture below the folder of the pictures. May raise Aside.
        listed: the closed list of answers, a set; without it questions have no `scores`.
        answered: whether the split has answers; a question without is then set aside.
        first: whether no other split is made of the same files; annotations of no question are reported there.
    """

    def entry(pair: tuple[Any, Any]) -> Entry:
        row, found = pair
        name = path(row)
        number = annotations.identifier(row["question_id"])
        item = {"question": annotations.text(row["question"]), "answers": [], "question_id": number}
        if answered:
            if found is None:
                raise Aside("question without annotation", str(number))
            if str(found.get("image_id", row["image_id"])) != str(row["image_id"]):
                raise Aside("annotation of another picture", str(number))
            item |= of_annotation(found, str(number))
            if listed:
                item["scores"] = soft_targets(item["answers"], listed, rule)
        return Entry(name, [name], item, {"image_id": row["image_id"]}, key=str(number))

    kind = f"{ANSWERS} {half}"
    rows = index.joined(kind, annotations.items(file, "questions"), "question_id", mark=first)
    yield from index.parsed(split, rows, entry)
    for number in index.unmet(kind) if first else ():
        index.set_aside(split, UNASKED, number)


def answers_of(row: dict[str, Any]) -> list[Any]:
    """The answers of all annotators in an annotation of VQA's form."""
    return [given["answer"] for given in row["answers"]]


def of_annotation(row: dict[str, Any], name: str) -> dict[str, Any]:
    """Answers and types of an annotation of VQA's form. Raises Aside, under the question's name, for none."""
    item: dict[str, Any] = {"answers": answered(answers_of(row), name)}
    return item | types_of(row, type="answer_type", question_type="question_type")


def answered(answers: list[Any], name: str) -> list[str]:
    """Answers as they are. Raises Aside, under the question's name, if there is none but empty ones."""
    if not any(annotations.text(answer).strip() for answer in answers):
        raise Aside(NO_ANSWER, name)
    return [annotations.text(answer) for answer in answers]


def types_of(row: dict[str, Any], **keys: str) -> dict[str, str]:
    """Types of a question, our name = the key of the row that has it; left out where it holds no text."""
    return {ours: row[theirs] for ours, theirs in keys.items() if isinstance(row.get(theirs), str) and row[theirs]}


def scored(
    rows: Iterable[Any], split: str, index: Index, path: Callable[[str], str], answers: bool = True
) -> Iterator[Entry]:
    """Entries of LXMERT's form: {img_id, sent, question_id, label: {answer: score}, answer_type?, question_type?}.

    It has the soft targets and no annotators. Where `put_answers` kept their answers they stand beside; else a single
    answer of full score is the answer, and other questions are scored by the targets.
    """

    def entry(pair: tuple[Any, Any]) -> Entry:
        row, found = pair
        label, number = row.get("label") or {}, annotations.identifier(row["question_id"])
        item = {"question": annotations.text(row["sent"]), "question_id": number, "answers": []}
        if answers:
            item["scores"] = {annotations.text(answer): float(score) for answer, score in label.items()}
            if not all(0 <= score <= 1 for score in item["scores"].values()):
                raise Aside("score that is not from 0 to 1", str(number))
            if list(label.values()) == [1]:
                item["answers"] = list(label)
        item |= types_of(row, type="answer_type", question_type="question_type")
        if answers and found and answers_of(found):
            item |= of_annotation(found, str(number))
        name = path(row["img_id"])
        return Entry(name, [name], item, {"image_id": row["img_id"]}, key=str(number))

    return index.parsed(split, index.joined(f"{ANSWERS} {BOTH}", rows, "question_id"), entry)


def record(items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The record of a picture with its questions."""
    return fields | {"questions": items}


def check_listed(labels: Any, file: Path) -> list[str]:
    """A list of answers as it is published, or a mapping of answers to their places in it.

    Raises BadInput if it is none, or names one twice.
    """
    if isinstance(labels, dict) and sorted(map(str, labels.values())) == sorted(map(str, range(len(labels)))):
        labels = sorted(labels, key=lambda answer: int(labels[answer]))
    try:
        listed = [annotations.text(label) for label in labels] if isinstance(labels, list) else []
    except ValueError as error:
        raise BadInput(f"{file}: {error}. Download it again.") from error
    if not listed:
        raise BadInput(f"{file}: no list of answers. Download it again.")
    if twice := [label for label, n in Counter(labels).items() if n > 1]:
        raise BadInput(f"{file}: {twice[0]!r} stands twice in the list of answers.")
    return listed
