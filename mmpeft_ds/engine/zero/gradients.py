"""Gradients that ZeRO holds on this rank between backward and step: norms, additions, and how to drop them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.host_copies import to_device


def held(engine: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, this rank's part of its averaged gradient); at stage 0 every rank holds all of each."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        yield from ((p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    elif stage == 3:
        parts = optimizer.get_fp32_grad_partitions()
        for index, group in enumerate(optimizer.fp16_groups):
            yield from ((p, parts[index][i]) for i, p in enumerate(group))
    else:
        for index, gradients in optimizer.averaged_gradients.items():
            kept = [g for g in gradients or [] if not getattr(g, "_zero_padding", False)]
            yield from zip(optimizer.params_in_partition[index], kept, strict=False)


@dataclass
class Shard:
    """The part of one trained parameter that this rank's optimizer holds: n elements, flattened, from `start` on.

    Attributes:
        master: (n,) value that the optimizer steps on.
        gradient: (n,) gradient, averaged over ranks.
        partition: of ZeRO-3, the padded tensor that `gradient` is the beginning of.
    """

    parameter: nn.Parameter
    start: int
    master: Tensor
    gradient: Tensor
    partition: Tensor | None = None

    def write(self) -> None:
        """Write `gradient`, changed in place, back into an optimizer that gave a copy of it."""
        if self.partition is not None:
            from deepspeed.utils import safe_set_local_grad

            safe_set_local_grad(self.parameter, self.partition)


def whole(parameters: Iterable[nn.Parameter]) -> Iterator[Shard]:
    """Shards of parameters that this process holds whole; a missing gradient becomes one of zeros."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        yield Shard(p, 0, p.detach().view(-1), p.grad.view(-1))


def place(engine: Any, parameter: nn.Parameter) -> tuple[int, int]:
    """(first element, number of elements) of this rank's part of the flattened parameter."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return 0, parameter.numel()
    if stage == 3:
        size = parameter.ds_tensor.ds_numel
        start = torch.distributed.get_rank(group=parameter.ds_process_group) * size
        return start, max(0, min(size, parameter.ds_numel - start))  # the rest is padding
    held_here = parameter._hp_mapping  # None: other ranks hold all of it
    address = held_here and held_here.lp_fragment_address
    return (int(address.start), int(address.numel)) if address else (0, 0)


def shards(engine: Any) -> Iterator[Shard]:
    """This rank's part of each trained parameter, between the last backward of a step and `engine.step`.

    At stage 0 every rank holds all of each. Additions to `gradient` are clipped and applied like the rest.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        yield from whole(p for group in optimizer.param_groups for p in group["params"])
    elif stage == 3:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad

        for p in (p for group in optimizer.fp16_groups for p in group):
            start, n = place(engine, p)
            partition = safe_get_local_grad(p)
            yield Shard(p, start, safe_get_local_fp32_param(p)[:n], partition[:n], partition)
    else:
        for p, gradient in held(engine):
            yield Shard(p, place(engine, p)[0], p._hp_mapping.get_hp_fragment(), gradient.view(-1))


def replicated(engine: Any) -> bool:
    """Whether other ranks hold the same gradients, so that a sum over ranks must count them on rank 0 alone."""
    return engine.zero_optimization_stage() == 0 and engine.global_rank != 0


class FlatGradients(Sequence[Tensor]):
    """This rank's part of the averaged gradients of a parameter group: views in the order of its parameters, and of
    the padding at the end, which are made when someone asks for them.

    Attributes:
        flat_partition: all of them as one tensor, which DeepSpeed's optimizer step takes under this name.

    Args:
        flat: all of them.
        lengths: elements of each parameter's part.
    """

    def __init__(self, flat: Tensor, lengths: Sequence[int]):
        self.flat_partition, self._lengths = flat, lengths

    @functools.cached_property
    def _views(self) -> list[Tensor]:
        padding = self.flat_partition.numel() - sum(self._lengths)
        *views, last = self.flat_partition.split_with_sizes([*self._lengths, padding])
        if padding:
            last._zero_padding = True
            views.append(last)
        return views

    def __getitem__(self, index: Any) -> Any:
        return self._views[index]

    def __len__(self) -> int:
        return len(self._views)


class Norms:
    """Squared gradient norm per module group of this rank's parts.

    Args:
        group_of: `id(parameter)` -> index of its group.
        groups: how many there are.
    """

    def __init__(self, engine: Any, group_of: dict[int, int], groups: int):
        self.engine, self.group_of, self.groups = engine, group_of, groups
        self._runs: list[list[int]] = []  # per list of FlatGradients: elements that follow each other in one group
        self._index: Tensor | None = None  # module group of each run

    def squared(self) -> Tensor:
        """(groups,) float64, of the gradients that there are now; to be summed over ranks."""
        norms = torch.zeros(self.groups, dtype=torch.float64, device=self.engine.device)
        if replicated(self.engine):
            return norms
        lists = list(getattr(self.engine.optimizer, "averaged_gradients", {}).values())
        if lists and all(isinstance(gradients, FlatGradients) for gradients in lists):
            if self._index is None:
                self._find_runs(norms.device)
            parts = [
                part
                for gradients, runs in zip(lists, self._runs, strict=True)
                for part in gradients.flat_partition.split_with_sizes(runs)
            ]
            index = self._index
        else:
            pairs = list(held(self.engine))
            if not pairs:
                return norms
            parts = [gradient for _, gradient in pairs]
            index = to_device(torch.tensor([self.group_of[id(p)] for p, _ in pairs]), norms.device)
        # In float64, as DeepSpeed takes the norm that it clips by.
        squares = torch.stack(torch._foreach_norm(parts, dtype=torch.float64)).square_()
        return norms.index_add_(0, index, squares.to(norms.device))

    def _find_runs(self, device: torch.device) -> None:
        lists, index = list(self.engine.optimizer.averaged_gradients.values()), []
        pairs = held(self.engine)
        for gradients in lists:
            runs: list[int] = []
            last = None
            for gradient in gradients:
                # Zeros at the end belong to no parameter.
                padding = getattr(gradient, "_zero_padding", False)
                group = last if padding else self.group_of[id(next(pairs)[0])]
                if group != last or not runs:
                    runs.append(0)
                    index.append(group or 0)
                runs[-1] += gradient.numel()
                last = group
            self._runs.append(runs)
        self._index = to_device(torch.tensor(index), device)


def know_norm(engine: Any) -> Callable[[float], contextlib.AbstractContextManager]:
    """Let DeepSpeed's optimizer take the norm of all gradients from its caller.

    DeepSpeed takes the norm of each gradient once more, and sums them over ranks in one more collective.

    Returns:
        a function that takes the norm over all ranks and gives a context: `engine.step` inside it clips by that norm;
        outside it DeepSpeed computes the norm itself.
    """
    optimizer, stage, known = engine.optimizer, engine.zero_optimization_stage(), []
    if stage == 0:
        _clip_together(engine, known)
    else:
        name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
        compute = getattr(optimizer, name)
        setattr(optimizer, name, lambda: known[-1] if known else compute())
    if stage in (1, 2):
        _clip_by_number(optimizer)

    @contextlib.contextmanager
    def knowing(norm: float) -> Iterator[None]:
        known.append([torch.tensor(norm, dtype=torch.float64)] if stage == 3 else _single(norm))
        try:
            yield
        finally:
            known.pop()

    return knowing


def _clip_together(engine: Any, known: list[float]) -> None:
    """Let a step without ZeRO clip by the norm at the end of `known`, with the bits of DeepSpeed, which takes the norm
    of each gradient, averages it over ranks that all have the same one, and copies two numbers to the device, for
    which the host waits. While `known` is empty it does so."""
    plain = engine.clip_fp32_gradients

    def clip() -> None:
        if not known:
            plain()
            return
        share = _single(_single(engine.gradient_clipping()) / _single(known[-1] + _single(1e-6)))
        if share < 1:
            held_now = [p.grad for group in engine.optimizer.param_groups for p in group["params"]]
            torch._foreach_mul_([gradient for gradient in held_now if gradient is not None], share)

    engine.clip_fp32_gradients = clip


def _clip_by_number(optimizer: Any) -> None:
    """Let ZeRO-1 and 2 clip by a norm that is a number, with the same bits: DeepSpeed does its arithmetic on tensors
    of one element, a dozen calls of torch."""
    plain = optimizer.unscale_and_clip_grads

    def clip(gradients: list[Tensor], norm: Any) -> None:
        if isinstance(norm, Tensor) or optimizer.loss_scale != 1:
            plain(gradients, norm)
            return
        most = optimizer.clip_grad
        times = _single(_single(norm + _single(1e-6)) / _single(most)) if most > 0 else 1.0
        if times > 1:
            torch._foreach_mul_(gradients, _single(1 / times))

    optimizer.unscale_and_clip_grads = clip


def _single(number: float) -> float:
    """Rounded to float32; the sum and the quotient of two such, rounded again, are those of float32."""
    return ctypes.c_float(number).value


def discard(engine: Any) -> None:
    """Skip the step; called by all ranks together. Weights, moments and Adam's counter stay as they are.

    ZeRO optimisers drop all gradients when their norm is not finite, and count the step as skipped. So every rank
    makes its parts NaN, also where its own gradients are finite. Without ZeRO the gradients are set to zero.
    """
    if engine.zero_optimization_stage() == 0:
        engine.zero_grad()
        engine.micro_steps += 1
        return
    parts = list(_parts(engine.optimizer))
    for part in parts:
        part.fill_(float("nan"))
    engine.step()
    if engine.was_step_applied():
        raise RuntimeError("DeepSpeed applied a step that all ranks had agreed to skip")
    for part in parts:
        # Stage 3 keeps these buffers, and later steps do not overwrite their padding, in which a NaN would stay.
        part.zero_()


def _parts(optimizer: Any) -> Iterator[Tensor]:
    """Tensors from which ZeRO computes the norm that decides whether it steps."""
    if getattr(optimizer, "offload_optimizer", False) or getattr(optimizer, "cpu_offload", False):
        # With offload the norms are computed during backward, one per parameter.
        for key, norm in optimizer.norm_for_param_grads.items():
            optimizer.norm_for_param_grads[key] = torch.as_tensor(norm, dtype=torch.float64).clone()
            yield optimizer.norm_for_param_grads[key]
        return
    for gradients in optimizer.averaged_gradients.values():
        yield from gradients or []


def group_names(trainables: dict[str, nn.Parameter]) -> tuple[list[str], dict[int, int]]:
    """Module groups for the curves: tower and layer (`text_model.encoder.layer.3`), else the first two names.

    Returns:
        names of the groups in model order, and `id(parameter)` -> index into them.
    """
    names: list[str] = []
    group_of: dict[int, int] = {}
    for name, parameter in trainables.items():
        parts = name.removeprefix("base_model.model.").split(".")
        numbered = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
        group = ".".join(parts[: numbered[0] + 1] if numbered else parts[:2])
        if group not in names:
            names.append(group)
        group_of[id(parameter)] = names.index(group)
    return names, group_of
