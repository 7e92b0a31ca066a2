"""TensLoRA: weight updates of many projections as one tensor in Tucker or CP form (arXiv 2509.19391)."""

from mmpeft_ds.registry import lazy_names

__getattr__ = lazy_names(__name__)
