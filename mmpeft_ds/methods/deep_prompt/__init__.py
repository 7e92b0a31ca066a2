"""Deep prompts: trained prefixes of attention, or trained tokens before layers (arXiv 2101.00190, 2203.12119)."""

from mmpeft_ds.methods.deep_prompt.config import DeepPromptConfig
from mmpeft_ds.methods.deep_prompt.model import ENTRY, DeepPrompt, DeepPromptModel

__all__ = ["ENTRY", "DeepPrompt", "DeepPromptConfig", "DeepPromptModel"]
