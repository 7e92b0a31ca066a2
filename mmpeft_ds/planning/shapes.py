"""A step without numbers: the operations of a model on the meta device, counted as they run.

Weights, pixels and states are meta tensors, which have a shape and no memory. Token ids, masks and owners stay on the
CPU with their values, since models read them: where images stand, how long a text is. So the very classes that train
run here, and what is counted is what they do.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmpeft_ds.errors import BadInput

aten = torch.ops.aten
META = torch.device("meta")
# The values of their results depend on no tensor, so integers of theirs can be real.
_LIKE = {
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
    aten.new_empty_strided.default,
}  # fmt: skip
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_CHOSEN = {aten.index.Tensor, aten.index_select.default}
BY_NUMBERS = "this model chooses its way by numbers that only a real step has, so it cannot be counted."


class Live:
    """Bytes of the tensors that exist, each storage once, from their creation to their end.

    Attributes:
        now: bytes of the live storages.
        peak: the most so far.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._recent: Counter[str] = Counter()  # by who asks
        self._known: dict[int, weakref.ref] = {}

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is known; a sparse one's parts are seen by themselves."""
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, functools.partial(self._gone, key, size))
        self.now += size
        self.peak = max(self.peak, self.now)
        for who, most in self._recent.items():
            self._recent[who] = max(most, self.now)

    def ignore(self, tensor: Tensor) -> None:
        """Leave a tensor out, such as a weight, which is accounted for elsewhere."""
        storage = tensor.untyped_storage()
        key = id(storage)  # which another storage may get after the end of this one
        self._known.setdefault(key, weakref.ref(storage, functools.partial(self._gone, key, 0)))

    def recent(self, who: str) -> int:
        """The most since the last call of the same, or since its first one."""
        most, self._recent[who] = self._recent.get(who, self.now), self.now
        return most

    def _gone(self, key: int, size: int, _: Any) -> None:
        del self._known[key]
        self.now -= size


class Counting(TorchDispatchMode):
    """Runs every operation by shapes alone, and counts what it would compute and allocate.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention, by dtype of the first factor;
            a multiplication and an addition are two.
        moved: bytes that operations read and write, each by itself, as where nothing is fused.
        live: of the tensors that they make.
    """

    def __init__(self, live: Live | None = None):
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()
        self.moved = 0
        self.live = live or Live()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = _run(func, args, kwargs)
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self.live.see(tensor)
        if func._overloadpacket in flop_registry:
            first = next(leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor))
            self.flops[first.dtype] += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if not func.is_view and func is not aten.detach.default:
            read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved += sum(t.numel() * t.element_size() for t in (*made, *read))
        return out


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Result of `func` computed from shapes, or from values where all its tensors have values."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    meta = [t for t in tensors if t.device == META]
    if func is aten._local_scalar_dense.default and meta:
        return _guess(meta[0])
    mixed = bool(meta) and len(meta) < len(tensors)
    if func is aten._to_copy.default or (func is aten.copy_.default and mixed):
        moved = _copied(func, args, kwargs)
        if moved is not NotImplemented:
            return moved
    if (kwargs.get("device") == META and not tensors) or func in _LIKE:
        made = func(*args, **{**kwargs, "device": META})
        if (made.dtype.is_floating_point or made.dtype.is_complex) and func is not aten.ones.default:  # that is a mask
            return made
        return func(*args, **{**kwargs, "device": torch.device("cpu")}) if not meta else _real_like(func, args, kwargs)
    if not mixed:
        return _called(func, args, kwargs)
    if func in _CHOSEN and args[0].device != META and not args[0].is_floating_point():
        # The samples of a plan are alike, so it does not matter which of them a number that is not known chooses.
        return func(*pytree.tree_map_only(Tensor, _as_first, args), **kwargs)
    if func in _INDEXED:
        args = (args[0], _as_numbers(args[1]), *args[2:])
    if func is aten.masked_select.default:
        return _run(aten.index.Tensor, (args[0], [args[1]]), {})
    return _called(func, *pytree.tree_map_only(Tensor, _shape_only, (args, kwargs)))


def _called(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    try:
        return func(*args, **kwargs)
    except NotImplementedError as error:
        # How many a mask chooses, such as of the frames of videos, and products of graphs, which are sparse matrices.
        if "nonzero" in str(error) or "Sparse" in str(error):
            raise BadInput(BY_NUMBERS) from error
        raise


def _real_like(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """An integer tensor made in the shape or beside a meta tensor, with real values."""
    template = torch.empty(args[0].shape, dtype=args[0].dtype, device="cpu")
    return func(template, *args[1:], **{**kwargs, "device": torch.device("cpu")})


def _copied(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A copy between devices: integers, booleans and vectors keep their values; NotImplemented where it is a plain
    one."""
    if func is aten.copy_.default:
        target, source = args[:2]
        # A CPU tensor that gets what has no values keeps what it has.
        return target if target.device != META else func(target, _shape_only(source))
    source, dtype = args[0], kwargs.get("dtype") or args[0].dtype
    if source.device == META and kwargs.get("device") not in (None, META):
        return func(source, **{**kwargs, "device": META})  # such as a buffer of the model that goes to its input
    if kwargs.get("device") != META or source.device == META:
        return NotImplemented
    # Vectors, such as the weights of samples, choose what takes part.
    values = not (dtype.is_floating_point or dtype.is_complex) or source.dim() <= 1
    return func(source, **{**kwargs, "device": torch.device("cpu") if values else META})


def _as_numbers(indices: Any) -> list[Tensor | None]:
    """Indices with boolean masks replaced by the numbers of what they choose."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and index.device != META:
            numbers += list(index.nonzero(as_tuple=True))
        else:
            numbers.append(index)
    return numbers


def _as_first(tensor: Tensor) -> Tensor:
    """Zeros in place of integers without values."""
    return tensor if tensor.device != META else torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


def _shape_only(tensor: Tensor) -> Tensor:
    return tensor if tensor.device == META else torch.empty_like(tensor, device=META)


def _guess(tensor: Tensor) -> float:
    """A number that only values would give: 1 in place of a float, such as a scale."""
    if tensor.dtype.is_floating_point:
        return 1.0
    raise BadInput(BY_NUMBERS)


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Shape of torch's scaled_dot_product_attention, by the kernel that a GPU takes; arguments as there.

    The meta device would take plain products. Half precision without a mask is what flash attention runs, everything
    else the memory-efficient kernel; neither keeps the scores.
    """
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and attn_mask is None and query.dim() == 4:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # the kernel adds the mask, so torch makes an additive one of a boolean one
            attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=META)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    needs = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs, dropout_p, is_causal, scale=scale
    )[0]


class _Autocast(torch.autocast):
    """torch's, which does not know the meta device; there it changes nothing."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


@contextlib.contextmanager
def counting(live: Live | None = None) -> Iterator[Counting]:
    """Count all that runs inside."""
    plain, autocast = functional.scaled_dot_product_attention, torch.autocast
    functional.scaled_dot_product_attention, torch.autocast = fused_attention, _Autocast
    try:
        with Counting(live) as mode:
            yield mode
    finally:
        functional.scaled_dot_product_attention, torch.autocast = plain, autocast
