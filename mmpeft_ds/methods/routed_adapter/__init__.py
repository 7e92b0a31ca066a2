"""Routed adapters: a bottleneck behind each sublayer, steered by an image feature (arXiv 2403.09377)."""
