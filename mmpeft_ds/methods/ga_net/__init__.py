"""GA-Net: a graph over the samples of the global batch (arXiv 2408.00290)."""

from mmpeft_ds.registry import lazy_names

__getattr__ = lazy_names(__name__)
