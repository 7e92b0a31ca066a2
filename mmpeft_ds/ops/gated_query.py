"""Gated query transformation: how text states inside a layer reach past its feed-forward block."""

from __future__ import annotations

from torch import Tensor

GATE = 0.1


def gated_query(
    out: Tensor,
    self_states: Tensor,
    cross_states: Tensor,
    self_scale: Tensor,
    self_shift: Tensor,
    cross_scale: Tensor,
    cross_shift: Tensor,
    gate: float = GATE,
) -> Tensor:
    """Add affine maps of the two attention results to the result of a text layer.

    out + gate (self_states * self_scale + self_shift) + gate (cross_states * cross_scale + cross_shift), after the
    layer's last LayerNorm, and only where the layer attended to an image.

    Args:
        out: (B, S, D) result of the layer.
        self_states, cross_states: (B, S, D) results of self- and cross-attention, each after its LayerNorm.
        self_scale, self_shift, cross_scale, cross_shift: (D,).
        gate: fixed weight of both terms.

    Returns:
        (B, S, D).

    Source: Aurora, arXiv 2305.08381, gated query transformation, released code.
    """
    own = self_states * self_scale + self_shift
    other = cross_states * cross_scale + cross_shift
    return out + gate * own + gate * other
