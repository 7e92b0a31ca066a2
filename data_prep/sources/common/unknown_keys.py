"""Unknown keys of a user's record: which of them cannot pass as harmless extra information.

Other tools have other names for the same things (`images`, `img`, `messages`, `answers` beside `answer`). Such a key
would be stored where no task looks for it, and a run would train without pictures or captions and end well. So a key
is refused if its name looks like a known one, or if its value names a file that a known key should name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmpeft_ds.data.formats import STORED_SUFFIXES

# Words that stand for each kind of content in the data of other tools.
_WORDS = {
    "image": "image images img imgs im picture pictures pic pics photo photos photograph photographs screenshot"
    " thumbnail jpg jpeg png pil pixels",
    "video": "video videos clip clips movie movies frame frames",
    "audio": "audio audios sound speech wav",
    "features": "feature features feat feats npy embedding embeddings",
    "caption": "caption captions cap caps description descriptions desc text texts txt sentence sentences",
    "question": "question questions query queries prompt prompts",
    "answer": "answer answers ans response responses reply replies target targets output outputs gt groundtruth truth",
    "label": "label labels class classes category categories cls",
    "conversations": "conversations conversation messages message dialog dialogs dialogue dialogues chat turns history"
    " instruction instructions system chosen rejected",
}
_KIND_OF = {word: kind for kind, words in _WORDS.items() for word in words.split()}
# Words with other meanings besides: refused only where the object has none of the keys that they would stand for.
_AMBIGUOUS_WORDS = """
thumbnail video videos clip clips movie movies frame frames embedding embeddings description descriptions desc text
texts txt sentence sentences query queries prompt prompts response responses reply replies target targets output
outputs gt groundtruth truth class classes category categories cls url uri link
"""
_AMBIGUOUS = frozenset(_AMBIGUOUS_WORDS.split())
_KEYS = {
    "image": ("image",),
    "video": ("video", "image"),
    "audio": (),
    "features": ("features",),
    "caption": ("caption", "captions", "conversations"),
    "question": ("question", "questions", "conversations", "caption", "captions"),
    "answer": ("answer", "answers", "questions", "conversations"),
    "label": ("label", "question", "questions", "conversations"),
    "conversations": ("conversations",),
}
# Words that leave the meaning as it is (`image_path`, `caption_en`); with any other word (`image_id`, `answer_type`) a
# key is information about a thing, not the thing itself.
_FILE_WORDS = "path paths file files filename filenames filepath filepaths media src url uri link"
_FILES = frozenset(_FILE_WORDS.split())
_NEUTRAL_WORDS = """
name names list data input inputs rel abs relative local full main first second left right rgb base b bytes alt raw
short long en ref refs reference references true gold correct human user assistant all new the my a
"""
_NEUTRAL = _FILES | frozenset(_NEUTRAL_WORDS.split())
_ADVICE = {
    "image": "pictures stand under 'image', a path or a list of paths",
    "video": "videos stand under 'video', a path, a list of paths, or {'frames': [paths of pictures], 'times': [...]}",
    "audio": "no task reads sound",
    "features": "stored features stand under 'features', a path of a .npy array or a list of them",
    "caption": "captions stand under 'caption', several under 'captions'",
    "question": "questions stand under 'question', several under 'questions'",
    "answer": "the answer to a question stands under 'answer', those of several annotators under 'answers'",
    "label": "the class stands under 'label'",
    "conversations": "turns stand under 'conversations', a list of {'from': human, gpt or system, 'value': text}",
}
_SUFFIXES = {
    **dict.fromkeys(STORED_SUFFIXES, "image"),
    **dict.fromkeys((".npy", ".npz"), "features"),
    **dict.fromkeys((".mp4", ".avi", ".mov", ".mkv", ".webm"), "video"),
}

_ENCODED = (
    "data:image/",
    "iVBORw0KGgo",
    "/9j/",
    "R0lGOD",
    "UklGR",
)  # begins of pictures as text: PNG, JPEG, GIF, WebP


def check_unknown(
    found: Mapping[str, Any],
    unknown: Collection[str],
    keep: Collection[str],
    folders: Collection[Path],
    pictured: bool,
) -> None:
    """Refuse unknown keys that look like known ones, or name files of pictures, arrays or videos.

    Args:
        found: an object of a line.
        unknown: its keys that would go under `extra`.
        keep: keys that the user wants under `extra` whatever they look like.
        folders: where a relative path may begin.
        pictured: the line has a picture or features; without any, a name of such a file was meant to be one, even if
            there is no such file.

    Raises:
        ValueError: names the first such key and the one that is meant.
    """
    present = [key for key, value in found.items() if not _is_empty(value)]
    for key in unknown:
        # Exports that give every line the same keys leave those of other lines empty.
        if key in keep or key not in present:
            continue
        meant = looks_like(key, present) or _named_file(key, found[key], present, folders, pictured)
        if meant is not None:
            raise ValueError(
                f"no task reads the key {key!r}: {_ADVICE[meant]}. Rename it, remove it, or keep it under `extra`: "
                f"--keep {key}"
            )


def lost_medium(found: Mapping[str, Any], read: Collection[str], folders: Collection[Path]) -> str | None:
    """Reason why an object that shows nothing may have been meant to: a key beside those that are `read` looks like
    one of pictures, videos or sound, or names such a file; None if there is none. Arguments as of `check_unknown`."""
    present = [key for key, value in found.items() if not _is_empty(value)]
    for key in present:
        if key in read:
            continue
        meant = looks_like(key, present) or _named_file(key, found[key], present, folders, False)
        if meant in ("image", "video", "audio"):
            return f"no task reads the key {key!r}: {_ADVICE[meant]}"
    return None


def looks_like(key: str, present: Collection[str] = ()) -> str | None:
    """The kind of content that `key` seems to hold: a known key, `video` or `audio`; None if it looks like none.

    Args:
        present: keys of the same object. A word with several meanings (`text`, `class`) counts only where none of the
            keys that it would stand for is among them.
    """
    kind, weak = _kind(key)
    return None if kind is None or (weak and any(name in present for name in _KEYS[kind])) else kind


@lru_cache(4096)
def _kind(key: str) -> tuple[str | None, bool]:
    """The probable meaning of a key, and whether its words may also mean something else."""
    words = [part for word in _words(key) for part in _parts(word)]
    known = [word for word in words if word in _KIND_OF]
    if known and all(word in _KIND_OF or word in _NEUTRAL or word.isdigit() for word in words):
        # The last word is what it is: `image_caption` is a caption. But `question_text` is a question.
        heads = [word for word in known if _KIND_OF[word] != "caption" or word[:2] != "te"]
        head = heads[-1] if heads and _KIND_OF[heads[-1]] not in ("image", "video") else known[-1]
        return _KIND_OF[head], head in _AMBIGUOUS or not _AMBIGUOUS.isdisjoint(set(words) & _FILES)
    joined = "".join(words)
    return next((kind for kind in _KEYS if len(joined) > 4 and joined in _slips(kind)), None), False


def _words(key: str) -> list[str]:
    """Words of keys such as image_path, imagePath, image-1, in lower case."""
    return re.findall(r"[a-z]+|\d+", re.sub(r"([a-z])([A-Z])", r"\1 \2", key).lower())


def _parts(word: str) -> list[str]:
    """`imagepath` as two words, where both are known."""
    known = _KIND_OF.keys() | _NEUTRAL
    cuts = [] if word in known else [i for i in range(2, len(word) - 1) if {word[:i], word[i:]} <= known]
    return [word[: cuts[0]], word[cuts[0] :]] if cuts else [word]


@lru_cache(None)
def _slips(kind: str) -> frozenset[str]:
    """Spellings one missing, added, wrong or exchanged letter away from the names of a kind: `imgae`, `lable`."""
    letters, spelled = "abcdefghijklmnopqrstuvwxyz", set()
    for name in {kind, kind + "s", kind.removesuffix("s")}:
        for a, b in ((name[:i], name[i:]) for i in range(len(name) + 1)):
            spelled |= {a + b[1:], a + b[1:2] + b[:1] + b[2:]} | {a + c + b for c in letters}
            spelled |= {a + c + b[1:] for c in letters if b}
    return frozenset(spelled)


def _named_file(
    key: str, value: Any, present: Collection[str], folders: Collection[Path], pictured: bool
) -> str | None:
    """The kind of file that a value names; None if it names none."""
    of_a_file = not _FILES.isdisjoint(_words(key)) and "image" not in present
    for text in _texts(value):
        encoded = text.startswith(_ENCODED)
        kind = "image" if encoded else _SUFFIXES.get(Path(text[-260:]).suffix.lower())
        if kind == "video" and "image" in present:  # whose frames stand there
            continue
        named = of_a_file or text.startswith("data:") or (not pictured and len(text.split()) == 1)
        if kind and (named or any(_is_file(folder / text) for folder in folders)):
            return kind
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a text that is too long for a name
        return False


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})
