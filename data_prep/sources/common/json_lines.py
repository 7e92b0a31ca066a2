"""Fields of a line of the source `jsonl` in the one form of the shards.

What is wrong raises ValueError, in words that say what is expected.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from mmpeft_ds.data.parsing import check_questions, json_object
from mmpeft_ds.errors import BadSample


def captions_of(found: dict[str, Any]) -> list[str]:
    captions = found.get("captions", found.get("caption"))
    captions = [captions] if isinstance(captions, str) else captions
    if not (isinstance(captions, list) and captions and all(isinstance(c, str) and c.strip() for c in captions)):
        raise ValueError("'caption' must be a text, 'captions' a list of texts, none of them empty")
    return captions


def questions_of(
    line: dict[str, Any], strict: bool = False, extra: Callable[[dict], dict] = lambda one: {}
) -> list[dict[str, Any]]:
    """Questions in the one form of the shards; wrong ones raise ValueError if `strict`, else are left out.

    Args:
        extra: what is to be kept of an entry of `questions` that no task reads.
    """
    asked = line.get("questions")
    if asked is None:
        asked = [line] if "question" in line else []
    elif isinstance(asked, list) and asked and all(isinstance(q, str) for q in asked):
        answers = line.get("answers")
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
            more = extra(one) if one is not line else {}
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
    if (name := type_key(one)) is not None:
        read["type"] = one[name]
    if "weight" in one:
        weight = read["weight"] = one["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(
                f"'weight' {str(weight)[:40]!r} of question {text[:40]!r} is no number from 0 on. It is a factor of "
                "the question's loss; call it otherwise if it is not meant so"
            )
    return read


def type_key(one: dict[str, Any]) -> str | None:
    """The key that says of what type a question is; the last two are VQAv2's."""
    return next((name for name in ("type", "answer_type", "question_type") if name in one), None)


def extra_keys(record: dict[str, Any]) -> Iterator[str]:
    """Names of what is kept of a record without being read."""
    yield from record.get("extra", {})
    for name in ("questions", "conversations"):
        for item in record.get(name, []):
            yield from (f"{name}[].{key}" for key in item.get("extra", {}))


def conversations_of(turns: Any, there: dict[str, int], extra: Callable[[dict], dict]) -> list[dict[str, Any]]:
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
    for mark, number in there.items():
        named = sum(turn["value"].count(mark) for turn in turns)
        if named not in (0, number):
            raise ValueError(f"'conversations' name {mark} {named} times but the line has {number} {mark[1:-1]}s")
    read = []
    for turn in turns:
        more = extra(turn)
        read.append({"from": turn["from"], "value": turn["value"], **({"extra": more} if more else {})})
    return read


def check_storable(record: dict[str, Any]) -> None:
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


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"has the key {twice!r} twice")
    return parsed


def no_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is no JSON")
