"""Tokens of BLIP's texts: which special token stands first, where the answer begins, on which side padding goes."""

# T texts, L length

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.backbones.common.spelling import Spelling
from mmpeft_ds.data.batch import Prompted

IGNORED = -100


class BlipTokens:
    """A BERT tokenizer with BLIP's two additional tokens: [DEC] begins the sequence of a decoder, [ENC] one that an
    encoder fuses with the image. Checkpoints name [DEC] as `bos_token_id`; [ENC] is the next one, unless the tokenizer
    has it.

    Args:
        tokenizer: of the checkpoint.
        text_config: its text configuration.
    """

    def __init__(self, tokenizer: Any, text_config: Any):
        self._tokenizer, self.spelling = tokenizer, Spelling(tokenizer, skip_special_tokens=False)
        known = tokenizer.get_vocab()
        self.cls: int = tokenizer.cls_token_id
        self.sep: int = text_config.sep_token_id
        self.pad: int = text_config.pad_token_id
        self.dec: int = text_config.bos_token_id
        self.enc: int = known.get("[ENC]", self.dec + 1)
        self._words = max(known.values()) + 1
        self._special = {self.cls, self.sep, self.pad, self.dec, self.enc}

    def sequences(self, texts: list[Prompted], longest: int) -> dict[str, Tensor]:
        """[DEC] prompt target [SEP]: `input_ids`, `attention_mask` and `labels`, each (T, L); label s is the token at
        s + 1, if it belongs to the target or ends it. Without a target all labels are ignored."""
        rows, labels = [], []
        for text, prompt, target in zip(
            texts, self._ids([t.prompt for t in texts]), self._ids([t.target for t in texts]), strict=True
        ):
            words = (prompt + target)[: longest - 2]
            row = [self.dec, *words, self.sep]
            first = min(len(prompt), len(words)) if text.target else len(row)
            rows.append(row)
            labels.append([row[i + 1] if first <= i < len(row) - 1 else IGNORED for i in range(len(row))])
        return {**self._padded(rows), "labels": _stack(labels, IGNORED)}

    def prompts(self, prompts: list[str], longest: int, left: bool) -> dict[str, Tensor]:
        """[DEC] prompt: `input_ids`, `attention_mask`, padded on the left for generation, or on the right."""
        return self._padded([[self.dec, *ids[: longest - 2]] for ids in self._ids(prompts)], left)

    def encoder(self, texts: list[str], longest: int, fused: bool) -> dict[str, Tensor]:
        """[ENC] or [CLS], text, [SEP]: `input_ids`, `attention_mask`.

        Args:
            fused: the text is read together with an image.
        """
        first = self.enc if fused else self.cls
        return self._padded([[first, *ids[: longest - 2], self.sep] for ids in self._ids(texts)])

    def answers(self, answers: list[str], longest: int) -> dict[str, Tensor]:
        """[DEC] answer [SEP]: `answer_ids`, `answer_mask` and `labels` as in `sequences`, without prompt."""
        rows = self.sequences([Prompted("", a) for a in answers], longest)
        return {"answer_ids": rows["input_ids"], "answer_mask": rows["attention_mask"], "labels": rows["labels"]}

    def candidates(self, answers: list[str], longest: int) -> tuple[Tensor, Tensor]:
        """answer [SEP]: (C, A) ids and mask."""
        rows = self._padded([[*ids[: longest - 2], self.sep] for ids in self._ids(answers)])
        return rows["input_ids"], rows["attention_mask"]

    def decode(self, ids_TL: Tensor) -> list[str]:
        """The text of each row up to the first [SEP]."""
        texts = []
        for row in ids_TL.tolist():
            row = row[: row.index(self.sep)] if self.sep in row else row
            # [DEC] and [ENC] are no words of the tokenizer
            texts.append(self.spelling.decode([i for i in row if i < self._words and i not in self._special]))
        return texts

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _padded(self, rows: list[list[int]], left: bool = False) -> dict[str, Tensor]:
        keep = [[1] * len(row) for row in rows]
        return {"input_ids": _stack(rows, self.pad, left), "attention_mask": _stack(keep, 0, left)}


def _stack(rows: list[list[int]], fill: int, left: bool = False) -> Tensor:
    length = max(len(row) for row in rows)
    pads = [[fill] * (length - len(row)) for row in rows]
    return torch.tensor([p + r if left else r + p for p, r in zip(pads, rows, strict=True)])
