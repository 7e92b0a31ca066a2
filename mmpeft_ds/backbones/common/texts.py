"""Texts as token ids: control tokens in a text are plain words, and what does not fit is cut where it harms least.

Every backbone with a text tower turns texts into ids here. What was changed on the way is counted in
`data.batch.CollatedTexts`, and from there in metrics, tables and rows.
"""

# T texts, L text length

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import CollatedTexts, Prompted
from mmpeft_ds.errors import BadInput, BadSample


@dataclass
class Words:
    """A text in tokens, without the special tokens around it.

    Attributes:
        ids: tokens.
        cut: number of tokens that were left out so that the rest fits.
        control: number of control tokens that stood in the text and are plain words in `ids`.
    """

    ids: list[int]
    cut: int = 0
    control: int = 0

    def without_middle(self, room: int) -> Words:
        """At most `room` tokens, of a longer text its beginning and its end: what a question asks stands in either."""
        if len(self.ids) <= room:
            return self
        head, tail = (room + 1) // 2, room // 2
        kept = self.ids[:head] + self.ids[len(self.ids) - tail :]
        return Words(kept, self.cut + len(self.ids) - room, self.control)

    def without_end(self, room: int) -> Words:
        """At most `room` tokens, of a longer text its beginning: for what the model learns to say, and captions."""
        return Words(self.ids[:room], self.cut + max(len(self.ids) - room, 0), self.control)


def shares(asked: int, answered: int, room: int) -> tuple[int, int]:
    """Division of `room` tokens between a prompt and a target of these lengths: the target gets all that it needs, but
    no more than half of the room if the prompt needs the rest."""
    answer = min(answered, max(room - asked, room // 2, 1))
    return min(asked, room - answer), answer


def fitted(prompt: Words, target: Words, room: int) -> tuple[Words, Words]:
    """Prompt and target in `room` tokens together: the prompt without its middle, the target without its end."""
    asked, answered = shares(len(prompt.ids), len(target.ids), room)
    return prompt.without_middle(asked), target.without_end(answered)


def collated(tensors: dict[str, Tensor], prompts: Sequence[Words], targets: Sequence[Words] = ()) -> CollatedTexts:
    """`tensors` with the counts of what was changed in the T prompts and in their targets, if they have any."""
    targets = targets or [Words([])] * len(prompts)
    pairs = zip(prompts, targets, strict=True)
    changes = torch.tensor([[p.cut, t.cut, p.control + t.control] for p, t in pairs], dtype=torch.int64)
    return CollatedTexts(tensors, changes=changes)


def pairs(texts: Sequence[str | Prompted]) -> list[Prompted]:
    """Texts as prompt and target; a plain text is a prompt.

    Raises:
        BadInput: for a conversation with earlier turns, which a model of single questions would not read.
    """
    prompted = [text if isinstance(text, Prompted) else Prompted(text) for text in texts]
    talk = next((text for text in prompted if text.turns), None)
    if talk is not None:
        raise BadInput(
            f"backbone: a conversation has {len(talk.turns)} turns before its last question {talk.prompt[:40]!r}, and "
            "this backbone reads none of them. Use the backbone mllm, or data with one question and one answer each."
        )
    return prompted


class TextIds:
    """The way from texts to token ids.

    A control token, such as an end of text or a placeholder of an image, is what a tokenizer finds first of all in a
    text, whoever wrote it. An answer that holds one would end there for the model. So a blank is put after its first
    character: then it is read as the plain characters that it is. `split_special_tokens` of transformers does not
    serve, since a vocabulary that holds the token as a word gives its id all the same
    (findings/transformers_split_special_tokens.sh).

    Args:
        tokenizer: of the checkpoint.
        control: further texts that must not be read as they stand, beside the special tokens of the tokenizer.
    """

    def __init__(self, tokenizer: Any, control: Iterable[str] = ()):
        self.tokenizer = tokenizer
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        # A single character, such as the "!" that pads in some CLIP checkpoints, is text wherever it stands.
        literals = {t for t in (*tokenizer.all_special_tokens, *added, *control) if len(t) > 1 and not t.isspace()}
        longest_first = sorted(literals, key=lambda literal: (-len(literal), literal))
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._forbidden = frozenset(tokenizer.convert_tokens_to_ids(sorted(literals & tokenizer.get_vocab().keys())))
        others = [t for t in tokenizer.all_special_tokens if t != tokenizer.unk_token]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token not in others:
            self._forbidden -= {tokenizer.unk_token_id}  # words outside the vocabulary have it rightly

    def plain(self, text: str) -> tuple[str, int]:
        """`text` with the control tokens in it broken up, and how many there were."""
        broken, number = self._control.subn(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return broken, number

    def words(self, texts: Sequence[str]) -> list[Words]:
        """Tokens of each text.

        Raises:
            BadSample: if a control token comes out of a text all the same, such as from a look-alike that the
                tokenizer normalises.
        """
        if not texts:
            return []
        pairs = [self.plain(text) for text in texts]
        rows = self.tokenizer([text for text, _ in pairs], add_special_tokens=False, verbose=False)["input_ids"]
        for ids, text in zip(rows, texts, strict=True):
            self.refuse_control(ids, text)
        return [Words(list(ids), 0, number) for ids, (_, number) in zip(rows, pairs, strict=True)]

    def refuse_control(self, ids: Iterable[int], text: str) -> None:
        """Raise BadSample if one of `ids`, which came out of `text`, is a control token."""
        if wrong := self._forbidden.intersection(ids):
            token = self.tokenizer.convert_ids_to_tokens(min(wrong))
            raise BadSample("control", f"the tokenizer reads {token!r} in the text {text[:60]!r}")

    def without_middle(self, text: str, room: int) -> str:
        """`text` with so much of its middle left out that about `room` tokens remain; for fast tokenizers."""
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = read["offset_mapping"]
        if len(offsets) <= room:
            return text
        head, tail = (room + 1) // 2, room // 2
        start = text[: offsets[head - 1][1]] if head else ""
        end = text[offsets[len(offsets) - tail][0] :] if tail else ""
        return f"{start.rstrip()} {end.lstrip()}".strip()

    def without_end(self, text: str, room: int) -> str:
        """The beginning of `text`, about `room` tokens; for fast tokenizers."""
        read = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = read["offset_mapping"]
        return text if len(offsets) <= room else text[: offsets[room - 1][1]] if room else ""

    # with the special tokens that the tokenizer puts around a text

    @functools.cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after a text."""
        whole, plain = (self.tokenizer("a", add_special_tokens=s)["input_ids"] for s in (True, False))
        at = next(i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain)
        return list(whole[:at]), list(whole[at + len(plain) :])

    @property
    def frame_length(self) -> int:
        """Number of special tokens around a text."""
        return sum(map(len, self.frame))

    def framed(self, words: Words) -> list[int]:
        """Ids of a text with the special tokens around it."""
        before, behind = self.frame
        return [*before, *words.ids, *behind]

    def padded(self, words: Sequence[Words], length: int | None = None) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (T, L) of framed texts, padded as the tokenizer does.

        Args:
            length: L; None: that of the longest.
        """
        rows = {"input_ids": [self.framed(one) for one in words]}
        padding = "longest" if length is None else "max_length"
        return dict(self.tokenizer.pad(rows, padding=padding, max_length=length, return_tensors="pt", verbose=False))
