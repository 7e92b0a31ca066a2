"""The peft tuner of routed LoRA: wraps the chosen projections and norms of a model."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods._select import Selection, norms_like, select
from mmpeft_ds.methods.routed_lora.config import PEFT_TYPE, RoutedLoraConfig
from mmpeft_ds.methods.routed_lora.layer import Parts, RoutedLoraLayer, RoutedLoraLinear, TrainedNorm
from mmpeft_ds.ops.route import MIXES_TOKENS
from mmpeft_ds.sites import Sites, find_sites


class RoutedLoraModel(BaseTuner):
    """Tuner with the verbs of every peft tuner; see `RoutedLoraConfig`."""

    prefix = "routed_lora"
    tuner_layer_cls = RoutedLoraLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: RoutedLoraConfig, model_config: dict) -> RoutedLoraConfig:
        return peft_config

    def _prepare_model(self, peft_config: RoutedLoraConfig, model: nn.Module) -> None:
        sites = find_sites(model)
        chosen = checked(peft_config, sites)
        self._parts: dict[str, Parts] = {
            path: tuple((p.start, p.width) for p in parts)
            for path, parts in chosen.projections(peft_config.targets).items()
        }
        if isinstance(peft_config.train_norms, bool):
            self._norms = set(chosen.norms() if peft_config.train_norms else ())
        else:
            self._norms = set(norms_like(model, peft_config.train_norms))

    def _check_target_module_exists(self, peft_config: RoutedLoraConfig, key: str) -> bool:
        return key in self._parts or key in self._norms

    def _create_and_replace(
        self,
        peft_config: RoutedLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        parts = self._parts.get(current_key)
        layer = target
        if not isinstance(target, RoutedLoraLayer):
            layer = (TrainedNorm if parts is None else RoutedLoraLinear)(target, adapter_name)
        if parts is None:
            layer.update_layer(adapter_name, peft_config)
        else:
            layer.update_layer(adapter_name, parts, peft_config, current_key)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As every tuner; the whole modules that train beside the adapter become float32."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        heads_in_float32(model, adapter_name)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name in self.active_adapters:
            config = self.peft_config[name]
            if config.routed:
                raise BadInput(
                    f"adapter {name!r} routes by {config.route!r}: its change depends on the image and cannot be "
                    "merged into a weight. Keep it as an adapter, or train with route: none."
                )


class RoutedLora:
    """The method entry: what recipes and the engine use."""

    peft_type = PEFT_TYPE
    Config = RoutedLoraConfig
    Tuner = RoutedLoraModel
    prefix = "routed_lora"
    mergeable = False  # except with route `none`, which the tuner allows

    @staticmethod
    def check(config: RoutedLoraConfig, sites: Sites, condition_width: int | None) -> None:
        """Refuse what cannot work on these sites with a condition of this width (None: no condition).

        Raises:
            BadInput: no such tower or layer, no condition or another width, or a route that leaks future tokens.
        """
        chosen = checked(config, sites)
        if not config.routed or config.condition != "given":
            return
        if condition_width is None:
            raise BadInput(
                f"route: {config.route!r} needs a condition, which this backbone does not publish. "
                "Give the backbone one, or set route: none."
            )
        for path, projections in chosen.projections(config.targets).items():
            width = projections[0].in_width
            if width != condition_width:
                raise BadInput(
                    f"route: {config.route!r} shares one projection between text and image, but {path} takes width "
                    f"{width} and the condition has {condition_width}. Choose towers of equal width, or route: none."
                )

    @staticmethod
    def prepare(config: RoutedLoraConfig, model: nn.Module, sites: Sites) -> RoutedLoraConfig:
        """The config as it is: the tuner finds its places by itself."""
        return config

    @staticmethod
    def kinds(names: list[str]) -> dict[str, list[str]]:
        """Parameter names by what they are: `peft`, `norm`, `bias`, `head`."""
        found: dict[str, list[str]] = {"peft": [], "norm": [], "bias": [], "head": []}
        for name in names:
            found[_kind(name)].append(name)
        return found


def checked(config: RoutedLoraConfig, sites: Sites) -> Selection:
    """The sites that `config` means. Raises BadInput where it cannot be attached to them, whatever the condition."""
    chosen = select(sites, config.tower, config.layers, cross_only=config.condition.startswith("cross"))
    if config.route in MIXES_TOKENS and not config.reshape_compat and any(s.causal for s in chosen.attention):
        raise BadInput(
            f"route: {config.route!r} mixes all tokens, so a causal tower would see its future. Choose another "
            "route; reshape_compat: true reproduces the published one, leak included."
        )
    return chosen


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


def _kind(name: str) -> str:
    if ".modules_to_save." in name:
        return "head"
    if ".routed_lora_norm." in name:
        return "norm"
    if re.search(r"\.routed_lora\.(?:[^.]+\.)?bias$", name):
        return "bias"
    return "peft" if ".routed_lora." in name else "head"


ENTRY = RoutedLora
