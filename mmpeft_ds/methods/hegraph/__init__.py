"""HeGraphAdapter (arXiv 2410.07854): a graph over classes refines a few-shot text classifier and shifts a cache."""

from mmpeft_ds.registry import lazy_names

__getattr__ = lazy_names(__name__)
