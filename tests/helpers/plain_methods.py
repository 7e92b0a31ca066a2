"""Methods that stand by their defaults: all but `peft`, whose types tests/methods/test_peft_types.py tries."""

from __future__ import annotations

from mmpeft_ds import methods


def names(heads: bool | None = None) -> list[str]:
    """As `methods.names`."""
    return [name for name in methods.names(heads) if name != "peft"]
