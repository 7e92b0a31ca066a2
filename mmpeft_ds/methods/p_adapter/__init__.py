"""p-Adapter: adapters that propagate over the attention map by a p-Laplacian (AAAI 2024)."""

from mmpeft_ds.methods.p_adapter.config import PAdapterConfig
from mmpeft_ds.methods.p_adapter.model import ENTRY, PAdapter, PAdapterModel

__all__ = ["ENTRY", "PAdapter", "PAdapterConfig", "PAdapterModel"]
