"""The peft config of routed adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmpeft_ds.methods.common.routed import RoutedConfig
from mmpeft_ds.methods.routed_adapter.options import RoutedAdapterOptions


@dataclass
class RoutedAdapterConfig(RoutedAdapterOptions, RoutedConfig):
    """RoutedAdapterOptions as a peft config."""

    PEFT_TYPE: ClassVar[str] = "ROUTED_ADAPTER"
