"""GA-Net: a graph over the samples of the global batch (arXiv 2408.00290)."""
