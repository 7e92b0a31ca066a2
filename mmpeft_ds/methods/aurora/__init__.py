"""Aurora: one factorisation for the updates of all layers of both towers, and gated query transformation."""
