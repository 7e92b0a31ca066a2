"""Exceptions of single families of multimodal language models: one file per family, found by name."""
