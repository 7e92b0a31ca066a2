"""Tokens of BLIP's texts: which special token stands first, where the answer begins, on which side padding goes."""

# T texts, L length

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.backbones.common.spelling import Spelling
from mmpeft_ds.backbones.common.texts import TextIds, collated, fitted
from mmpeft_ds.data.batch import CollatedTexts, Prompted

log = logging.getLogger(__name__)

IGNORED = -100
CONTROL = ("[DEC]", "[ENC]")  # also where a tokenizer has them as plain words


class BlipTokens:
    """A BERT tokenizer with BLIP's two additional tokens: [DEC] begins the sequence of a decoder, [ENC] one that an
    encoder fuses with the image. Checkpoints name [DEC] as `bos_token_id`; [ENC] is the next one, unless the tokenizer
    has it.

    Args:
        tokenizer: of the checkpoint.
        text_config: its text configuration.
    """

    def __init__(self, tokenizer: Any, text_config: Any):
        self._texts, self.spelling = TextIds(tokenizer, CONTROL), Spelling(tokenizer, skip_special_tokens=False)
        known = tokenizer.get_vocab()
        self.cls: int = tokenizer.cls_token_id
        self.sep: int = text_config.sep_token_id
        self.pad: int = text_config.pad_token_id
        self.dec: int = text_config.bos_token_id
        self.enc: int = known.get("[ENC]", self.dec + 1)
        self._words = max(known.values()) + 1
        self._special = {self.cls, self.sep, self.pad, self.dec, self.enc}

    def sequences(self, texts: list[Prompted], longest: int) -> CollatedTexts:
        """[DEC] prompt target [SEP]: `input_ids`, `attention_mask` and `labels`, each (T, L); label s is the token at
        s + 1, if it belongs to the target or ends it. Without a target all labels are ignored.

        Where a row would be longer than `longest`, the prompt loses its middle and the target its end.
        """
        rows, labels = [], []
        prompts, targets = (self._texts.words(part) for part in ([t.prompt for t in texts], [t.target for t in texts]))
        for i, text in enumerate(texts):
            prompts[i], targets[i] = fitted(prompts[i], targets[i], longest - 2)
            row = [self.dec, *prompts[i].ids, *targets[i].ids, self.sep]
            first = len(prompts[i].ids) if text.target else len(row)
            rows.append(row)
            labels.append([row[i + 1] if first <= i < len(row) - 1 else IGNORED for i in range(len(row))])
        return collated({**self._padded(rows), "labels": _stack(labels, IGNORED)}, prompts, targets)

    def prompts(self, prompts: list[str], longest: int, left: bool) -> dict[str, Tensor]:
        """[DEC] prompt: `input_ids`, `attention_mask`, padded on the left for generation, or on the right."""
        words = [one.without_middle(longest - 2) for one in self._texts.words(prompts)]
        return self._padded([[self.dec, *one.ids] for one in words], left)

    def encoder(self, texts: list[str], longest: int, fused: bool) -> CollatedTexts:
        """[ENC] or [CLS], text, [SEP]: `input_ids`, `attention_mask`.

        Args:
            fused: the text is a question and read together with an image; it loses its middle where it is too long.
                Others, which are captions, lose their end.
        """
        first, room = self.enc if fused else self.cls, longest - 2
        words = [w.without_middle(room) if fused else w.without_end(room) for w in self._texts.words(texts)]
        return collated(self._padded([[first, *one.ids, self.sep] for one in words]), words)

    def answers(self, answers: list[str], longest: int) -> CollatedTexts:
        """[DEC] answer [SEP]: `answer_ids`, `answer_mask` and `labels` as in `sequences`, without prompt."""
        rows = self.sequences([Prompted("", a) for a in answers], longest)
        names = {"answer_ids": "input_ids", "answer_mask": "attention_mask", "labels": "labels"}
        return CollatedTexts({name: rows[its] for name, its in names.items()}, rows.changes)

    def candidates(self, answers: list[str], longest: int) -> tuple[Tensor, Tensor]:
        """answer [SEP]: (C, A) ids and mask."""
        words = [one.without_end(longest - 2) for one in self._texts.words(answers)]
        if cut := [answer for answer, one in zip(answers, words, strict=True) if one.cut]:
            log.warning(
                "%d of %d answers to choose from are longer than %d tokens and are compared without their end: %r ...",
                len(cut), len(answers), longest, cut[0],
            )  # fmt: skip
        rows = self._padded([[*one.ids, self.sep] for one in words])
        return rows["input_ids"], rows["attention_mask"]

    def decode(self, ids_TL: Tensor) -> list[str]:
        """The text of each row up to the first [SEP]."""
        texts = []
        for row in ids_TL.tolist():
            row = row[: row.index(self.sep)] if self.sep in row else row
            # [DEC] and [ENC] are no words of the tokenizer
            texts.append(self.spelling.decode([i for i in row if i < self._words and i not in self._special]))
        return texts

    def _padded(self, rows: list[list[int]], left: bool = False) -> dict[str, Tensor]:
        keep = [[1] * len(row) for row in rows]
        return {"input_ids": _stack(rows, self.pad, left), "attention_mask": _stack(keep, 0, left)}


def _stack(rows: list[list[int]], fill: int, left: bool = False) -> Tensor:
    length = max(len(row) for row in rows)
    pads = [[fill] * (length - len(row)) for row in rows]
    return torch.tensor([p + r if left else r + p for p, r in zip(pads, rows, strict=True)])
