"""A conversation as tokens, rendered by the chat template of a language model, with labels on the answers alone."""

from __future__ import annotations

import bisect
import dataclasses
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
from mmpeft_ds.backbones.common.texts import TextIds, shares
from mmpeft_ds.data.batch import IMAGE_MARK, MARKS, VIDEO_MARK, Prompted
from mmpeft_ds.errors import BadInput, BadSample

ROLES = ("system", "user", "assistant")
KINDS = {IMAGE_MARK: "image", VIDEO_MARK: "video"}
ANOTHER = "\ue000\ue001\ue002"  # answers that nobody gives: of three, one is neither the first letter nor the last
# Conversation that every template is tried with.
TRIAL = Prompted("three?", "four.", (("user", "one?"), ("assistant", "two.")), images=1)


@dataclass
class Encoded:
    """One conversation in tokens; of the tokens of images and videos each run is one.

    Attributes:
        ids: tokens.
        labels: one per token; -100 on everything but the answers of the assistant.
        prompt_length: tokens before the last answer.
        cut: tokens that were left out of the turns before the last answer so that the rest fits.
        cut_answer: tokens that were left out of the last answer.
        control: control tokens that stood in the turns and are read as plain words.
        media: `image` or `video`, in the order of the text.
    """

    ids: list[int]
    labels: list[int]
    prompt_length: int
    cut: int = 0
    cut_answer: int = 0
    control: int = 0
    media: tuple[str, ...] = ()


def _as_it_is(spelling: str, number: int) -> str:
    return spelling


@dataclass(frozen=True)
class Chat:
    """Renders conversations.

    Attributes:
        tokenizer: a fast one, which knows where each token stands in the text.
        template: Jinja source of the chat template.
        tokens: that stand for features of an image, and of a video where it has others, as text.
        mark: what the template writes for an image, in whose place comes the image's spelling.
        video_mark: the same for a video; empty where there are none.
        system: text of a first system turn for conversations that have none; empty: no such turn.
        opening: what every conversation begins with, where the template does not write it.
        numbered: the spelling of an image or a video as the one of a number in its text.
        max_length: tokens at most, a run of image tokens counted as one. A longer conversation loses its oldest turns,
            then the middle of the last question, then the end of its answer; never an image, nor the header of the
            answer.
    """

    tokenizer: Any
    template: str
    tokens: tuple[str, ...]
    mark: str
    system: str
    max_length: int
    video_mark: str = ""
    opening: str = ""
    numbered: Callable[[str, int], str] = _as_it_is

    def encode(self, text: str | Prompted) -> Encoded:
        """Tokens and labels of one conversation.

        Raises:
            BadInput: where the template cannot render it.
            BadSample: where no word of the last question and answer fits.
        """
        text, control = self._plain(text if isinstance(text, Prompted) else Prompted(text))
        encoded = self._encoded(text)
        spelled = [s for spellings in self._spellings(text).values() for s in spellings]
        wanted = sum(s.count(token) for s in spelled for token in self.tokens)
        got = sum(encoded.ids.count(number) for number in self.ids)
        if got != wanted:
            marks = " or ".join(filter(None, (self.mark, self.video_mark)))
            raise BadInput(
                f"backbone: {len(spelled)} images go with the text {text.prompt[:60]!r}, but it comes to {got} "
                f"placeholders {' or '.join(self.tokens)} in place of {wanted}. Give a backbone.chat_template "
                f"that renders one {marks} for every image or video."
            )
        if len(encoded.ids) > self.max_length:
            encoded = self._shortened(text, encoded)
        encoded.control = control
        return encoded

    def _encoded(self, text: Prompted, ended: bool = True) -> Encoded:
        """Tokens and labels, however many.

        Args:
            ended: the end token of the last answer is a label too.
        """
        rendered, spans, prompt_end = self._rendered(self._messages(text), self._spellings(text))
        if not ended:
            spans[-1] = (spans[-1][0], spans[-1][1] - len(self.tokenizer.eos_token))
        out = self.tokenizer(
            rendered,
            add_special_tokens=not self.begun(rendered),
            return_offsets_mapping=True,
            verbose=False,
        )
        ids, offsets = out["input_ids"], out["offset_mapping"]
        labels, at = [-100] * len(ids), 0
        for i, (start, end) in enumerate(offsets):
            while at < len(spans) and start >= spans[at][1]:
                at += 1
            if at < len(spans) and end > max(start, spans[at][0]):
                labels[i] = ids[i]
        # after the end token of each answer comes a token without label
        self._texts.refuse_control(
            (label for label, after in itertools.pairwise(labels) if after != -100), text.target
        )
        media = tuple(piece["type"] for m in self._messages(text) for piece in m["content"] if piece["type"] != "text")
        return Encoded(ids, labels, sum(1 for start, end in offsets if end <= prompt_end), media=media)

    def _plain(self, text: Prompted) -> tuple[Prompted, int]:
        """The conversation with the control tokens in it broken up, and how many there were. Marks of images and
        videos stay, but in what the assistant says."""

        def plain(role: str, words: str) -> tuple[str, int]:
            pieces = [words] if role == "assistant" else MARKS.split(words)
            pairs = [(piece, 0) if i % 2 else self._texts.plain(piece) for i, piece in enumerate(pieces)]
            return "".join(piece for piece, _ in pairs), sum(number for _, number in pairs)

        prompt, target = plain("user", text.prompt), plain("assistant", text.target)
        turns = [(role, *plain(role, words)) for role, words in text.turns]
        changed = dataclasses.replace(
            text, prompt=prompt[0], target=target[0], turns=tuple((role, words) for role, words, _ in turns)
        )
        return changed, prompt[1] + target[1] + sum(number for _, _, number in turns)

    def _shortened(self, text: Prompted, whole: Encoded) -> Encoded:
        """The conversation in `max_length` tokens. Raises BadSample."""
        pairs = (len(text.turns) - sum(role == "system" for role, _ in text.turns)) // 2
        dropped = bisect.bisect_left(range(pairs), True, key=lambda n: self._fits(_without_oldest(text, n)))
        text = _without_oldest(text, dropped)
        encoded, answer = self._encoded(text), text.target
        for attempt in itertools.count():
            excess = len(encoded.ids) - self.max_length
            if excess <= 0:
                break
            # What is cut may take a token more or less when it is read again.
            text = self._last_turn_cut(text, excess + attempt)
            encoded = self._encoded(text, ended=text.target == answer)
        if text.target != answer:
            encoded.cut_answer = len(self._texts.words([answer])[0].ids) - len(self._texts.words([text.target])[0].ids)
        encoded.cut = len(whole.ids) - len(encoded.ids) - encoded.cut_answer
        return encoded

    def _fits(self, text: Prompted) -> bool:
        return len(self._encoded(text).ids) <= self.max_length

    def _last_turn_cut(self, text: Prompted, excess: int) -> Prompted:
        """The conversation with so many tokens less in its last question and answer. Raises BadSample."""
        parts = MARKS.split(text.prompt)
        marks = [*parts[1::2], ""]
        parts = parts[::2]
        *asked, answered = (len(words.ids) for words in self._texts.words([*parts, text.target]))
        room = sum(asked) + answered - excess
        if room < (2 if answered else 1):
            raise BadSample(
                "length",
                f"template, system text and images leave no room for a question in max_text_length {self.max_length}",
            )
        keep_asked, keep_answered = shares(sum(asked), answered, room)
        for _ in range(sum(asked) - keep_asked):
            asked[asked.index(max(asked))] -= 1
        parts = [self._texts.without_middle(part, keep) for part, keep in zip(parts, asked, strict=True)]
        target = self._texts.without_end(text.target, keep_answered)
        prompt = "".join(part + mark for part, mark in zip(parts, marks, strict=True))
        return dataclasses.replace(text, prompt=prompt, target=target)

    def _spellings(self, text: Prompted) -> dict[str, tuple[str, ...]]:
        """The text that replaces each image and video."""
        number = text.images if text.images is not None else text.marks()
        of_videos = text.video_spellings or self.tokens[-1:] * text.videos
        return {"image": text.spellings or self.tokens[:1] * number, "video": of_videos}

    @functools.cached_property
    def _texts(self) -> TextIds:
        marks = filter(None, (IMAGE_MARK, VIDEO_MARK, self.mark, self.video_mark))
        return TextIds(self.tokenizer, {*self.tokens, *marks})

    @functools.cached_property
    def ids(self) -> list[int]:
        """Token ids of `tokens`."""
        return self.tokenizer.convert_tokens_to_ids(list(self.tokens))

    def rendered(self, text: Prompted) -> str:
        """A conversation up to its last question, as the template writes it, with a mark for every image."""
        messages = self._messages(text)
        if not self._appends:
            return self._located(messages, None)[0]
        return self._render(messages, None, answer_follows=True)

    def begun(self, rendered: str) -> bool:
        """Whether the template has written the first token itself, so that the tokenizer adds none; as transformers
        decides it."""
        return bool(self.tokenizer.bos_token) and rendered.startswith(self.tokenizer.bos_token)

    def check(self) -> None:
        """Render a conversation with an image. Raises BadInput if this template cannot, or leaves no room."""
        try:
            self.encode(TRIAL)
        except BadSample as bad:
            raise BadInput(f"backbone.max_text_length: {bad.detail}. Raise it.") from bad

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

    def _rendered(
        self, messages: list[dict[str, Any]], spellings: dict[str, tuple[str, ...]]
    ) -> tuple[str, list[tuple[int, int]], int]:
        """The conversation as text, (start, end) of each answer of the assistant, and where the last one begins."""
        appended = self._appended(messages, spellings) if self._appends else None
        return appended or self._located(messages, spellings)

    @functools.cached_property
    def _appends(self) -> bool:
        """Whether what the template renders only grows when a turn is added. Those of thinking models leave thoughts
        out of all answers but the last; LLaVA-OneVision's begins an answer otherwise than it asks for one."""
        messages = self._messages(TRIAL)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        steps = [self._render(messages[: i + n], None, answer_follows=n == 0) for i in answers for n in (0, 1)]
        return all(later.startswith(earlier) for earlier, later in itertools.pairwise(steps))

    def _appended(
        self, messages: list[dict[str, Any]], spellings: dict[str, tuple[str, ...]]
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
        it, where the answers are what changes when another is given. A question ends where its answer would begin.

        Raises:
            BadInput: no end token follows an answer.
        """
        asked = messages[-1]["role"] != "assistant"
        if asked:
            messages = [*messages, {"role": "assistant", "content": self._pieces("a")}]
        text, spans, end = self._render(messages, spellings), [], self.tokenizer.eos_token
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            other = self._render([*messages[:i], self._another(messages[i]), *messages[i + 1 :]], spellings)
            start = len(os.path.commonprefix([text, other]))
            after = len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))
            at = text.find(end, len(text) - after)
            if at < 0 or text[len(text) - after : at].strip():
                raise BadInput(
                    "backbone.chat_template: what it renders changes when a turn is added, and no end token "
                    f"{end} follows each answer, so answers cannot be separated from prompts. Give another template."
                )
            spans.append((start, at + len(end)))
        begin = spans[-1][0]
        return (text[:begin], spans[:-1], begin) if asked else (text, spans, begin)

    def _another(self, answer: dict[str, Any]) -> dict[str, Any]:
        """A turn in place of an answer, without a letter in common with either end of it."""
        words = "".join(piece.get("text", "") for piece in answer["content"]).strip()
        letter = next(letter for letter in ANOTHER if letter not in (words[:1], words[-1:]))
        return {"role": "assistant", "content": self._pieces(letter)}

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
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=answer_follows
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


def _without_oldest(text: Prompted, number: int) -> Prompted:
    """The conversation without its first `number` questions and their answers; images that these named come first in
    the question that follows."""
    system = [turn for turn in text.turns if turn[0] == "system"]
    turns = [turn for turn in text.turns if turn[0] != "system"]
    marks = [mark for _, words in turns[: 2 * number] for mark in MARKS.findall(words)]
    turns = [*turns[2 * number :], ("user", text.prompt)]
    turns[0] = (turns[0][0], "".join(f"{mark}\n" for mark in marks) + turns[0][1])
    return dataclasses.replace(text, turns=(*system, *turns[:-1]), prompt=turns[-1][1])


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
