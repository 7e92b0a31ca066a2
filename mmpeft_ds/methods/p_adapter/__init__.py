"""p-Adapter: adapters that propagate over the attention map by a p-Laplacian (AAAI 2024)."""
