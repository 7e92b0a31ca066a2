"""The Triton kernels of the p-Laplacian compile to machine code of NVIDIA cards and fit into their shared memory."""

import pytest
import torch

from mmpeft_ds.ops.p_laplacian_stream import p_laplacian_attention
from tests.helpers.triton_compiler import compiled, launches

triton = pytest.importorskip("triton", reason="Triton is not installed here (it has no wheel for this system)")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(triton.knobs.runtime.interpret, reason="kernels are interpreted")]

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have: A100, H100
CASES = {
    "language model": ("square", (128, 16), torch.bfloat16, None, 4),
    "text tower": ("square", (64, 8), torch.float32, None, 4),
    "pooled": ("pooled", (64, 8), torch.float32, 16, 7),
    "published": ("published", (64, 64), torch.bfloat16, None, 7),
}


def call(graph, widths, dtype, groups):
    d, b = widths
    q, k = (torch.zeros(1, 1, 16, d, dtype=dtype, requires_grad=True) for _ in range(2))
    f, g = (torch.zeros(1, 1, n, b, requires_grad=True) for n in (16, groups or 16))
    nodes = g if graph == "square" else f
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    U = p_laplacian_attention(
        q, k, nodes, g, 1.5, 0.2, graph=graph, groups=groups, causal=graph == "square", mask=mask
    )
    U.sum().backward()


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("name", CASES)
def test_kernels_compile_and_fit(name, capability):
    *options, least = CASES[name]
    made = launches(lambda: call(*options))
    assert len(made) >= least
    for launch in made:
        kernel = compiled(launch, capability)
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= SHARED[capability], launch[0].__name__
