"""Recipes made of parts: one mapping laid over another, and names of variants as directories."""

from __future__ import annotations

import copy
import re
from typing import Any


def slug(name: str) -> str:
    """Name of a row as the name of a directory."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def deep_merge(below: Any, above: Any) -> Any:
    """`above` laid over `below`: mappings key by key, but a component of another name replaces all of its section."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return copy.deepcopy(above)
    if "name" in above and above["name"] != below.get("name"):
        return copy.deepcopy(above)
    return {**below, **{key: deep_merge(below.get(key), value) for key, value in above.items()}}
