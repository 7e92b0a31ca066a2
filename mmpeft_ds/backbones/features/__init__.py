"""Models of features of frozen encoders; importing it makes the model known to transformers' Auto classes."""

from mmpeft_ds.registration import register_model
from mmpeft_ds.registry import lazy_names

register_model(__name__)

__getattr__ = lazy_names(__name__)
