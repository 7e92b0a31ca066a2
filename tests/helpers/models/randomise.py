"""Weights of tiny models that tests compare."""

import torch


def randomise(model: torch.nn.Module, seed: int = 1, kept: tuple[str, ...] = ()) -> None:
    """Weights large enough that a wrong wire shows; norms stay near one.

    Args:
        kept: names of parameters that keep their value.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name in kept:
                continue
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0))
