"""Routed adapters: a bottleneck behind each sublayer, steered by an image feature (arXiv 2403.09377)."""

from mmpeft_ds.methods.routed_adapter.config import RoutedAdapterConfig
from mmpeft_ds.methods.routed_adapter.model import ENTRY, RoutedAdapter, RoutedAdapterModel

__all__ = ["ENTRY", "RoutedAdapter", "RoutedAdapterConfig", "RoutedAdapterModel"]
