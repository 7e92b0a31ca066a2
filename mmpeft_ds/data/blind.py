"""Removal of class names from texts: those of all classes of a data set, whatever the class of the sample is.

GA-Net's published filter deletes the words of the true class alone, also for test images; a class name that remains
then tells that the sample is not of that class. This filter never reads a label.
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
        # Longest first, so that `sea lion` is removed as a whole where `lion` is a class too.
        pattern = "|".join(_pattern(name) for name in sorted(names, key=lambda n: (-len(n), n)))
        self._names = re.compile(rf"(?<!\w)(?:{pattern})(?:'s|s|es)?(?!\w)", re.IGNORECASE)

    def __call__(self, text: str) -> str:
        """`text` without class names and with single blanks; may be empty."""
        before = None
        while text != before:  # removing a name may bring the words of another one together
            before, text = text, " ".join(self._names.sub(" ", text).split())
        return text


def _pattern(name: str) -> str:
    words = [word for word in re.split(r"[\s_-]+", name) if word]
    return r"[\W_]+".join(map(re.escape, words)) if words else re.escape(name)
