"""Words of a caption as the COCO caption evaluation counts them: Penn Treebank tokens in lower case, no punctuation.

The evaluation runs a Java program (the PTBTokenizer of Stanford CoreNLP 3.4.1) and then drops some tokens. Its scanner
takes, at each place, the longest match of many patterns, where what only has to follow counts as length; among equals
the earlier pattern wins. `_patterns` states them in that order, and the `regex` module's POSIX mode finds the longest.
Each was found by running the program; tests/metrics/ptb_words.tsv.gz keeps a selection of what it answered.

Source: the program's behaviour; Marcus et al., Computational Linguistics 19(2), 1993 (the treebank's conventions);
specs/datasets.md 6.1. docs/scores.md lists the oddities and which of them published scores contain.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator

import regex

from mmpeft_ds.metrics import ptb_tables as tables

# Compared with output in lower case, so that the four in capitals drop nothing: brackets count as words.
DROPPED = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SPELLED = {
    **_BRACKETS,
    **{"\xa2": "cents", "\xa3": "#", "\xa4": "$", "\u20ac": "$", "\x80": "$", "\u20a0": "$"},
    **{"\xbc": "1/4", "\xbd": "1/2", "\xbe": "3/4", "\u2153": "1/3", "\u2154": "2/3"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">", "&nbsp;": ""},
    **{"&mdash;": "--", "&ndash;": "--", "\u2026": "...", '"': "''", "\xad": "-"},
    **dict.fromkeys("\x96\x97\u2013\u2014\u2015", "--"),
}
_QUOTES = {
    **dict.fromkeys("\x92\u2019\u203a", "'"),
    **dict.fromkeys("\x91\u2018\u201b\u2039", "`"),
    **dict.fromkeys("\x94\u201d\xbb", "''"),
    **dict.fromkeys("\x93\u201c\xab", "``"),
}
_FUSED = "cannot gonna wanna gotta lemme gimme"
# The common case, which no other pattern can overtake: words of ASCII letters, each up to a blank or the end.
_PLAIN = re.compile(
    r" *(?:(?P<last>(?:[A-Za-z]+ +)*[A-Za-z]{2,})(?: ?\.)?(?=\n)|(?P<inner>[A-Za-z]+(?: +[A-Za-z]+)*)(?: +|(?=, )))"
)
_NOT_PLAIN = frozenset(
    " ".join((_FUSED, tables.TITLES, tables.ABBREVIATIONS, tables.CAPITALISED, tables.BEFORE_NUMBERS)).split()
)


def tokenize(caption: str) -> list[str]:
    """Words of one caption, each as the evaluation spells it; a word may hold a no-break space ("1 1/2").

    Line breaks count as blanks.
    """
    return next(tokenize_all([caption, "", ""]))


def tokenize_all(captions: Iterable[str]) -> Iterator[list[str]]:
    """Words of each caption of a list, which the evaluation reads as the lines of one text.

    What a line begins with can decide on a period at the end of the line before it: after "plan b." a sentence that
    starts with "A" ends one, and "b" loses its period.
    """
    scanner, symbols = _scanner(), _symbols()
    text = "\n".join(regex.sub(r"[\n\r\x0b\x0c\x85\u2028\u2029]", " ", caption) for caption in captions)
    scanned = text if text.isascii() else text.translate(_representatives())
    words: list[str] = []
    place = 0
    while place < len(text):
        if (character := text[place]) == "\n":
            yield _counted(words)
            words, place = [], place + 1
            continue
        plain = _PLAIN.match(text, place)
        if plain and _NOT_PLAIN.isdisjoint(several := plain[plain.lastgroup].lower().split()):
            words += several
            place = plain.end()
            continue
        if match := scanner.match(scanned, place):
            start, place = place, match.end("word")
            token = text[start:place]
            word = token.lower() if match["address"] else _spelled(token)
            if match["last"]:
                word += "."  # which is read once more
        else:
            word, place = _spelled(character) if character in symbols else "", place + 1
        words.append(word)
    yield _counted(words)


def _counted(words: list[str]) -> list[str]:
    """Words of a line that the evaluation counts; it trims blanks at the line's end, which an address may hold."""
    words = [word for word in words if word]
    if words:
        words[-1] = words[-1].rstrip()
    return [word for word in words if word not in DROPPED]


def _spelled(token: str) -> str:
    """A token in lower case and in the evaluation's spelling of marks, quotes and brackets."""
    word = token.lower()
    if token in ("&quot;", "&apos;"):  # with a capital they stay as they are
        return "''" if token == "&quot;" else "'"
    if word in _SPELLED:
        return _SPELLED[word]
    if token.isalnum() and token.isascii() or word[0] == "<" and word[-1] == ">":
        return word.replace(" ", "\xa0")
    if set(word) == {"-"}:
        return "--" if 1 < len(word) < 5 else word
    if word[0] in "\x96\x97\u2013\u2014\u2015":
        return "--"
    if word[0] == "." and set(word) <= set(". \xa0"):
        return "." if len(word) == 1 else "..."
    if len(word) <= 2 and set(word) & set(_QUOTES) and not any(map(str.isalnum, word)):
        return "".join(_QUOTES.get(mark, mark) for mark in word)
    if _contraction().fullmatch(word):
        word = "".join(_QUOTES.get(mark, mark) for mark in token.replace("&apos;", "'").lower())
    if "(" in word or ")" in word:
        word = word.replace("(", "-lrb-").replace(")", "-rrb-")
    if word[0] != "#":
        word = word.replace("\xad", "")
    return word.replace("&amp;", "&").replace(" ", "\xa0") or "-"


def _members(ranges: str) -> Iterator[str]:
    """Characters of hexadecimal ranges."""
    for bounds in ranges.split():
        first, _, last = bounds.partition("-")
        yield from map(chr, range(int(first, 16), int(last or first, 16) + 1))


@functools.cache
def _representatives() -> dict[int, str]:
    """Characters that the patterns need not tell apart -> one that stands for them: small classes are quick."""
    classes = ((tables.LETTERS, "\xe9"), (tables.MARKS, "\u0301"), (tables.DIGITS, "\u0660"))
    pairs = ((member, one) for ranges, one in classes for member in _members(ranges))
    return {ord(member): one for member, one in pairs if not member.isascii() and member != _SOFT_HYPHEN}


@functools.cache
def _symbols() -> frozenset[str]:
    """Characters that are words by themselves."""
    return frozenset(_members(tables.SYMBOLS))


def _either(words: str, first: str = "") -> str:
    """Alternatives in any case of ASCII letters; with `first="upper"` the first letter is a capital."""

    def letters(word: str) -> str:
        classes = [f"[{c}{c.upper()}]" if c.isalpha() else regex.escape(c) for c in word]
        return "".join([word[0].upper(), *classes[1:]] if first else classes)

    return "(?:" + "|".join(letters(word) for word in words.split()) + ")"


_SOFT_HYPHEN = "\xad"
# Beyond ASCII, as `_representatives` puts them.
_LETTER, _DIGIT, _ALNUM = r"[A-Za-z\xe9]", r"[0-9\u0660]", r"[A-Za-z0-9\xe9\u0660]"
_ENTITY_LETTER = f"&[aeiouAEIOU]{_either('acute grave uml')};"
_LETTER_OR_MARK = rf"(?:[A-Za-z\xe9\u0301\xad]|{_ENTITY_LETTER})"
_ANY_OF_WORD = rf"(?:[A-Za-z0-9\xe9\u0660\u0301\xad]|{_ENTITY_LETTER})"
_BLANK = r"[ \t\xa0\u2000-\u200a\u3000]"
_BLANK_OR_END = r"[ \t\xa0\u2000-\u200a\u3000\n]"
_HYPHEN = r"[\-_\u058a\u2010\u2011]"
_APOSTROPHE = rf"(?:['\x92\u2019]|{_either('&apos;')})"
_ANY_QUOTE = rf"(?:['\x92\u2019`\x91\u2018\u201b]|{_either('&apos;')})"
_NOT = f"[nN]{_ANY_QUOTE}[tT]"
_CLITIC = f"{_APOSTROPHE}(?:[msdMSD]|{_either('re ve ll')})"
_NUMBER = f"(?:{_DIGIT}+|{_DIGIT}*(?:[.:,\xad\u066b\u066c]{_DIGIT}+)+)"
_WORD = f"{_LETTER_OR_MARK}{_ANY_OF_WORD}*(?:[.!?]{_LETTER_OR_MARK}{_ANY_OF_WORD}*)*"
_O_NAME = f"(?:[dDoOlL]{_ANY_QUOTE}{_ALNUM})?{_ALNUM}+"
_HYPHENATED = f"{_O_NAME}(?:{_HYPHEN}{_O_NAME})*"
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])+"
_ASCII_HYPHENATED = f"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:[A-Za-z0-9\xad]+|{_INITIALS}\\.))+"
_IN_ADDRESS, _LAST_OF_ADDRESS = r'[^ \t\n\f\r"<>|(){}]', r'[^ \t\n\f\r"<>|.!?(){},\-]'
_TAG_NAME = r"[A-Za-z][A-Za-z0-9_:.\-]*"
_TAG = (
    rf"<(?:[!?][A-Za-z\-][^>\r\n]*|/{_TAG_NAME}|{_TAG_NAME}"
    rf"(?: +{_TAG_NAME}(?: *= *(?:\"[^\"\r\n]*\"|'[^'\r\n]*'))?)* */?) *>"
)


@functools.cache
def _contraction() -> regex.Pattern:
    return regex.compile(f"{_NOT}|{_CLITIC}")


@functools.cache
def _scanner() -> regex.Pattern:
    """The patterns as one, compiled at the first caption."""
    rules = [f"(?P<word>{word})" + (f"(?:{after})" if after else "") for word, after in _patterns()]
    return regex.compile("(?p)" + "|".join(rules))


def _patterns() -> list[tuple[str, str]]:
    """(token, what must follow), in order of precedence among matches of equal length."""
    return [
        *_word_patterns(),
        *_apostrophe_patterns(),
        *_address_patterns(),
        *_number_patterns(),
        *_compound_patterns(),
        *_mark_patterns(),
    ]


def _word_patterns() -> list[tuple[str, str]]:
    return [
        (_TAG, ""),
        (f"&(?:{_either(tables.ENTITIES)}|#[0-9]+);", ""),
        (_either("can"), _either("not")),
        (_either("gon wan"), _either("na")),
        (_either("got"), _either("ta")),
        (_either("lem gim"), _either("me")),
        ("'[tT]", _either("is was")),
        (_WORD, ""),
        (_WORD, _CLITIC),
    ]


def _compound_patterns() -> list[tuple[str, str]]:
    joined = f"[A-Z]+(?:(?:[+&]|{_either('&amp;')})[A-Z]+)+"  # AT&T
    starts = f"(?:{_either(tables.SENTENCE_STARTS, first='upper')}|{_TAG}){_BLANK_OR_END}"
    companies = r"[pP]?[pP][tT](?:e[sS]?|y[sS]?)"  # Pte., Pty.
    short = (
        f"(?:{_either(tables.ABBREVIATIONS)}|{_either(tables.CAPITALISED, first='upper')}|{companies}|[pP][hH]\\.[dD])"
    )
    return [
        (f"(?:{_WORD}|{_HYPHENATED}|{_ASCII_HYPHENATED}|{joined})\\.", "[,;:\u3001]"),
        (rf"{short}\.", r"[\s\S]{2}"),
        (f"(?P<last>{short})", r"\."),  # with less behind it, at the end of the whole text
        (rf"(?:{_either(tables.TITLES)}|[mM]f[gG]|[mM]t[gG])\.", ""),
        (rf"[A-Za-z]\.|{_INITIALS}\.?", ""),
        ("[A-Za-z]", rf"\.{_BLANK_OR_END}+{starts}"),
        (rf"{_either(tables.BEFORE_NUMBERS)}\.", f"{_BLANK_OR_END}?{_DIGIT}"),
        (_HYPHENATED, ""),
        (_ASCII_HYPHENATED, ""),
        (joined, ""),
        (r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}", ""),
        (r"[cC]\+\+|[cCfF]#", ""),
        (rf"(?P<address>{_ANY_OF_WORD}+(?:\.{_ANY_OF_WORD}+)*\.{_either(tables.FILE_ENDINGS)})", r"[\s.,!?]"),
    ]


def _apostrophe_patterns() -> list[tuple[str, str]]:
    a, q = _APOSTROPHE, _ANY_QUOTE
    whole = [
        f"{a}[nN]{a}?",  # rock 'n' roll
        f"[lLdDjJ]{a}",
        f"{_either('dunkin somethin ol')}{a}",
        f"{a}{_either('em till til cause')}",
        f"[A-HJ-XZn]{q}{_LETTER}{{2,}}",  # D'Angelo
        f"{a}[2-9]0[sS]",
        f"{_LETTER}+[aeiouyAEIOUY]{q}[aeiouA-Z]{_LETTER}*",  # Hawai'i
        _either("nor'easter c'mon e'er o'er s'mores ev'ry li'l nat'l cont'd."),
        f"[oO]{q}[oO]|{_either('o')}{a}{_either('clock')}|{_either('cap')}{a}[nN]",
    ]
    return [
        (r"[A-Za-z\xad]*(?![nN])[A-Za-z]\xad*", _NOT),
        (_NOT, ""),
        (_CLITIC, "[^A-Za-z]"),
        ("|".join(whole), ""),
        (f"[yY]{a}", _LETTER),
        (f"{a}[0-9]{{2}}", _BLANK_OR_END),
        ("'", r"[A-Za-z][^ \t\r\n\xa0]"),  # an opening quotation mark
        (_CLITIC, ""),
    ]


def _address_patterns() -> list[tuple[str, str]]:
    less, greater = f"(?:{_either('&lt;')}|<)?", f"(?:{_either('&gt;')}|>)?"
    path = rf'(?:/[^ \t\n\f\r"<>|()]+{_LAST_OF_ADDRESS})?'
    # `,-_` is a range, in the program too: it bars digits and capitals
    host = r'(?:[^ \t\n\f\r"`\'<>|.!?(){},-_$]+\.)+' + _either("com net org edu")
    host = f"(?!(?<={_BLANK}){_BLANK}){host}"  # a second blank belongs to the first
    domain = r'(?:[^ \t\n\f\r"<>|(){}.\xa0]+\.)*[^ \t\n\f\r"<>|(){}.\xa0]+'
    addresses = [
        f"{_either('http')}[sS]?://{_IN_ADDRESS}+{_LAST_OF_ADDRESS}",
        rf'[wW]{{3}}\.(?:[^ \t\n\f\r"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}{path}|{host}{path}',
        rf'{less}[a-zA-Z0-9][^ \t\n\f\r"<>|(){{}}\xa0]*@{domain}{greater}',
    ]
    return [
        *((f"(?P<address>{address})", "") for address in addresses),
        (f"@[a-zA-Z_][a-zA-Z_0-9]*|#{_LETTER_OR_MARK}+", ""),
    ]


def _number_patterns() -> list[tuple[str, str]]:
    return [
        (f"{_DIGIT}{{1,2}}[-/]{_DIGIT}{{1,2}}[-/]{_DIGIT}{{2,4}}", ""),
        (f"[-+]?{_NUMBER}", ""),
        ("[\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+)", ""),
        (f"(?:{_DIGIT}{{1,4}}[- \xa0])?{_DIGIT}{{1,4}}(?:\\\\?/|\u2044){_DIGIT}{{1,4}}", ""),
        (r"[A-Z]*\$", ""),
        (  # telephone numbers
            r"(?:\([0-9]{2,3}\)[ \xa0]?|\+{0,2}(?:[0-9]{2,4}[\- \xa0])?[0-9]{2,4}[\- \xa0])"
            r"[0-9]{3,4}[\- \xa0]?[0-9]{3,5}|\+{0,2}(?:[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
            "",
        ),
    ]


def _mark_patterns() -> list[tuple[str, str]]:
    eye = r"[\^x=~<>'\-]"
    return [
        (r"[<>]?[:;=][\-o*']?[()DPdpO\\@\[\]{|]|:3", "[^A-Za-z0-9]"),
        (rf"{eye}_{eye}|\({eye}[_.]?{eye}\)|\([\^x=~<>']-[\^x=~<>'`]\)", ""),
        (r"\.{3,5}|(?:\.[ \xa0]){2,4}\.", ""),
        (r"-+|[\x96\x97\u2013\u2014\u2015]+|-[lrLR][rscRSC][bB]-", ""),
        (r"[?!]+|#+|@+|<<|>>|_+|\*+|(?:\\\*)+", ""),
        (r"''|[`\x91-\x94\u2018-\u201f\u2039\u203a\xab\xbb]{1,2}", ""),
    ]
