"""Routed LoRA: a LoRA bottleneck steered by an image feature (arXiv 2403.09377)."""
