"""Routed LoRA: a LoRA bottleneck steered by an image feature (arXiv 2403.09377)."""

from mmpeft_ds.methods.routed_lora.config import RoutedLoraConfig
from mmpeft_ds.methods.routed_lora.model import ENTRY, RoutedLora, RoutedLoraModel

__all__ = ["ENTRY", "RoutedLora", "RoutedLoraConfig", "RoutedLoraModel"]
