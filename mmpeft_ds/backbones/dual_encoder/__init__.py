"""A vision tower and a text encoder side by side; importing it makes the model known to transformers' Auto classes."""

from mmpeft_ds.registration import register_model

register_model(__name__)
