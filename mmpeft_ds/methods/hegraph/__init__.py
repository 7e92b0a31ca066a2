"""HeGraphAdapter (arXiv 2410.07854): a graph over classes refines a few-shot text classifier and shifts a cache."""

from __future__ import annotations

from mmpeft_ds.methods.hegraph.config import HeGraphConfig
from mmpeft_ds.methods.hegraph.model import BankHead, HeGraph, HeGraphModel
from mmpeft_ds.methods.hegraph.standalone import HeGraphHead
from mmpeft_ds.ops.class_graph import Coefficients, classify

__all__ = ["ENTRY", "BankHead", "Coefficients", "HeGraphConfig", "HeGraphHead", "HeGraphModel", "classify"]

ENTRY = HeGraph
