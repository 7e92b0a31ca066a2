"""Texts that know no label: all class names of a data set are taken out of every text, whatever its own class is.

GA-Net's published filter deletes the words of the true class alone, also of test images: a class word that is still
there then speaks against that class. This one never looks at a label.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mmpeft_ds.data.feature_shards import class_name_in_words
from mmpeft_ds.errors import BadInput


class ClassNameFilter:
    """Removes class names as whole words, in any case, also of several words, and in the plural with s or es.

    Args:
        labels: class names of the data set.

    Raises:
        BadInput: if there are none.
    """

    def __init__(self, labels: Iterable[str] | None):
        names = {class_name_in_words(label).strip().lower() for label in labels or ()} - {""}
        if not names:
            raise BadInput("--remove-class-names: the data set has no class names in its manifest. Leave it out.")
        # the longest first: of `sea lion` and `lion`, no `sea` is to stay behind
        found = "|".join(_pattern(name) for name in sorted(names, key=lambda n: (-len(n), n)))
        self._names = re.compile(rf"(?<!\w)(?:{found})(?:'s|s|es)?(?!\w)", re.IGNORECASE)

    def __call__(self, text: str) -> str:
        """`text` without class names; what is left stands with single blanks, and may be empty."""
        before = None
        while text != before:  # a name may come together around one that was removed
            before, text = text, " ".join(self._names.sub(" ", text).split())
        return text


def _pattern(name: str) -> str:
    words = [word for word in re.split(r"[\s_-]+", name) if word]
    return r"[\W_]+".join(map(re.escape, words)) if words else re.escape(name)
