"""Attention among a few learned nodes over several relations, as the caption hyper-network of GA-Net has it."""

# R relations, n nodes, k width of a node

from __future__ import annotations

import torch
from torch import Tensor


def node_mix(
    node_nk: Tensor,
    weight_Rkk: Tensor,
    bias_Rk: Tensor,
    attention_2k: Tensor,
    attention_bias: Tensor,
    adjacency_Rnn: Tensor,
    gate_k: Tensor,
    gate_bias: Tensor,
) -> Tensor:
    """Updated nodes: `g_i = sum_r sum_j a_rij u_rj` times `sigmoid(gate . g_i + gate_bias)`.

    Of each relation, `u = node W^T + b` and `a_ri = softmax over j of attention . [u_i | u_j] + attention_bias`.

    Args:
        node_nk: the nodes, (n, k).
        weight_Rkk, bias_Rk: a linear map (out x in) of each relation.
        attention_2k, attention_bias: shared by the relations.
        adjacency_Rnn: which j count for i; only whether it is 0 matters, so it gets no gradient. A node with no
            neighbour in a relation takes the mean of all.
        gate_k, gate_bias: one gate a node.

    Returns:
        (n, k).

    Source: GA-Net, arXiv 2408.00290, the captioner of its published code.
    """
    # Sums of products, not matrix products: BLAS rounds products of this size by where their operands lie in memory.
    k = node_nk.shape[-1]
    u_Rnk = (weight_Rkk[:, None] * node_nk[None, :, None]).sum(-1) + bias_Rk[:, None]
    of_i, of_j = (u_Rnk * attention_2k[:k]).sum(-1), (u_Rnk * attention_2k[k:]).sum(-1)
    scores_Rnn = of_i[:, :, None] + of_j[:, None, :] + attention_bias
    share_Rnn = scores_Rnn.masked_fill(adjacency_Rnn == 0, -1e9).softmax(-1)
    mixed_nk = (share_Rnn[..., None] * u_Rnk[:, None]).sum((0, 2))
    return torch.sigmoid((mixed_nk * gate_k).sum(-1) + gate_bias)[:, None] * mixed_nk
