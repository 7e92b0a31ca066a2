"""Faults on purpose, and their harmless neighbours, on the stand-in for a GPU; for `launch.run_forked(..., ranks=0)`.

device_planted OUT.json     name -> [kind, line of the report], first line of the function
"""

from __future__ import annotations

import copy
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpeft_ds.ops.similarity_graph import cosines, sums_by_halves
from tests.helpers.device import reports, standin

# name -> (function of x (3, 4) and n (3,) on the device, kinds that it must cause)
CASES: dict[str, tuple[Callable[[Tensor, Tensor], object], list[str]]] = {
    "item": (lambda x, n: x.sum().item(), ["wait"]),
    "tolist": (lambda x, n: n.tolist(), ["wait"]),
    "cpu": (lambda x, n: x.cpu(), ["wait"]),
    "truth": (lambda x, n: bool((x > 0).any()), ["wait"]),
    "nonzero": (lambda x, n: (x > 0).nonzero(), ["wait"]),
    "boolean index": (lambda x, n: x[x > 0], ["wait"]),
    "boolean index of a target": (lambda x, n: x.clone().__setitem__(x > 0, x[0, 0]), ["wait"]),
    "unique": (lambda x, n: n.unique(), ["wait"]),
    "bincount": (lambda x, n: n.bincount(minlength=5), ["wait"]),
    "repeat": (lambda x, n: n.repeat_interleave(n), ["wait"]),
    "position by a tensor": (lambda x, n: x[n[1]], ["wait"]),
    "a made tensor": (lambda x, n: torch.tensor([1.0, 2.0], device=x.device), ["copy"]),
    "moved": (lambda x, n: torch.ones(3).to(x.device, non_blocking=True), ["queued"]),
    "index of the host": (lambda x, n: x[torch.tensor([0, 2])], ["copy"]),
    "mixture": (lambda x, n: x + torch.ones(3, 4), ["mixed"]),
    "mixed product": (lambda x, n: nn.functional.linear(x, torch.ones(2, 4)), ["mixed"]),
    "number of the host": (lambda x, n: x * torch.tensor(2.0), []),
    "known size": (lambda x, n: n.repeat_interleave(n, output_size=3), []),
    "masked by a number": (lambda x, n: x.clone().__setitem__(x > 0, 0.0), []),
    "shapes": (lambda x, n: x.view(-1)[: len(x)].shape[0] + x.numel(), []),
    "made on the device": (lambda x, n: torch.full((2, 2), 3.0, device=x.device).cumsum(0), []),
}


class Backward(torch.autograd.Function):
    """Reads a value in its backward, which runs in autograd's thread of the device."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        threads.append(threading.current_thread())
        grad.sum().item()
        return grad * 2


threads: list[threading.Thread] = []


def same_as_cpu() -> dict[str, float]:
    """Largest difference of output and gradients from the CPU, for parts that go ways of their own in the stand-in."""
    torch.manual_seed(0)
    query, mask = torch.randn(2, 2, 5, 8), torch.rand(2, 1, 5, 5) > 0.3
    mask |= torch.eye(5, dtype=torch.bool)
    crow, column = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
    attention = nn.functional.scaled_dot_product_attention

    def sparse(x: Tensor) -> Tensor:
        place = (crow.to(x.device), column.to(x.device))
        return torch.sparse_csr_tensor(*place, torch.ones(3, device=x.device), (2, 3)) @ x

    programs = {
        "attention": (lambda q: attention(q, q, q, is_causal=True), query),
        "masked attention": (lambda q: attention(q, q, q, mask.to(q.device)), query),
        "grouped attention": (lambda q: attention(q, q[:, :1], q[:, :1], enable_gqa=True), query),
        "convolution": (nn.Conv2d(3, 4, 2, stride=2), torch.randn(2, 3, 6, 6)),
        "sparse product": (sparse, torch.randn(3, 4)),
        "views": (lambda x: x.clone().T[1:].unfold(0, 2, 1).mul_(2).transpose(0, 1).reshape(-1, 2), torch.randn(3, 4)),
    }
    gaps = {}
    for name, (program, given) in programs.items():
        results = []
        for device in ("cpu", "cuda"):
            x = given.detach().clone().to(device).requires_grad_()
            run = copy.deepcopy(program).to(device) if isinstance(program, nn.Module) else program
            out = run(x)
            (out * torch.arange(out.numel(), device=device).view(out.shape)).sum().backward()
            results.append((out.detach().cpu(), x.grad.cpu()))
        gaps[name] = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
    return gaps


def cosines_of_few() -> dict[str, bool]:
    """Whether cosines on the device are added up by halves, in which a pair alone gets the bits it has among others,
    and whether the CPU's own sums would have been noticed."""
    a, b = torch.randn(2, 40, 9001).unbind()
    wide_a, wide_b = a.double(), b.double()
    aa, bb, ab = map(sums_by_halves, (wide_a * wide_a, wide_b * wide_b, wide_a * wide_b))
    want, found = ab / (aa * bb).sqrt(), cosines(a.to("cuda"), b.to("cuda")).cpu()
    alone = [cosines(a[i : i + 1].to("cuda"), b[i : i + 1].to("cuda")).cpu() for i in range(40)]
    return {
        "by halves": torch.equal(found, want),
        "alone": torch.equal(torch.cat(alone), want),
        "as the CPU": torch.equal(cosines(a, b), want),
    }


def main() -> None:
    standin.start()
    result: dict[str, object] = {}
    x, n = torch.randn(3, 4).to("cuda"), torch.arange(3).to("cuda")
    for name, (program, kinds) in CASES.items():
        with reports.watching() as watch:
            try:
                program(x, n)
            except RuntimeError:
                assert "mixed" in kinds, name
        line = program.__code__.co_firstlineno
        result[name] = {"want": kinds, "line": line, "found": [[r.kind, r.file, r.line] for r in watch.reports]}
    with reports.watching() as watch:
        Backward.apply(x.requires_grad_()).sum().backward()
        with reports.transfer():
            torch.ones(3).to("cuda", non_blocking=True)
    line = Backward.backward.__code__.co_firstlineno + 3
    result["backward"] = {"want": ["wait"], "line": line, "found": [[r.kind, r.file, r.line] for r in watch.reports]}
    result["own thread"] = threads[0] is not threading.main_thread()
    result["gaps"] = same_as_cpu()
    result["cosines"] = cosines_of_few()
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
