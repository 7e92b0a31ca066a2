"""Aurora: one factorisation for the updates of all layers of both towers, and gated query transformation."""

from mmpeft_ds.methods.aurora.config import AuroraConfig
from mmpeft_ds.methods.aurora.model import ENTRY, Aurora, AuroraModel

__all__ = ["ENTRY", "Aurora", "AuroraConfig", "AuroraModel"]
