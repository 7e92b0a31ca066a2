"""p-Adapter: adapters that propagate over the attention map by a p-Laplacian (AAAI 2024)."""

from mmpeft_ds.registry import lazy_names

__getattr__ = lazy_names(__name__)
