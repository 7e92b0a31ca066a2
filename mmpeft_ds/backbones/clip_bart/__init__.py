"""CLIP grid features and BART; importing it makes the model known to transformers' Auto classes."""

from mmpeft_ds.registration import register_model

register_model(__name__)
