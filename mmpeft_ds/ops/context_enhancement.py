"""Informative context enhancement: the mean text state of a batch, added to its fused states."""

from __future__ import annotations

from torch import Tensor

MODES = ("official", "all_pairs", "off")
WEIGHT = 0.1


def add_context(fused_NSD: Tensor, text_BSD: Tensor, weight: float = WEIGHT) -> Tensor:
    """Add `weight` times the mean of the texts' first tokens to the first token of every row of `fused_NSD`.

    Args:
        fused_NSD: states of the multimodal pass, any number of rows.
        text_BSD: states of the text-only pass of this rank's batch, of any length.
        weight: fixed.

    Returns:
        (N, S, D), a new tensor; all tokens but the first are copied. Gradient flows into both arguments.

    Source: Aurora, arXiv 2305.08381, informative context enhancement, released code.
    """
    context_D = text_BSD[:, 0].mean(0)
    enhanced = fused_NSD.clone()
    enhanced[:, 0] = fused_NSD[:, 0] + weight * context_D
    return enhanced


def context_enhancement(
    positive_BSD: Tensor, negative_NSD: Tensor, text_BSD: Tensor, mode: str = "official", weight: float = WEIGHT
) -> tuple[Tensor, Tensor]:
    """The fused states of matching and non-matching pairs as the matching head shall see them, in training.

    `official` enhances the matching pairs only, as published. The added vector is the same for all of them and absent
    from the others, so a trained head can tell the classes by it: the label leaks. `all_pairs` adds it to both, which
    does not leak. `off` leaves both. Evaluation never calls this.

    Args:
        positive_BSD: fused states of (text_i, image_i).
        negative_NSD: fused states of non-matching pairs.
        text_BSD: states of the text-only pass of this rank's batch.
        mode: one of `MODES`.
        weight: as in `add_context`.

    Returns:
        both, as they came where `mode` does not touch them.

    Raises:
        ValueError: unknown mode.

    Source: Aurora, arXiv 2305.08381; `all_pairs` is ours.
    """
    if mode not in MODES:
        raise ValueError(f"context enhancement {mode!r} is unknown. Known: {', '.join(MODES)}.")
    if mode != "off":
        positive_BSD = add_context(positive_BSD, text_BSD, weight)
    if mode == "all_pairs":
        negative_NSD = add_context(negative_NSD, text_BSD, weight)
    return positive_BSD, negative_NSD
