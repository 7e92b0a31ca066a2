"""What a chat template makes of a conversation: its text, and where the answers of the assistant stand in it."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from mmpeft_ds.backbones.common import tower_loading
from mmpeft_ds.data.batch import IMAGE_MARK, MARKS, VIDEO_MARK, Prompted
from mmpeft_ds.errors import BadInput

KINDS = {IMAGE_MARK: "image", VIDEO_MARK: "video"}
NO_MARK = "the chat template writes nothing between an answer and the next question"
ANOTHER = "\ue000\ue001\ue002"  # answers that nobody gives: of three, one is neither the first letter nor the last
# Conversations that templates are tried with: most, and those that mark no turns or whose model reads one question.
TRIAL = Prompted("three?", "four.", (("user", "one?"), ("assistant", "two.")), images=1)
ONE_TURN = Prompted("three?", "four.", images=1)


def _as_it_is(spelling: str, number: int) -> str:
    return spelling


@dataclass(frozen=True)
class Rendering:
    """Renders conversations by a chat template.

    Attributes:
        tokenizer: a fast one, which knows where each token stands in the text.
        template: Jinja source of the chat template.
        tokens: that stand for features of an image, and of a video where it has others, as text.
        mark: what the template writes for an image, in whose place comes the image's spelling.
        system: text of a first system turn for conversations that have none; empty: no such turn.
        video_mark: the same as `mark` for a video; empty where there are none.
        opening: what every conversation begins with, where the template does not write it.
        numbered: the spelling of an image or a video as the one of a number in its text.
        one_turn: why the model reads one question and its answer alone; empty where it reads conversations.
        thinking: answers hold thoughts, and begin where the template asks for such ones; otherwise they begin behind
            what the template writes for none.
    """

    tokenizer: Any
    template: str
    tokens: tuple[str, ...]
    mark: str
    system: str
    video_mark: str = ""
    opening: str = ""
    numbered: Callable[[str, int], str] = _as_it_is
    one_turn: str = ""
    thinking: bool = False

    def _messages(self, text: Prompted) -> list[dict[str, Any]]:
        """Turns as the template takes them: a role and a list of texts and images."""
        turns = [*text.turns, ("user", text.prompt)]
        if self.system and not any(role == "system" for role, _ in turns):
            turns = [("system", self.system), *turns]
        if text.target:
            turns.append(("assistant", text.target))
        first = [{"type": "image"}] * (0 if text.marks() else text.images or 0)
        first += [{"type": "video"}] * (0 if text.marks(VIDEO_MARK) else text.videos)
        messages = []
        for role, content in turns:
            pieces = self._pieces(content)
            if role == "user":
                pieces, first = first + pieces, []
            messages.append({"role": role, "content": pieces})
        return messages

    def _pieces(self, turn: str) -> list[dict[str, str]]:
        """Texts, images and videos of a turn; the line break between a mark and its text is the template's
        business."""
        pieces: list[dict[str, str]] = []
        parts = MARKS.split(turn)
        for i, part in enumerate(parts):
            if i % 2:
                pieces.append({"type": KINDS[part]})
                continue
            if i:
                part = part.removeprefix("\n")
            if i < len(parts) - 1:
                part = part.removesuffix("\n")
            if part:
                pieces.append({"type": "text", "text": part})
        return pieces

    @property
    def _trial(self) -> Prompted:
        return ONE_TURN if self.one_turn or self.unmarked else TRIAL

    @functools.cached_property
    def unmarked(self) -> str:
        """Why conversations of several turns cannot be told apart in what is rendered; empty where they can."""
        if self.one_turn:
            return ""
        answer, question = ANOTHER[:2]
        text = self._render(self._messages(Prompted(question, "", (("user", "one?"), ("assistant", answer)))), None)
        between = text[text.rfind(answer) + 1 : text.rfind(question)]
        return "" if between.strip() else NO_MARK

    def _rendered(
        self, messages: list[dict[str, Any]], spellings: dict[str, tuple[str, ...]] | None
    ) -> tuple[str, list[tuple[int, int]], int]:
        """The conversation as text, (start, end) of each answer of the assistant, and where the last one begins."""
        appended = self._appended(messages, spellings) if self._appends else None
        return appended or self._located(messages, spellings)

    @functools.cached_property
    def _appends(self) -> bool:
        """Whether what the template renders only grows when a turn is added. Those of thinking models leave thoughts
        out of all answers but the last; LLaVA-OneVision's begins an answer otherwise than it asks for one."""
        messages = self._messages(self._trial)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        steps = [self._render(messages[: i + n], None, answer_follows=n == 0) for i in answers for n in (0, 1)]
        if not all(later.startswith(earlier) for earlier, later in itertools.pairwise(steps)):
            return False
        # Nor may anything, such as an empty thought, stand between what asks for an answer and the answer.
        words = (messages[i]["content"][0]["text"] for i in answers)
        begun = zip(steps[::2], steps[1::2], words, strict=True)
        return all(later[len(earlier) :].lstrip().startswith(said) for earlier, later, said in begun)

    def _appended(
        self, messages: list[dict[str, Any]], spellings: dict[str, tuple[str, ...]] | None
    ) -> tuple[str, list[tuple[int, int]], int] | None:
        """As `_rendered`, of a template that appends; None where it does not for this conversation."""
        text, before, spans = "", "", []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:i], spellings, answer_follows=True)
            answered = self._render(messages[: i + 1], spellings)
            if not asked.startswith(before) or not answered.startswith(asked):
                return None
            text += asked[len(before) :]
            answer, rest = self._ended(answered[len(asked) :])
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
            before = answered
        if messages[-1]["role"] != "assistant":
            asked = self._render(messages, spellings, answer_follows=True)
            text += asked[len(before) :]
            return text, spans, len(text)
        return text, spans, spans[-1][0]

    def _located(
        self, messages: list[dict[str, Any]], spellings: dict[str, tuple[str, ...]] | None
    ) -> tuple[str, list[tuple[int, int]], int]:
        """As `_rendered`, of any template that ends answers with the end token: the whole conversation as it renders
        it, where the answers are what changes when another is given. A question ends where its answer would begin,
        with its thoughts if it holds such.

        Raises:
            BadInput: no end token follows an answer, or it holds thoughts that nobody asked for.
        """
        asked = messages[-1]["role"] != "assistant"
        if asked:
            messages = [*messages, {"role": "assistant", "content": self._pieces("a")}]
        text, spans, end = self._render(messages, spellings), [], self.tokenizer.eos_token
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            letter = self._another(messages[i])
            another = {"role": "assistant", "content": self._pieces(letter)}
            other = self._render([*messages[:i], another, *messages[i + 1 :]], spellings)
            start = len(os.path.commonprefix([text, other]))
            after = len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))
            at = text.find(end, len(text) - after)
            if at < 0 or text[len(text) - after : at].strip():
                raise BadInput(
                    "backbone.chat_template: what it renders changes when a turn is added, and no end token "
                    f"{end} follows each answer, so answers cannot be separated from prompts. Give another template."
                )
            if other[start : start + 1] != letter and not self.thinking:
                raise BadInput(
                    f"backbone.thinking: false, but the chat template takes a part of {text[start:at][:60]!r} for "
                    "thoughts before the answer. Set backbone.thinking: true, or leave the thoughts out of the data."
                )
            spans.append((start, at + len(end)))
        begin = spans[-1][0]
        if self.thinking:
            begun = self._render(messages[:-1], spellings, answer_follows=True)
            begin = len(begun) if text.startswith(begun) else begin
            spans[-1] = (begin, spans[-1][1])
        return (text[:begin], spans[:-1], begin) if asked else (text, spans, begin)

    def _another(self, answer: dict[str, Any]) -> str:
        """A letter in place of an answer, which neither end of it has."""
        words = "".join(piece.get("text", "") for piece in answer["content"]).strip()
        return next(letter for letter in ANOTHER if letter not in (words[:1], words[-1:]))

    def _ended(self, answer: str) -> tuple[str, str]:
        """The answer up to its end token, which is appended where the template has none, and what follows it."""
        eos = self.tokenizer.eos_token
        if eos in answer:
            end = answer.index(eos) + len(eos)
            return answer[:end], answer[end:]
        return answer.rstrip() + eos, ""

    def _render(
        self,
        messages: list[dict[str, Any]],
        spellings: dict[str, tuple[str, ...]] | None,
        answer_follows: bool = False,
    ) -> str:
        """What the template writes, with images and videos as they are spelled, or with their marks."""
        # Whole conversations are rendered as transformers does it unasked.
        asked = {"add_generation_prompt": True, "enable_thinking": self.thinking} if answer_follows else {}
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, **asked
            )
        except (TemplateError, TypeError, KeyError) as error:
            reason = tower_loading.first_line(error)
            roles = ", ".join(m["role"] for m in messages)
            raise BadInput(f"backbone.chat_template: cannot render the turns {roles} ({reason}).") from error
        if spellings is None:
            return rendered
        otherwise = {self.mark: self.tokens[0], self.video_mark: self.tokens[-1]}
        spelled = {
            mark: iter([self.numbered(spelling, i) for i, spelling in enumerate(spellings[kind])])
            for mark, kind in ((self.video_mark, "video"), (self.mark, "image"))
        }
        if not rendered.startswith(self.opening):
            rendered = self.opening + rendered
        return self._marks.sub(lambda found: next(spelled[found[0]], otherwise[found[0]]), rendered)

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(mark) for mark in (self.mark, self.video_mark) if mark))


def read_template(name: str, where: str, given: str, tokenizer: Any, otherwise: str) -> str:
    """Source of the chat template: the file `given`, that of the checkpoint, or `otherwise`. Raises BadInput."""
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise BadInput(f"backbone.chat_template: no file {given!r}. Give a Jinja file, or leave it empty.")
        return path.read_text()
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    # Processors of older releases keep it in a file of their own.
    place = tower_loading.locate(name, where)
    for file in ("chat_template.jinja", "chat_template.json"):
        path = tower_loading.find_file(place, file)
        if path:
            text = Path(path).read_text()
            return text if file.endswith("jinja") else json.loads(text)["chat_template"]
    if otherwise:
        return otherwise
    raise BadInput(f"{where}: {name!r} brings no chat template. Give a Jinja file in backbone.chat_template.")
