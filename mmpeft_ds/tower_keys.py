"""Keys by which what frozen towers gave, and is stored, is told from what others would give."""

from __future__ import annotations


def same_key(stored: str | None, key: str) -> bool:
    """Whether what is stored with a key of towers is of the towers with the other: keys of earlier versions end before
    the dash, since they say nothing of the towers' configurations."""
    return stored in (key, key.partition("-")[0])
