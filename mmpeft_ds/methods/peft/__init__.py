"""The method `peft`: options apart from what needs torch."""

from mmpeft_ds.registry import lazy_names

__getattr__ = lazy_names(__name__)
