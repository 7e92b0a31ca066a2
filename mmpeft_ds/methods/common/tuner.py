"""Base of every method's tuner: places found by the sites, float32 heads, sorting of parameter names."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.fit import file_names, misfit, shapes
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.low_rank import NO_PRODUCT
from mmpeft_ds.methods.common.select import check_whole_modules
from mmpeft_ds.sites.base import base_layer
from mmpeft_ds.sites.feature_site import calibrated_buffers
from mmpeft_ds.sites.once import keeping

# What peft adds to `modules_to_save` for its task types, whichever of them the model has.
NAMED_BY_PEFT = {"classifier", "score"}


class SiteTuner(BaseTuner):
    """A tuner whose places are full paths found by the sites, not a list of module names.

    A subclass sets `prefix` and gives `places` and `wrap`; the verbs are those of every peft tuner.
    """

    tuner_layer_cls = SiteLayer
    target_module_mapping: dict[str, list[str]] = {}

    def places(self, config: PeftConfig, model: nn.Module) -> dict[str, Any]:
        """Full path of each module to wrap, and what `wrap` needs to know about it. Raises BadInput."""
        raise NotImplementedError

    def wrap(self, config: PeftConfig, adapter_name: str, target: nn.Module, place: Any, path: str) -> nn.Module:
        """`target` in a layer that holds this adapter; a `target` that is such a layer already gets one more."""
        raise NotImplementedError

    @classmethod
    def unmergeable(cls, config: PeftConfig) -> str | None:
        """Reason why an adapter with this config cannot be merged into the frozen weights, in a sentence; None where
        it can.

        Default: it can.
        """
        return None

    @classmethod
    def no_lora(cls, config: PeftConfig) -> str | None:
        """Reason why an adapter with this config cannot be written as a LoRA, in a sentence; None where its layers
        give `lora_factors`.

        Default: what `unmergeable` says, or that its change has not this form.
        """
        return cls.unmergeable(config) or NO_PRODUCT

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the mean of two such adapters is no adapter of the mean. Raises BadInput."""
        raise BadInput(
            f"add_weighted_adapter: adapters of {self._method} cannot be combined into one. Keep them side by side "
            "and choose by set_adapter(name)."
        )

    @property
    def _method(self) -> str:
        return next(iter(self.peft_config.values())).peft_type.lower()

    def _apply(self, fn: Any, recurse: bool = True) -> SiteTuner:
        before = self._trained_dtypes()
        super()._apply(fn, recurse)
        if torch.float32 in before and (halved := self._trained_dtypes() & {torch.float16, torch.bfloat16}):
            dtype = str(next(iter(halved)))
            warnings.warn(
                f"the trained parameters of {self._method} are {dtype} now, which loses small updates and what they "
                f"hold beyond its precision. Cast the base before attaching: base.to({dtype}), then "
                "peft.get_peft_model(base, config); the adapter stays float32 and casts at its edges.",
                stacklevel=3,
            )
        return self

    def _trained_dtypes(self) -> set[torch.dtype]:
        return {p.dtype for p in self.parameters() if p.requires_grad}

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for path, module in self.model.named_modules():
            if isinstance(module, SiteLayer) and is_quantised(base_layer(module)):
                raise BadInput(
                    f"{path}: its frozen weights are quantised, so nothing can be added to them. Merge into the "
                    "dequantised or the original ones: launchers/merge.py."
                )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As every tuner. Raises BadInput for an adapter that is no change of a weight, or is not there."""
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As every tuner. Raises BadInput for an adapter that is no change of a weight, or is not there."""
        self._check_mergeable(adapter_names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        if isinstance(adapter_names, str):
            adapter_names = [adapter_names]  # which peft refuses itself
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.peft_config:
                raise BadInput(f"adapter_names: no adapter {name!r}. Known: {', '.join(self.peft_config)}.")
            if reason := self.unmergeable(self.peft_config[name]):
                raise BadInput(f"adapter {name!r} cannot be merged: {reason} Keep it as an adapter.")

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """The context that peft enters around each forward with its arguments: layers share what is computed `once`.
        Raises BadInput for `adapter_names`, which peft would ignore."""
        if adapter_names is not None:
            raise BadInput(
                f"adapter_names: a layer of {self._method} runs the same adapter for all rows of a batch. Choose it "
                "by set_adapter(name), and run the rows of each adapter by themselves."
            )
        with keeping({}):
            yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # peft's finds the name only at the end of a key or one before it; our layers hold modules of several parts. A
        # name that stayed in the file would tie it to loading under that name.
        return re.sub(rf"(\.{re.escape(cls.prefix)}[^.]*)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key, count=1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Overrides a function of peft that every way of loading calls, to refuse a file that does not fit. Raises
        BadInput."""
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        here = model.state_dict()
        needed = {name for name, _ in model.named_parameters()} | calibrated_buffers(model).keys()
        known = {name: tuple(here[name].shape) for name in file_names(model, here, adapter_name).values()}
        wanted = {name: shape for name, shape in known.items() if name in needed or name in state}
        if problem := misfit(shapes(state), wanted):
            raise BadInput(
                f"the adapter file does not fit the model: {problem}. Take the adapter_model.safetensors and "
                "adapter_config.json of one run, and the base model of that run."
            )
        return state

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        if not peft_config.inference_mode:
            check_whole_modules(set(peft_config.modules_to_save or ()) - NAMED_BY_PEFT, model)
        self._places = self.places(peft_config, model)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return key in self._places

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = self.wrap(peft_config, adapter_name, target, self._places[current_key], current_key)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # peft's moves the new layer to where the weight of the old one is; ours is made there, and around a dropout
        # there is no weight.
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; the `modules_to_save` that train with it become float32."""
        _check_name(adapter_name, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _check_name(adapter_name, model)  # now with the layers of the method
        # peft's `convert_to_lora` asks the config where layers are; it is no field, and in no file.
        self.peft_config[adapter_name].target_modules = set(self.targeted_module_names)
        heads_in_float32(model, adapter_name)


def _check_name(adapter_name: str, model: nn.Module) -> None:
    """Refuse a name that is also one of a module or parameter of `model`. Raises BadInput.

    peft leaves out of the file of an adapter whatever has the name of another in its path: the file would be empty.
    """
    by_name = (nn.ModuleDict, nn.ParameterDict)  # such as of adapters
    owners = [module for module in model.modules() if not isinstance(module, by_name)]
    if "." in adapter_name or any(adapter_name in (*m._modules, *m._parameters, *m._buffers) for m in owners):
        why = "holds a dot" if "." in adapter_name else "is the name of a part of the model"
        raise BadInput(f"adapter_name: {adapter_name!r} {why}, so peft could not tell its tensors. Choose another.")


def is_quantised(frozen: nn.Module) -> bool:
    """Whether the weights of a frozen module are of a class of their own, as those of bitsandbytes and torchao."""
    return type(vars(frozen)["_parameters"].get("weight")) not in (nn.Parameter, type(None))


def heads_in_float32(model: nn.Module, adapter_name: str) -> None:
    """Whole modules that train beside an adapter are float32 too, and cast what they get."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            head = module.modules_to_save[adapter_name]
            half = [p for p in head.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
            if half:
                head.float()
                head.register_forward_pre_hook(to_float32)


def to_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of a float32 module in a half precision model."""
    return tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
