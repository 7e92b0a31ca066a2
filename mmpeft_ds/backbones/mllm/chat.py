"""A conversation as tokens, rendered by the chat template of a language model, with labels on the answers alone."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from dataclasses import dataclass

from mmpeft_ds.backbones.common.texts import TextIds, shares
from mmpeft_ds.backbones.mllm.rendering import Rendering
from mmpeft_ds.data.batch import IMAGE_MARK, MARKS, VIDEO_MARK, Prompted
from mmpeft_ds.errors import BadInput, BadSample

ROLES = ("system", "user", "assistant")


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


@dataclass(frozen=True)
class Chat(Rendering):
    """Conversations in tokens.

    Attributes:
        max_length: tokens at most, a run of image tokens counted as one. A longer conversation loses its oldest turns,
            then the middle of the last question, then the end of its answer; never an image, nor the header of the
            answer.
    """

    max_length: int = 1024

    def encode(self, text: str | Prompted) -> Encoded:
        """Tokens and labels of one conversation.

        Raises:
            BadInput: where the template cannot render it.
            BadSample: where no word of the last question and answer fits.
        """
        text, control = self._plain(text if isinstance(text, Prompted) else Prompted(text))
        self._refuse_turns(text)
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

    def _refuse_turns(self, text: Prompted) -> None:
        """Raise BadInput for turns before the question that the model does not read, or the template does not mark."""
        asked = any(role == "user" for role, _ in text.turns)
        if (text.turns or self.system) and self.one_turn:
            what, mend = ("earlier turns" if asked else "a system text"), "another model"
        elif asked and self.unmarked:
            what, mend = "earlier turns", "a backbone.chat_template that marks turns"
        else:
            return
        raise BadInput(
            f"backbone: {what} before the question {text.prompt[:40]!r}, but {self.one_turn or self.unmarked}. "
            f"Prepare data with one question and one answer each and leave backbone.system empty, or take {mend}."
        )

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
        return self._rendered(self._messages(text), None)[0]

    def begun(self, rendered: str) -> bool:
        """Whether the template has written the first token itself, so that the tokenizer adds none; as transformers
        decides it."""
        return bool(self.tokenizer.bos_token) and rendered.startswith(self.tokenizer.bos_token)

    def check(self) -> None:
        """Render a conversation with an image. Raises BadInput if this template cannot, or leaves no room."""
        try:
            self.encode(self._trial)
        except BadSample as bad:
            raise BadInput(f"backbone.max_text_length: {bad.detail}. Raise it.") from bad


def _without_oldest(text: Prompted, number: int) -> Prompted:
    """The conversation without its first `number` questions and their answers; images that these named come first in
    the question that follows."""
    system = [turn for turn in text.turns if turn[0] == "system"]
    turns = [turn for turn in text.turns if turn[0] != "system"]
    marks = [mark for _, words in turns[: 2 * number] for mark in MARKS.findall(words)]
    turns = [*turns[2 * number :], ("user", text.prompt)]
    turns[0] = (turns[0][0], "".join(f"{mark}\n" for mark in marks) + turns[0][1])
    return dataclasses.replace(text, turns=(*system, *turns[:-1]), prompt=turns[-1][1])
