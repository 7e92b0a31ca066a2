"""A conversation as tokens, rendered by the chat template of a language model, with labels on the answers alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from mmpeft_ds.backbones.common import tower_loading
from mmpeft_ds.data.batch import IMAGE_MARK, Prompted
from mmpeft_ds.errors import BadInput

ROLES = ("system", "user", "assistant")


@dataclass
class Encoded:
    """One conversation in tokens; an image is one placeholder.

    Attributes:
        ids: tokens.
        labels: as many; -100 on everything but the answers of the assistant.
        prompt_length: tokens before the last answer.
    """

    ids: list[int]
    labels: list[int]
    prompt_length: int


@dataclass(frozen=True)
class Chat:
    """Renders conversations.

    Attributes:
        tokenizer: a fast one, which knows where each token stands in the text.
        template: Jinja source of the chat template.
        image_token: the placeholder as text.
        system: text of a first system turn for conversations that have none; empty: no such turn.
        max_length: tokens at most, an image counted as one; what is longer is cut at its end.
    """

    tokenizer: Any
    template: str
    image_token: str
    system: str
    max_length: int

    def encode(self, text: str | Prompted) -> Encoded:
        """Tokens and labels of one conversation. Raises BadInput where the template cannot render it."""
        text = text if isinstance(text, Prompted) else Prompted(text)
        rendered, spans, prompt_end = self._rendered(self._messages(text))
        bos = self.tokenizer.bos_token
        out = self.tokenizer(
            rendered,
            add_special_tokens=not (bos and rendered.startswith(bos)),
            return_offsets_mapping=True,
        )
        ids, offsets = out["input_ids"], out["offset_mapping"]
        labels, at = [-100] * len(ids), 0
        for i, (start, end) in enumerate(offsets):
            while at < len(spans) and start >= spans[at][1]:
                at += 1
            if at < len(spans) and end > max(start, spans[at][0]):
                labels[i] = ids[i]
        prompt_length = sum(1 for start, end in offsets if end <= prompt_end)
        encoded = Encoded(ids[: self.max_length], labels[: self.max_length], min(prompt_length, self.max_length))
        wanted, got = text.images if text.images is not None else text.marks, out["input_ids"].count(self.image_id)
        if got != wanted:
            raise BadInput(
                f"backbone: {wanted} images go with the text {text.prompt[:60]!r}, but it comes to {got} placeholders "
                f"{self.image_token}. Give a backbone.chat_template that renders one for every image."
            )
        return encoded

    @property
    def image_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    def check(self) -> None:
        """Render a conversation with an image. Raises BadInput if this template cannot."""
        turns = (("user", "one?"), ("assistant", "two."))
        self.encode(Prompted("three?", "four.", turns, images=1))

    def _messages(self, text: Prompted) -> list[dict[str, Any]]:
        """Turns as the template takes them: a role and a list of texts and images."""
        turns = [*text.turns, ("user", text.prompt)]
        if self.system and not any(role == "system" for role, _ in turns):
            turns = [("system", self.system), *turns]
        if text.target:
            turns.append(("assistant", text.target))
        first = text.images or 0 if not text.marks else 0
        messages = []
        for role, content in turns:
            pieces = self._pieces(content)
            if role == "user" and first:
                pieces, first = [{"type": "image"}] * first + pieces, 0
            messages.append({"role": role, "content": pieces})
        return messages

    def _pieces(self, turn: str) -> list[dict[str, str]]:
        """Texts and images of a turn; the line break between a mark and its text is the template's business."""
        pieces: list[dict[str, str]] = []
        for i, part in enumerate(turn.split(IMAGE_MARK)):
            if i:
                pieces.append({"type": "image"})
                part = part.removeprefix("\n")
            if i < turn.count(IMAGE_MARK):
                part = part.removesuffix("\n")
            part = part.replace(self.image_token, "")  # a placeholder typed into the text is no image
            if part:
                pieces.append({"type": "text", "text": part})
        return pieces

    def _rendered(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]], int]:
        """The conversation as text, (start, end) of each answer of the assistant, and where the last one begins."""
        text, before, spans = "", "", []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:i], answer_follows=True)
            answered = self._render(messages[: i + 1])
            if not asked.startswith(before) or not answered.startswith(asked):
                raise BadInput(
                    "backbone.chat_template: what it renders changes when a turn is added, so answers cannot be "
                    "separated from prompts. Give another template."
                )
            text += asked[len(before) :]
            answer, rest = self._ended(answered[len(asked) :])
            spans.append((len(text), len(text) + len(answer)))
            text += answer + rest
            before = answered
        if messages[-1]["role"] != "assistant":
            asked = self._render(messages, answer_follows=True)
            text += asked[len(before) :]
            return text, spans, len(text)
        return text, spans, spans[-1][0]

    def _ended(self, answer: str) -> tuple[str, str]:
        """The answer up to its end token, which is appended where the template has none, and what follows it."""
        eos = self.tokenizer.eos_token
        if eos in answer:
            end = answer.index(eos) + len(eos)
            return answer[:end], answer[end:]
        return answer.rstrip() + eos, ""

    def _render(self, messages: list[dict[str, Any]], answer_follows: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=answer_follows
            )
        except (TemplateError, TypeError, KeyError) as error:
            reason = tower_loading.first_line(error)
            roles = ", ".join(m["role"] for m in messages)
            raise BadInput(f"backbone.chat_template: cannot render the turns {roles} ({reason}).") from error


def read_template(name: str, where: str, given: str, tokenizer: Any) -> str:
    """Source of the chat template: the file `given`, or that of the checkpoint `name`. Raises BadInput."""
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
    raise BadInput(f"{where}: {name!r} brings no chat template. Give a Jinja file in backbone.chat_template.")
