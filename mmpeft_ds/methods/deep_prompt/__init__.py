"""Deep prompts: trained prefixes of attention, or trained tokens before layers (arXiv 2101.00190, 2203.12119)."""

from mmpeft_ds.registry import lazy_names

__getattr__ = lazy_names(__name__)
