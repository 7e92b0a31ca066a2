"""MokA: a `down` for each modality, image tokens that read the question in the bottleneck, one `up` (2506.05191)."""

from mmpeft_ds.registry import lazy_names

__getattr__ = lazy_names(__name__)
