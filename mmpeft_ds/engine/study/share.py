"""Models over one frozen base: copies of its modules with the same parameters, and modules that run once for all."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mmpeft_ds.backbones.common.model_hooks import model_hooks
from mmpeft_ds.backbones.common.quantised import stored
from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.engine.frozen_images import FrozenImages
from mmpeft_ds.engine.study.work import SharedWork
from mmpeft_ds.sites.unread import LastLayer


def copy_of(base: nn.Module) -> nn.Module:
    """A copy of a base for one more adapter: new modules and buffers around the same frozen parameters.

    The parameters of heads are copied too, since heads train.
    """
    own = {id(p) for path in model_hooks(base).head_modules for p in base.get_submodule(path).parameters()}
    return copy.deepcopy(base, {id(p): p for p in base.parameters() if id(p) not in own})


def share(model: nn.Module, base: nn.Module) -> None:
    """Let `model`, loaded apart, use the parameters of `base` wherever they hold the same bits.

    Parameters that depend on the seed, such as those of a head, stay separate.
    """
    heads = tuple(model_hooks(base).head_modules)
    modules = dict(base.named_modules())
    for path, module in model.named_modules():
        if any(path == head or path.startswith(f"{head}.") for head in heads):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and _same_bits(parameter, modules[path]._parameters[name]):
                module._parameters[name] = modules[path]._parameters[name]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    parts, others = stored(one), stored(other)
    return parts.keys() == others.keys() and all(
        part.dtype == others[key].dtype and torch.equal(part, others[key]) for key, part in parts.items()
    )


def frozen_modules(model: nn.Module, base: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of a model with adapters, for unchanged modules that hold only frozen parameters of `base`.

    A module that has hooks on the modules inside it is left out, since these hooks would not run.

    Args:
        model: the base model, adapters in place.
    """
    before = dict(base.named_modules())
    shared = {id(p) for p in base.parameters()}
    skipped = {id(part) for part in LastLayer(model).parts}  # these check whether their forward was replaced
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    skipped |= {id(head)}
    paths = {id(module): path for path, module in model.named_modules()}  # a module may have several paths

    @functools.cache
    def as_before(module: nn.Module) -> bool:
        own = all(id(p) in shared and not p.requires_grad for p in module.parameters(recurse=False))
        hooked = any(child._forward_hooks or child._forward_pre_hooks for child in module.children())
        untouched = own and not hooked and _untouched(module, before.get(paths[id(module)]))
        return untouched and all(map(as_before, module.children()))

    def takes_part(path: str, module: nn.Module) -> bool:
        runs = type(module).forward is not nn.Module.forward and "forward" not in vars(module)
        holds = next(module.parameters(), None) is not None
        return bool(path) and runs and holds and id(module) not in skipped and as_before(module)

    return {path: module for path, module in model.named_modules() if takes_part(path, module)}


def _untouched(module: nn.Module, before: nn.Module | None) -> bool:
    """Whether a module, not counting its children, has the type and the buffers of the base's module."""
    if type(module) is not type(before) or module._buffers.keys() != before._buffers.keys():
        return False
    pairs = ((buffer, before._buffers[name]) for name, buffer in module._buffers.items())
    return all(b is c or (b is not None and c is not None and torch.equal(b, c)) for b, c in pairs)


class Sharing:
    """Shares the computation of one model's frozen modules with other models.

    A module can be shared if it comes before the lowest trained layer. This is observed in the first training step,
    in which none of its inputs requires a gradient.

    Args:
        model: the base model, adapters in place.
        base: the same model before adapters were attached.
        prefix: paths of modules that are known to come before the lowest trained layer.

    Attributes:
        learned: whether the first step is over.
        shared: paths of the modules that run once for all models that have them.
    """

    def __init__(self, model: nn.Module, base: nn.Module, work: SharedWork, prefix: Sequence[str] = ()):
        self.model, self.work = model, work
        self._candidates = frozen_modules(model, base)
        self.learned = False
        self.shared: list[str] = []
        self._join([path for path in self._candidates if path in {*prefix, *work.known}])

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Context of the first optimizer step."""
        self._join([path for path in self._candidates if path in self.work.known])  # shared by earlier members
        behind: dict[str, bool] = {}

        def seen(path: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, kwargs: Any) -> None:
                tensors = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
                behind[path] = behind.get(path, False) or any(x.requires_grad for x in tensors)

            return note

        handles = [
            module.register_forward_pre_hook(seen(path), with_kwargs=True)
            for path, module in self._candidates.items()
            if path not in self.shared
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._join([path for path, is_behind in behind.items() if not is_behind])
        self.learned = True

    def _join(self, before: list[str]) -> None:
        """Share these modules before the lowest trained layer, except those inside another one of them."""
        all_of_them = {*before, *self.shared}
        inner = {path for path in before if any(path.startswith(f"{other}.") for other in all_of_them)}
        outer = [path for path in before if path not in inner and path not in self.shared]
        self.shared = sorted({*self.shared, *outer})
        self.work.known.update(outer)
        for path in outer:
            module = self._candidates[path]
            module.forward = _Once(self.work, path, module, module.forward)


class SharedImages:
    """Outputs of towers for images that `frozen_images` computes, filled in once for all models."""

    def __init__(self, images: FrozenImages, work: SharedWork):
        self._images, self._work = images, work

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)

    def fill(self, batch: PackedBatch, passes: int) -> PackedBatch:
        """See `FrozenImages.fill`."""
        if batch.image_places is None or not len(batch.image_places):
            return batch
        filled = self._work.once(
            "frozen images", (batch.image_places,), lambda: self._images.fill(batch, passes).images
        )
        return dataclasses.replace(batch, images=filled, image_places=None)


class _Once:
    """Forward of a module, computed once for several models."""

    def __init__(self, work: SharedWork, path: str, module: nn.Module, plain: Callable[..., Any]):
        self.work, self.path, self.module, self.plain = work, path, module, plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.module.training:  # dropout differs from model to model
            return self.plain(*args, **kwargs)
        return self.work.once(self.path, (args, kwargs), lambda: self.plain(*args, **kwargs))
