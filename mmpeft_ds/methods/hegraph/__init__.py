"""HeGraphAdapter (arXiv 2410.07854): a graph over classes refines a few-shot text classifier and shifts a cache."""
