"""Frame-aware cross-attention: frames that fit the text count more in its keys."""

# B texts, T frames, N tokens of a frame, its first a class token

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 4.0


def frame_weights(similarity_BT: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """T softmax_t(similarity / temperature), without gradient: how much each frame counts, on average 1.

    Args:
        similarity_BT: inner products of the normalised text feature and each normalised frame feature.

    Returns:
        (B, T).

    Source: Aurora, arXiv 2305.08381, released code for MSR-VTT and DiDeMo (training only).
    """
    return similarity_BT.shape[1] * torch.softmax(similarity_BT.detach() / temperature, 1)


def weight_frame_keys(keys_BnD: Tensor, weights_BT: Tensor) -> Tensor:
    """Multiply the keys of frame t by weight t, except that of the frame's first token. Values stay as they are.

    Args:
        keys_BnD: n = T N keys, frame after frame.
        weights_BT: of `frame_weights`.

    Raises:
        ValueError: if the frames do not divide the tokens, or the rows differ.

    Source: as `frame_weights`.
    """
    rows, frames = weights_BT.shape
    if keys_BnD.shape[0] != rows or keys_BnD.shape[1] % frames:
        raise ValueError(f"keys {tuple(keys_BnD.shape)} are not {frames} frames of equal length for {rows} texts")
    weights = weights_BT.to(keys_BnD.dtype).repeat_interleave(keys_BnD.shape[1] // frames, 1)
    first = torch.arange(keys_BnD.shape[1], device=keys_BnD.device) % (keys_BnD.shape[1] // frames) == 0
    return keys_BnD * weights.masked_fill(first, 1.0).unsqueeze(-1)
