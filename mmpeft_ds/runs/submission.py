"""Result files in the form that evaluation servers and official scripts take, from the rows of an evaluation.

Each form wants an answer for every item of the split, once. Items whose picture could not be read get an empty answer,
and how many is said. Source of the forms: specs/datasets.md 2.5, 4, 5, 6.1, 10, 11.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmpeft_ds.errors import BadInput

# Reasons to set records aside that no server asks about: repetitions, and annotations of no question.
ASKED_FOR_NOTHING = {"id given before", "listed before", "annotation given before", "annotation without a question"}


@dataclass(frozen=True)
class Form:
    """A form of result file.

    Attributes:
        id_key, answer_key: names in the file; for `csv` lines there are none.
        of: `questions` or `captions`: what an item is.
        text_id: the id must be a text.
        capital: answers begin with a capital (NLVR2's True and False).
        csv: lines `id,answer` without header, in place of a JSON list.
    """

    id_key: str
    answer_key: str
    of: str = "questions"
    text_id: bool = False
    capital: bool = False
    csv: bool = False


FORMS = {
    "vqa": Form("question_id", "answer"),
    "gqa": Form("questionId", "prediction", text_id=True),
    "nlvr2": Form("", "", text_id=True, capital=True, csv=True),
    "vizwiz": Form("image", "answer", text_id=True),
    "coco": Form("image_id", "caption", of="captions"),
}
_TITLES = {
    "vqa": "VQAv2 and OK-VQA: a list of {question_id, answer}",
    "gqa": "GQA: a list of {questionId, prediction}",
    "nlvr2": "NLVR2: lines identifier,True or identifier,False",
    "vizwiz": "VizWiz-VQA: a list of {image, answer}",
    "coco": "COCO, Flickr30k, VizWiz and TextCaps captions: a list of {image_id, caption}",
}
HELP = "; ".join(f"{name} ({title})" for name, title in _TITLES.items())


def file_name(form: str, split: str) -> str:
    """Name of the result file below the run directory."""
    return f"submission-{split}-{form}.{'csv' if FORMS[form].csv else 'json'}"


def content(form: str, rows: Sequence[dict[str, Any]], records: Iterable[dict[str, Any]]) -> tuple[str, int]:
    """(text of a result file, number of items without a prediction, which get an empty one).

    Args:
        form: a name of FORMS.
        rows: of an evaluation: `prediction`, and `question_id` or `image_id`.
        records: json of every sample of the split; they say which items there are, and in which order.

    Raises:
        BadInput: rows of another task; an item without id, or two with one id.
    """
    kind = FORMS[form]
    key = "question_id" if kind.of == "questions" else "image_id"
    wanted = list(_ids(kind, key, records))
    if twice := [name for name, number in Counter(map(str, wanted)).items() if number > 1]:
        raise BadInput(
            f"--submission {form}: {len(twice)} {key}s stand twice in the split, first {twice[0]}. The server takes "
            "one answer each; prepare the split again from the publishers' files."
        )
    if foreign := next((row for row in rows if key not in row), None):
        raise BadInput(
            f"--submission {form}: takes predictions for {kind.of}, and {foreign.get('sample_id')} has no {key}. Use "
            f"a form that fits the task, one of {', '.join(FORMS)}, or prepare the data from the publishers' files."
        )
    said = {str(row[key]): str(row["prediction"]) for row in rows}
    missing = sum(str(name) not in said for name in wanted)
    answers = [(str(name) if kind.text_id else name, said.get(str(name), "")) for name in wanted]
    if kind.capital:
        # on one line, whatever a generative model has answered
        answers = [(name, " ".join(answer.split()).capitalize()) for name, answer in answers]
    if kind.csv:
        return "".join(f"{name},{answer}\n" for name, answer in answers), missing
    listed = [{kind.id_key: name, kind.answer_key: answer} for name, answer in answers]
    return json.dumps(listed, ensure_ascii=False) + "\n", missing


def not_listed(account: dict[str, Any]) -> str:
    """Items that a result file lacks because preparation set them aside, as words that follow its name; empty for
    none.

    Args:
        account: of the split, in the manifest of the data set.
    """
    aside = {why: told for why, told in account.get("aside", {}).items() if why not in ASKED_FOR_NOTHING}
    number = sum(count for count, _ in aside.values())
    if not number:
        return ""
    return (
        f"; {number:,} records that preparation set aside ({', '.join(aside)}) are not in it, and a server that wants "
        "an answer for each refuses it: mend the download and prepare the split again"
    )


def _ids(kind: Form, key: str, records: Iterable[dict[str, Any]]) -> Iterator[Any]:
    for record in records:
        for item in record.get("questions", []) if kind.of == "questions" else [record]:
            if key not in item:
                raise BadInput(
                    f"--submission: {record.get('source_name')} has no {key}, which the result file is keyed by. "
                    "Prepare the data from the publishers' files."
                )
            yield item[key]
