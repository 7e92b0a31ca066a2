"""Routed adapters: a bottleneck after each sublayer, steered by an image feature (arXiv 2403.09377)."""

from mmpeft_ds.registry import lazy_names

__getattr__ = lazy_names(__name__)
