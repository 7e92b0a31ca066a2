"""Conversations about pictures, in the forms that tuning data come in. One record is one sample; text alone is fine.

`--form llava`     a JSON list of {id, image?, conversations: [{from: human or gpt, value}]}
`--form sharegpt`  the same with `images` and an optional `system`
`--form messages`  {messages: [{role: system, user or assistant, content}], images?}
`--form qwen-vl`   {id, conversations: [{from: user or assistant, value}]} with `<img>path</img>` in the text
JSON lists and JSON lines are both read. Pictures are paths below the root or --pictures; no address is fetched. For
the single `image` of a record LLaVA's rule holds: `<image>` goes to the front of its turn, with a line break. In
lists, and in the other forms, the n-th `<image>` is the n-th picture, where it stands. Source of the facts:
specs/datasets.md 16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.common import annotations
from data_prep.sources.common.index import Aside, Entry, Index
from data_prep.sources.common.layout import LayoutOptions, LayoutSource

TOKEN = "<image>"
SPLITS = ("train", "val", "test")
NAMES = {"train": ("llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json")}
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_IMG = re.compile(r"<img>(.*?)</img>", re.DOTALL)
Turns = list[tuple[str, str]]


@dataclass
class Options(LayoutOptions):
    """Options of the source.

    Attributes:
        form: whose form the files have.
        train: files of the training split, relative to the root (default: train.json, train.jsonl, or LLaVA's names).
        val: files of the validation split (default: val.json or val.jsonl).
        test: files of the test split (default: test.json or test.jsonl).
    """

    form: Literal["llava", "sharegpt", "messages", "qwen-vl"] = "llava"
    train: list[Path] = field(default_factory=list)
    val: list[Path] = field(default_factory=list)
    test: list[Path] = field(default_factory=list)


class Conversations(LayoutSource):
    Options = Options
    title = "a set of conversations"
    origin = "its authors, or your own export"
    layout = "train.json or train.jsonl (or --train FILE ...), and the pictures at the paths that its records name"
    licence = "unknown"

    def files(self) -> dict[str, list[str]]:
        files = {}
        for split in SPLITS:
            given = [str(path) for path in getattr(self.options, split)]
            usual = (f"{split}.json", f"{split}.jsonl", *NAMES.get(split, ()))
            files[split] = given or [self.first_there(*usual)]
        return files

    def entries(self, split: str, index: Index) -> Iterator[Entry]:
        for name in self.files()[split]:
            file = self.root / name
            rows = enumerate(annotations.records(file))
            yield from index.parsed(split, rows, self._parser(Path(name).name))

    def _parser(self, file: str) -> Callable[[tuple[int, Any]], Entry]:
        read = {"messages": _messages, "qwen-vl": _qwen_vl}.get(self.options.form, _llava)

        def entry(numbered: tuple[int, Any]) -> Entry:
            number, row = numbered
            name = f"{file} record {number}"
            turns, pictures = read(row, name)
            turns = _checked(turns, name)
            _check_pictures(turns, pictures, name)
            if self.options.form == "llava" and isinstance(row.get("image"), str):
                turns = [(role, _first(text)) for role, text in turns]
            fields: dict[str, Any] = {"conversations": [{"from": role, "value": text} for role, text in turns]}
            if "id" in row:
                fields["conversation_id"] = row["id"]  # a label: it is not unique in published mixtures
            return Entry(name, pictures, None, fields)

        return entry

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return fields


def _llava(row: dict[str, Any], name: str) -> tuple[Turns, list[str]]:
    """Turns and pictures of LLaVA's and ShareGPT's forms."""
    turns = [(str(turn["from"]), annotations.text(turn["value"])) for turn in row["conversations"]]
    if row.get("system"):
        turns.insert(0, ("system", annotations.text(row["system"])))
    return turns, _pictures(row, name)


def _messages(row: dict[str, Any], name: str) -> tuple[Turns, list[str]]:
    turns = [(str(turn["role"]), annotations.text(turn["content"])) for turn in row["messages"]]
    return turns, _pictures(row, name)


def _qwen_vl(row: dict[str, Any], name: str) -> tuple[Turns, list[str]]:
    """Pictures stand in the text; boxes and references stay there as they are."""
    turns, pictures = [], []
    for turn in row["conversations"]:
        text = annotations.text(turn["value"])
        pictures += _IMG.findall(text)
        turns.append((str(turn["from"]), _IMG.sub(TOKEN, text)))
    return turns, _paths(pictures, name)


def _pictures(row: dict[str, Any], name: str) -> list[str]:
    for kind in ("video", "videos", "audio", "audios"):
        if row.get(kind):
            raise Aside(f"{kind} are not read here", name)
    found = row.get("images", row.get("image")) or []
    return _paths(found if isinstance(found, list) else [found], name)


def _paths(pictures: list[Any], name: str) -> list[str]:
    for path in pictures:
        if "://" in annotations.text(path):
            raise Aside("picture is an address, none is fetched", name)
    return pictures


def _checked(turns: Turns, name: str) -> Turns:
    """Turns as human, gpt, human, ..., after a system turn if there is one; a last question may have no answer, which
    the task leaves out. Raises Aside."""
    roles = {role for role, _ in turns}
    if unknown := sorted(roles - ROLES.keys()):
        raise Aside(f"turn of the role {unknown[0]}", name)
    turns = [(ROLES[role], text) for role, text in turns]
    system = turns[:1] if turns and turns[0][0] == "system" else []
    rest = turns[len(system) :]
    if rest and rest[0][0] == "gpt":
        rest = rest[1:]  # as the published reader does
    if not any(role == "gpt" for role, _ in rest):
        raise Aside("no turn of the assistant", name)
    if any(role != ("human", "gpt")[i % 2] for i, (role, _) in enumerate(rest)):
        raise Aside("roles do not alternate", name)
    for role, text in rest:
        if role == "gpt" and not text.strip():
            raise Aside("an answer is empty", name)
        if role == "gpt" and TOKEN in text:
            raise Aside(f"{TOKEN} in a turn of the assistant", name)
    return system + rest


def _check_pictures(turns: Turns, pictures: list[str], name: str) -> None:
    named = sum(text.count(TOKEN) for _, text in turns)
    if pictures and not named:
        raise Aside(f"picture without {TOKEN}", name)
    if named != len(pictures):
        raise Aside(f"number of {TOKEN} is not that of the pictures", name)


def _first(text: str) -> str:
    """A turn with its mark in front."""
    if TOKEN not in text:
        return text
    return f"{TOKEN}\n{text.replace(TOKEN, '').strip()}".strip()


ENTRY = Conversations
