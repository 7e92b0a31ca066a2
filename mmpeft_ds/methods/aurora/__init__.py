"""Aurora: one factorisation for the updates of all layers of both towers, and gated query transformation."""

from mmpeft_ds.registry import lazy_names

__getattr__ = lazy_names(__name__)
