"""The p-Laplacian of attention as an autograd function over Triton kernels."""

# B batch, H heads, N query tokens, M key tokens, G pooled key tokens, d width of a head, b channels of a node

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_ds.ops.p_laplacian import bins, inverse_root
from mmpeft_ds.ops.p_laplacian_edges import Gradients, closed_sum, exponent_and_pull
from mmpeft_ds.ops.p_laplacian_triton.launch import Launcher


class Fused(torch.autograd.Function):
    """Triton form of the streaming function of `p_laplacian_stream`, with the same arguments, results and saved
    tensors."""

    @staticmethod
    def forward(ctx, q, k, f, g, p, mu, mask, options):
        """Messages for every row, in the dtype of `f`, and the row sums of the graph's weights."""
        with torch.autocast(q.device.type, enabled=False):
            call = Launcher(q, k, f, g, p, mu, mask, options)
            lse = call.row_lse()
            degree = pooled = None
            if options.graph == "published":
                degree = call.column_sums(lse)
                call.divide(degree)
            if options.graph == "pooled":
                pooled = call.pooled_map(lse)
            V, alpha, own = call.messages(lse, pooled)
            U = call.f + V if call.square else V.clone()
        ctx.save_for_backward(q, k, f, g, p, mu, mask, V, alpha, lse, own, pooled, degree)
        ctx.options = options
        returned = lse.sum(-1)
        ctx.mark_non_differentiable(returned)
        return U.to(f.dtype), returned

    @staticmethod
    @once_differentiable
    def backward(ctx, dU, _):
        q, k, f, g, p, mu, mask, V, alpha, lse, own, pooled, degree = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            call = Launcher(q, k, f, g, p, mu, mask, ctx.options)
            if degree is not None:
                call.divide(degree)
            grads = Gradients(call, dU.to(V.dtype), V, alpha, lse, own)
            scores = any(ctx.needs_input_grad[:2])
            E = None if call.options.exact or call.pooled else closed_sum(call, grads, slice(None))
            dq, dk, E, d_pooled = call.edge_gradients(grads, lse, pooled, E, scores)
            dg = grads.dg_T.mT
            if scores and d_pooled is not None:
                dq, dk = call.map_gradients(lse, d_pooled, bins(k.shape[-2], pooled.shape[-1], pooled), E)
            if degree is not None:
                root = inverse_root(degree)
                if scores:
                    d_degree = -0.5 * (call.g_T.mT * dg).sum(-1, keepdim=True) * root**2
                    more = call.map_gradients(lse, None, d_degree, None)
                    dq, dk = dq + more[0], dk + more[1]
                dg = dg * root
            dp, dmu = exponent_and_pull(grads, p, mu)
        gradients = (_like(dq, q), _like(dk, k), grads.df.to(f.dtype), dg.to(g.dtype), dp, dmu)
        wanted = (d if needed else None for d, needed in zip(gradients, ctx.needs_input_grad, strict=False))
        return *wanted, None, None


def _like(gradient: Tensor | None, x: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(x.dtype)
