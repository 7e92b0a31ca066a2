"""COCO's pictures of 2014 and 2015, which several data sets share."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.sources.common.layout import LayoutSource


def picture(folder: str, number: Any) -> str:
    """`train2014/COCO_train2014_000000000009.jpg` of the number 9, or of the text "9".

    Raises ValueError for anything that is no number of a picture.
    """
    digits = str(number)
    if isinstance(number, bool) or not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"{digits[:40]!r} is no number of a picture")
    return f"{folder}/COCO_{folder}_{int(digits):012d}.jpg"


class CocoSource(LayoutSource):
    """Base of sources with COCO's pictures, which lie below the root or in Images/mscoco/, as VQA's tools have it."""

    def locate(self, name: str) -> str | Path:
        plain = super().locate(name)
        if self._mscoco is None or os.path.exists(plain):
            return plain
        return os.path.join(self._mscoco, name)

    @cached_property
    def _mscoco(self) -> Path | None:
        folder = self.pictures_root / "Images" / "mscoco"
        return folder if folder.is_dir() else None
