"""Generated tokens as people write them, and given texts as the tokenizer gives them back.

BERT's tokenizer parts words at every mark and forgets where spaces stood: "don't", "10:30 a.m." and "$5.00" are
decoded as "don ' t", "10 : 30 a. m." and "$ 5. 00". The spaces are placed again by the rules of English spelling.
Whether an answer is right does not depend on these rules: `as_generated` sends a reference through the same tokenizer.

Source: findings/transformers_bert_decode_spaces.sh.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from mmpeft_ds.backbones.common.texts import TextIds

_MARKS = re.escape("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u2018\u2019\u201c\u201d\u2013\u2014\u2026€£¥¢°")
_PIECES = re.compile(f"[{_MARKS}]|[^\\s{_MARKS}]+")
_DIGITS = re.compile(r"\d*")
_ORDINALS = ("st", "nd", "rd", "th")
_CURRENCIES = "$€£¥"
_OPENING, _CLOSING = "([{\u201c", ")]}\u201d.,;:!?%\u2026¢°"
_BETWEEN = "-/\\_^"
_APOSTROPHES = "'\u2019"
_CONTRACTED = {"s", "re", "ve", "ll", "d", "m"}
_AROUND_APOSTROPHE = {("o", "clock"), ("ma", "am"), ("y", "all"), ("ne", "er"), ("e", "er")}
_BEFORE_NAMES = {"o", "d", "l"}  # o'reilly, d'or, l'oreal
_SHORTENED = {"til", "tis", "twas", "em", "cause", "bout", "round"}
_DOMAINS = {"com", "org", "net", "edu", "gov"}


class Spelling:
    """Texts of one tokenizer.

    Args:
        tokenizer: of transformers.
        skip_special_tokens: leave them out of decoded texts.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
        self._tokenizer, self._texts, self._skip = tokenizer, TextIds(tokenizer), skip_special_tokens
        self._known: dict[str, str | None] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, spelled as people do where the tokenizer forgets spaces; its tokens stay the same."""
        text = self._tokenizer.decode(ids, skip_special_tokens=self._skip).strip()
        if self._forgets_spaces and self._ids(spelled := spell(text)) == self._ids(text):
            return spelled
        return text

    def decode_all(self, rows: Sequence[Sequence[int]], choices: Sequence[str] | None = None) -> list[str]:
        """The text of each row; where only `choices` could be generated, as the choice is written."""
        texts = [self.decode(row) for row in rows]
        as_written = {self.as_generated(choice): choice for choice in choices or ()}
        return [as_written.get(text, text) for text in texts]

    def as_generated(self, text: str) -> str | None:
        """`text` as `decode` gives it back; None where it has a part that the tokenizer does not know, so that no
        generated text is equal to it."""
        if text not in self._known:
            ids = self._ids(text)
            known = ids and self._tokenizer.unk_token_id not in ids
            self._known[text] = (self.decode(ids) or None) if known else None
        return self._known[text]

    @functools.cached_property
    def _forgets_spaces(self) -> bool:
        return self._ids("t-shirt") == self._ids("t - shirt")

    def _ids(self, text: str) -> list[int]:
        text, _ = self._texts.plain(text)
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def spell(text: str) -> str:
    """`text` without the spaces that a tokenizer has put around its marks, as English is written.

    Words, marks and their order stay, and no space is added. Where spelling is ambiguous the more frequent case is
    taken: "t - shirt" becomes "t-shirt".
    """
    places = list(_PIECES.finditer(text))
    sides = _sides([place[0] for place in places])
    written = ""
    for i, place in enumerate(places):
        apart = i and place.start() > places[i - 1].end() and not (sides[i - 1][1] or sides[i][0])
        written += f" {place[0]}" if apart else place[0]
    return written


def _sides(pieces: list[str]) -> list[tuple[bool, bool]]:
    """For each piece whether it touches the one before it and the one after it."""
    sides, open_quotes = [], set()
    for i, piece in enumerate(pieces):
        before, after = pieces[i - 1] if i else "", pieces[i + 1] if i + 1 < len(pieces) else ""
        behind = pieces[i + 2] if i + 2 < len(pieces) else ""
        if piece in _APOSTROPHES:
            touches = _apostrophe(before, after) or _quote(piece, before, pieces[i + 1 :], open_quotes)
        elif piece == '"':
            touches = _quote(piece, before, pieces[i + 1 :], open_quotes)
        elif piece in ".,:":
            touches = _stop(piece, before, after, behind)
        else:
            touches = _mark(piece, before, after, behind)
        sides.append(touches)
    return sides


def _apostrophe(before: str, after: str) -> tuple[bool, bool] | None:
    """An apostrophe within a word, or at the beginning of a shortened one; None if it is a quotation mark."""
    first, second = before.lower(), after.lower()
    if second in _SHORTENED or (second[:2].isdigit() and second.endswith("s") and not first.isdigit()):
        return False, True  # 'til, '90s
    within = (
        second in _CONTRACTED
        or (second == "t" and first.endswith("n"))
        or (first, second) in _AROUND_APOSTROPHE
        or (first in _BEFORE_NAMES and len(second) > 1)
        or (first.isdigit() and second.isdigit())  # feet and inches
    )
    return (True, True) if within and _is_word(before) and _is_word(after) else None


def _quote(mark: str, before: str, rest: list[str], open_quotes: set[str]) -> tuple[bool, bool]:
    """A quotation mark, or one that stands for feet, inches or the end of a possessive."""
    if mark in open_quotes:
        open_quotes.remove(mark)
        return True, False
    if before and not _closes_later(mark, rest):  # 12", the dogs' toys
        return True, False
    open_quotes.add(mark)
    return False, True


def _closes_later(mark: str, rest: list[str]) -> bool:
    """Whether another mark of the same kind follows that stands for no apostrophe."""
    whole = [mark, *rest, ""]
    return any(
        whole[i] == mark and (mark == '"' or not _apostrophe(whole[i - 1], whole[i + 1]))
        for i in range(1, len(whole) - 1)
    )


def _stop(mark: str, before: str, after: str, behind: str) -> tuple[bool, bool]:
    """A full stop, comma or colon, which also stands within numbers, abbreviations and addresses."""
    digits = _DIGITS.match(after)[0]  # of "5kg" the number, which stands before its unit
    numbers = before.isdigit() and bool(digits) and not after.endswith(_ORDINALS)
    if mark == ":":
        return True, before.isdigit() and after[:1].isdigit()  # 9:00pm
    if mark == ",":
        return True, before.isdigit() and len(before) <= 3 and len(digits) == 3
    if numbers:
        return True, True
    if digits and (not before or before in _OPENING + _CURRENCIES):
        return bool(before), True  # .5
    letters = _is_letter(before) and _is_letter(after) and behind in ("", ".")
    address = after.lower() in _DOMAINS or before.lower() == "www"
    return True, letters or address or (before.lower(), after.lower()) == ("ph", "d")


def _mark(mark: str, before: str, after: str, behind: str) -> tuple[bool, bool]:
    """Any other piece; words touch nothing by themselves."""
    if mark in _CURRENCIES:
        return (True, False) if before.isdigit() and not after[:1].isdigit() else (False, True)
    if mark in _OPENING:
        return False, True
    if mark in _CLOSING:
        return True, mark == "°" and after.lower() in ("c", "f")
    if mark == "-" and not (_is_word(before) or before in (*_CLOSING, "'", '"')):
        return False, after.isdigit()  # a negative number
    if mark in _BETWEEN:
        return (True, True) if mark in "/\\" or (before and after and after != mark) else (False, False)
    if mark == "\u2013":
        return (True, True) if before.isdigit() and after.isdigit() else (False, False)
    if mark == "&":
        company = (_is_letter(before) and _is_letter(after)) or (before.lower(), after.lower()) == ("at", "t")
        return company, company
    if mark == "@":
        return _is_word(before) and behind == ".", True
    if mark in "#+":
        number = _is_word(after) and (mark == "#" or not before)
        return bool(before) and not _is_word(after), number
    return False, mark == "~"


def _is_word(piece: str) -> bool:
    return bool(piece) and _PIECES.fullmatch(piece) is not None and not re.fullmatch(f"[{_MARKS}]", piece)


def _is_letter(piece: str) -> bool:
    return len(piece) == 1 and piece.isalpha()
