"""BERT, RoBERTa and XLM-RoBERTa."""

from mmpeft_ds.sites.base import Family
from mmpeft_ds.sites.common.post_norm import reader

READ = reader(causal=lambda block: block.module.is_decoder)
NAMES = ("Bert", "Roberta", "XLMRoberta")
ENTRY = Family(
    towers={f"{n}Model": "text" for n in NAMES},
    layers={f"{n}Layer": READ for n in NAMES},
)
