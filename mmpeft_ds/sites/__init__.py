"""Sites where adapters attach, and the condition that travels to them."""

from mmpeft_ds.sites.base import AttentionSite, FFNSite, Projection, Sites
from mmpeft_ds.sites.find import find_sites

__all__ = ["AttentionSite", "FFNSite", "Projection", "Sites", "find_sites"]
