"""A vision tower, a text encoder and a head; importing it makes the model known to transformers' Auto classes."""

from mmpeft_ds.registration import register_model

register_model(__name__)
