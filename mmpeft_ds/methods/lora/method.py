"""Plain LoRA from peft itself, placed by the sites: its adapter loads with stock peft alone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import SiteMethod, StartData
from mmpeft_ds.methods.common.select import Selection, default_selection, stored_in_by_out
from mmpeft_ds.methods.lora import data_start, eva, layer, loftq, start
from mmpeft_ds.methods.lora.options import FROM_DATA, REWRITING, LoraOptions
from mmpeft_ds.recipe.parse import Origin, typed
from mmpeft_ds.sites import Sites

_SUBCONFIGS = {"corda_config": CordaConfig, "lora_ga_config": LoraGAConfig}


class Lora(SiteMethod):
    """q and v of every layer of the text towers, unless `target_modules` says otherwise.

    On a base of half precision peft's unmerging, and disabling while merged, leave a third to a half of the adapted
    weights changed, and a fresh DoRA (`use_dora`) changes the outputs.
    """

    Options = LoraOptions
    Config = LoraConfig
    peft_type = "LORA"
    prefix = "lora_"

    @classmethod
    def config(cls, options: LoraOptions, origin: Origin) -> LoraConfig:
        """The peft config; peft's own type of `init_lora_weights` lacks `pissa_niter_4`."""
        own = {"init_lora_weights": True, "start_batches": LoraOptions.start_batches}
        own |= dict.fromkeys(_SUBCONFIGS)
        given = str(options.init_lora_weights)
        changed = REWRITING.fullmatch(given) or given == "loftq"
        config = super().config(dataclasses.replace(options, **own) if changed else options, origin)
        if changed:
            config.init_lora_weights = given
            config.start_batches = options.start_batches  # no field of peft's, so that it is in no adapter directory
            for key, kind in _SUBCONFIGS.items():
                if given == key.removesuffix("_config"):
                    setattr(config, key, typed(kind, getattr(options, key) or {}, f"method.{key}", origin))
        return config

    @classmethod
    def check(cls, config: LoraConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no tower to attach to."""
        if config.target_modules is None and not config.target_parameters:
            _chosen(config, sites)

    @classmethod
    def prepare(cls, config: LoraConfig, model: nn.Module, sites: Sites) -> LoraConfig:
        """Fill `target_modules` with full paths."""
        if config.target_parameters:
            _check_parameters(config, model)
            config.target_modules = config.target_modules or []
        if config.target_modules is None:
            chosen = _chosen(config, sites)
            config.target_modules = set(chosen.projections(("q", "v")))
            config.layers_to_transform = config.layers_pattern = None  # the paths say it already
            config.fan_in_fan_out = stored_in_by_out(model, config.target_modules)
        return config

    @classmethod
    def attach(cls, config: LoraConfig, model: nn.Module) -> PeftModel:
        """Attach by peft, except that `pissa` and similar starts leave the frozen weights alone (see `start`), and
        that one function computes a Linear and its low-rank term (see `layer`)."""
        given = str(config.init_lora_weights)
        rewriting = REWRITING.fullmatch(given)
        if not rewriting and given != "loftq":
            wrapped = super().attach(config, model)
            layer.use_one_function(wrapped)
            return wrapped
        plain = copy.copy(config)
        plain.init_lora_weights, plain.begun_by = True, given
        wrapped = super().attach(plain, model)
        if given == "loftq":
            loftq.check(wrapped)
        elif given in FROM_DATA:
            start.place(wrapped, given)
        else:
            start.begin(wrapped, given)
        return wrapped

    @classmethod
    def reads_batches(cls, config: LoraConfig) -> bool:
        """To start by `eva`, `corda`, `lora_ga` or `loftq`."""
        return config.init_lora_weights in FROM_DATA

    @classmethod
    def start(cls, model: PeftModel, data: StartData) -> None:
        """By `eva`, `corda` and `lora_ga` from inputs or gradients of each layer, by `loftq` from what its quantised
        weight has lost."""
        by = vars(model.active_peft_config).get("begun_by", "eva")
        {"eva": eva.begin, "loftq": loftq.begin}.get(by, data_start.begin)(model, data)

    @classmethod
    def restart(cls, model: PeftModel, shapes: Mapping[str, Sequence[int]]) -> None:
        """The ranks that `eva` has shared out; the starts of others are values alone, which a checkpoint holds."""
        if model.active_peft_config.init_lora_weights == "eva":
            eva.take_ranks(model, shapes)

    @classmethod
    def saved_tensors(cls, model: PeftModel, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """For `pissa` and other starts that peft would subtract from the base: the factors of a plain LoRA, trained
        minus start."""
        return start.joined(model, trained)

    @classmethod
    def saved_fields(cls, config: LoraConfig) -> dict[str, Any]:
        """For `pissa` and similar starts: fields of a plain LoRA of twice the rank and the same scale. `eva` and
        `loftq` are removed, since peft could not repeat their start."""
        if config.init_lora_weights == "eva":
            return {"init_lora_weights": True, "eva_config": None}
        if config.init_lora_weights == "loftq":
            return {"init_lora_weights": True}
        return start.plain_fields(config) if REWRITING.fullmatch(str(config.init_lora_weights)) else {}

    @classmethod
    def no_lora(cls, config: LoraConfig) -> str | None:
        """A variant that does more than to add a product."""
        for key in ("use_dora", "use_bdlora", "lora_bias", "trainable_token_indices", "target_parameters"):
            if getattr(config, key, None):
                return f"{key}: it is more than a low-rank change of weights."
        if config.bias != "none":
            return f"bias: {config.bias}: trained biases are no low-rank change of weights."
        return None

    @classmethod
    def lora_pairs(cls, model: PeftModel, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of peft's layers, with the scale in the second one."""
        return {
            path: start.pair(module, path, adapter_name)
            for path, module in model.named_modules()
            if isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters()
        }

    @classmethod
    def kind(cls, name: str) -> str:
        """Kind of a parameter; with `bias: all` or `lora_only` peft trains the biases of the frozen layers
        themselves."""
        return "bias" if name.endswith("base_layer.bias") else super().kind(name)


def _check_parameters(config: LoraConfig, model: nn.Module) -> None:
    """Refuse names of `target_parameters` of which the model has no matrix, or stack of them. Raises BadInput."""
    names = [name for name, parameter in model.named_parameters() if _dimensions(parameter) in (2, 3)]
    for wanted in config.target_parameters:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            stacks = {name.rpartition(".layers.")[2].partition(".")[2] for name in names if ".experts." in name}
            known = f" Experts are named {', '.join(sorted(stacks))}." if stacks else " It has no experts."
            raise BadInput(f"target_parameters: {wanted!r} fits no weight of the model.{known}")


def _dimensions(parameter: Tensor) -> int:
    """Number of dimensions of a weight, also where it is partitioned."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _chosen(config: LoraConfig, sites: Sites) -> Selection:
    layers = config.layers_to_transform
    return default_selection(sites, [layers] if isinstance(layers, int) else layers)


ENTRY = Lora
