"""Conversations about pictures, in the forms that tuning data come in. One record is one sample; text alone is fine.

`--form llava`     a JSON list of {id, image?, conversations: [{from: human or gpt, value}]}
`--form sharegpt`  the same with `images`
`--form messages`  {messages: [{role: system, user or assistant, content}], images?}
`--form qwen-vl`   {id, conversations: [{from: user or assistant, value}]} with `<img>path</img>` in the text
JSON lists and JSON lines are both read, and a `system` text beside the turns in every form. Pictures are paths below
the root or --pictures; no address is fetched. A record without any that has some under another key is set aside.
`video` and `videos` are files of videos, of which --frames frames each are stored with their times; `<video>` stands
for one in the text. For the single `image` of a record LLaVA's rule holds: `<image>` goes to the front of its turn,
with a line break. In lists, and in the other forms, the n-th `<image>` is the n-th picture, where it stands. Source of
the facts: specs/datasets.md 16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.sources.common import annotations
from data_prep.sources.common.entry import Aside, Entry
from data_prep.sources.common.index import Index
from data_prep.sources.common.layout import LayoutSource, still_there
from data_prep.sources.common.unknown_keys import lost_medium
from data_prep.sources.common.videos import VideoOptions, check_options, with_videos
from mmpeft_ds.data import video_files
from mmpeft_ds.data.writer import RawSample

TOKEN, FILM = "<image>", "<video>"
SPLITS = ("train", "val", "test")
NAMES = {"train": ("llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json")}
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
READ = frozenset(("id", "image", "images", "video", "videos", "system", "conversations", "messages"))  # keys
READ_OF_TURN = frozenset(("from", "value", "role", "content"))
_IMG = re.compile(r"<img>\s*(.*?)\s*</img>", re.DOTALL)
Turns = list[tuple[str, str]]


@dataclass
class Options(VideoOptions):
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

    def __init__(self, options: Any):
        super().__init__(options)
        check_options(options)

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
            videos = _files(row, ("videos", "video"), name)
            if not (pictures or videos):
                self._check_unread(row, name)
            turns = _checked(_with_system(row, turns), name)
            _check_named(turns, pictures, TOKEN, "picture", name)
            _check_named(turns, videos, FILM, "video", name)
            if self.options.form == "llava" and isinstance(row.get("image"), str):
                turns = [(role, _first(text)) for role, text in turns]
            fields: dict[str, Any] = {"conversations": [{"from": role, "value": text} for role, text in turns]}
            if "id" in row:
                fields["conversation_id"] = row["id"]  # a label: it is not unique in published mixtures
            if videos:
                fields["videos"] = len(videos)
            return Entry(name, [*pictures, *videos], None, fields)

        return entry

    def _check_unread(self, row: dict[str, Any], name: str) -> None:
        """Raise Aside where a record without pictures has some under a key that nothing reads."""
        turns = row["messages" if self.options.form == "messages" else "conversations"]
        for found, read in ((row, READ), *((turn, READ_OF_TURN) for turn in turns)):
            if reason := lost_medium(found, read, [self.pictures_root]):
                raise Aside(reason, name)

    def problem(self, path: str | Path) -> str:
        return video_files.problem(Path(path)) if video_files.is_video(Path(path)) else super().problem(path)

    def record(self, items: list[Any], fields: dict[str, Any]) -> dict[str, Any]:
        return fields

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        for name, files, _, fields in self._of().samples(split, start):
            number = fields.pop("videos", 0)
            pictures, videos = files[: len(files) - number], files[len(files) - number :]
            paths = (Path(self.locate(video)) for video in videos)
            with still_there():
                images = [image for file in pictures for image in self.read(self.locate(file))]
                frames = [video_files.sample(path, self.options.frames, self.options.quality) for path in paths]
            yield with_videos(RawSample(name, images, fields), frames)


def _llava(row: dict[str, Any], name: str) -> tuple[Turns, list[str]]:
    """Turns and pictures of LLaVA's and ShareGPT's forms."""
    turns = [(str(turn["from"]), annotations.text(turn["value"])) for turn in row["conversations"]]
    return turns, _pictures(row, name)


def _messages(row: dict[str, Any], name: str) -> tuple[Turns, list[str]]:
    if any(isinstance(turn["content"], list) for turn in row["messages"]):
        raise Aside(f"content in parts, where this form has one text with {TOKEN} in it", name)
    turns = [(str(turn["role"]), annotations.text(turn["content"])) for turn in row["messages"]]
    return turns, _pictures(row, name)


def _qwen_vl(row: dict[str, Any], name: str) -> tuple[Turns, list[str]]:
    """Pictures stand in the text; boxes and references stay there as they are."""
    turns, pictures = [], []
    for turn in row["conversations"]:
        text = annotations.text(turn["value"])
        pictures += _IMG.findall(text)
        turns.append((str(turn["from"]), _IMG.sub(TOKEN, text)))
    if not pictures and (row.get("image") or row.get("images")):
        raise Aside("picture under a key, where the form qwen-vl names it in the text", name)
    return turns, _paths(pictures, name)


def _pictures(row: dict[str, Any], name: str) -> list[str]:
    for kind in ("audio", "audios"):
        if row.get(kind):
            raise Aside(f"{kind} are not read here", name)
    return _files(row, ("images", "image"), name)


def _files(row: dict[str, Any], keys: tuple[str, str], name: str) -> list[str]:
    given = [row[key] for key in keys if row.get(key)]
    if len(given) > 1:
        raise Aside(f"both {keys[0]} and {keys[1]}", name)
    value = given[0] if given else []
    return _paths(value if isinstance(value, list) else [value], name)


def _paths(files: list[Any], name: str) -> list[str]:
    for path in files:
        if "://" in annotations.text(path):
            raise Aside("picture is an address, none is fetched", name)
    return files


def _with_system(row: dict[str, Any], turns: Turns) -> Turns:
    """Turns behind the system text that a record has beside them, in whatever form."""
    system = ("system", annotations.text(row["system"])) if row.get("system") else None
    return turns if system is None or turns[:1] == [system] else [system, *turns]


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
        if role == "gpt" and (TOKEN in text or FILM in text):
            raise Aside(f"{TOKEN if TOKEN in text else FILM} in a turn of the assistant", name)
    return system + rest


def _check_named(turns: Turns, files: list[str], token: str, kind: str, name: str) -> None:
    named = sum(text.count(token) for _, text in turns)
    if files and not named:
        raise Aside(f"{kind} without {token}", name)
    if named != len(files):
        raise Aside(f"number of {token} is not that of the {kind}s", name)


def _first(text: str) -> str:
    """A turn with its mark in front."""
    if TOKEN not in text:
        return text
    return f"{TOKEN}\n{text.replace(TOKEN, '').strip()}".strip()


ENTRY = Conversations
