"""Every type of peft as one method: its own config and layers, at the places that the sites find."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from mmpeft_ds.distributed.partitioned import gathered
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import SiteMethod, StartData
from mmpeft_ds.methods.common.brought import file_tensors
from mmpeft_ds.methods.common.select import Selection, default_selection, select, stored_in_by_out
from mmpeft_ds.methods.common.tuner import is_quantised
from mmpeft_ds.methods.ia3.method import IA3
from mmpeft_ds.methods.lora.method import Lora
from mmpeft_ds.methods.peft.kinds import KINDS, Kind
from mmpeft_ds.methods.peft.options import METHODS, PeftOptions
from mmpeft_ds.recipe.parse import Origin, one_line, typed
from mmpeft_ds.sites import Sites

# Types that are methods by themselves: what those do with a config is done here too.
_OWN: dict[str, type[SiteMethod]] = {"LORA": Lora, "IA3": IA3}
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Placing:
    """Targets of a type, from `PeftOptions`; they travel on the config until the model is known."""

    tower: str | list[str] | None = None
    layers: list[int] | None = None
    targets: list[str] | None = None

    def chosen(self, sites: Sites, layers: list[int] | None) -> Selection:
        """The sites of the chosen towers and layers. Raises BadInput."""
        wanted = self.layers if self.layers is not None else layers
        return default_selection(sites, wanted) if self.tower is None else select(sites, self.tower, wanted)

    def paths(self, kind: Kind, chosen: Selection) -> list[str]:
        """Full paths of the modules to adapt. Raises BadInput."""
        places = self.targets or kind.places
        if places == ("norm",):
            return chosen.norms()
        paths = [*chosen.projections(places)]
        for site in chosen.ffn:
            of_block = {"up": site.up, "gate": site.gate, "down": site.down}
            paths += [of_block[name].path for name in of_block if name in places and of_block[name] is not None]
        if not paths:
            raise BadInput(f"targets: the chosen layers have none of {', '.join(places)}.")
        return list(dict.fromkeys(paths))


class Peft(SiteMethod):
    """Any type of peft. The class of the config follows from `type`; `Config` is what all of them have in common."""

    Options = PeftOptions
    Config = PeftConfig
    peft_type = None
    prefix = ""
    # Factors and biases kept as one row or column; lists of vectors of a bank, of reflections, of rotations' entries.
    tables = (
        *(*IA3.tables, ".beft_bias.", ".boft_s.", ".randlora_lambda.", ".randlora_gamma."),
        *(".vblora_vector_bank.", ".hra_u.", ".oft_R."),
    )

    @classmethod
    def config(cls, options: PeftOptions, origin: Origin) -> PeftConfig:
        """The config of the type. Raises BadInput."""
        kind = options.kind
        if kind.refused:
            raise BadInput(f"{origin('method.type')}: {options.type} is not offered: {kind.refused}.")
        given = kind.defaults | options.options
        if options.modules_to_save is not None:
            given["modules_to_save"] = options.modules_to_save
        config = _config(options.type, given, origin)
        config.placing = Placing(options.tower, options.layers, options.targets)
        return config

    @classmethod
    def check(cls, config: PeftConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no tower, layer or place to attach to."""
        if _placed_by_sites(config):
            _placing(config).paths(_kind(config), _chosen(config, sites))

    @classmethod
    def prepare(cls, config: PeftConfig, model: nn.Module, sites: Sites) -> PeftConfig:
        """Fill `target_modules` with full paths."""
        if "modules_to_save" not in vars(config):
            config.modules_to_save = None
        placing, own = _placing(config), _OWN.get(config.peft_type)
        if own is not None and placing == Placing():
            return own.prepare(config, model, sites)
        if _placed_by_sites(config):
            chosen = _chosen(config, sites)
            config.target_modules = set(placing.paths(_kind(config), chosen))
            for name in {"layers_to_transform", "layers_pattern"} & vars(config).keys():
                setattr(config, name, None)  # the paths say it already
            if "feedforward_modules" in vars(config) and config.feedforward_modules is None:
                config.feedforward_modules = {site.down.path for site in chosen.ffn} & config.target_modules
            if "fan_in_fan_out" in vars(config):
                config.fan_in_fan_out = stored_in_by_out(model, config.target_modules)
        return config

    @classmethod
    def attach(cls, config: PeftConfig, model: nn.Module) -> PeftModel:
        """Attach by peft, layer by layer with the full frozen weight. Refused where peft would change that weight or
        train in half precision (BadInput)."""
        if config.peft_type in _OWN:
            return _OWN[config.peft_type].attach(config, model)
        name, kind = config.peft_type.value.lower(), _kind(config)
        forms = {type(module.weight).__name__ for module in model.modules() if is_quantised(module)}
        in_linears = kind.places not in (("norm",), ())
        if forms and in_linears and not (kind.nf4 and forms == {"Params4bit"}):
            raise BadInput(
                f"type: {name} is not offered over this quantised base: peft's layer of it reads float weights. Use "
                "lora, or backbone.quantise: none."
            )
        if config.modules_to_save and "modules_to_save" not in _fields(type(config)):
            raise BadInput(
                f"type: {name} trains nothing beside it, and {', '.join(config.modules_to_save)} has to be trained "
                "whole here. Use type lora with options.trainable_token_indices."
            )
        on_meta = next(model.parameters()).is_meta
        if on_meta and kind.weights:
            raise BadInput(
                f"type: {name} needs the frozen weights when it is attached, and here they are not loaded. It "
                "trains without --check, and without engine.cache_frozen and engine.tower_batch."
            )
        try:
            own = torch.device("cpu") if on_meta and kind.values else contextlib.nullcontext()
            with _watched(config.peft_type), own:
                wrapped = super().attach(config, model)
            wrapped.base_model.__class__ = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        except BadInput:
            raise
        except (TypeError, ValueError, NotImplementedError, ImportError, AttributeError, AssertionError) as error:
            raise BadInput(f"type: {name} cannot be attached ({one_line(error)}).") from error
        halved = [n for n, p in wrapped.named_parameters() if p.requires_grad and p.dtype in _HALF]
        if halved:
            raise BadInput(
                f"type: {name} trains {halved[0]} in half precision, where small updates are lost. Use "
                "engine.dtype: float32."
            )
        _check_lookups(wrapped)
        return wrapped

    @classmethod
    def reads_batches(cls, config: PeftConfig) -> bool:
        """As the method that bears the type's name, `lora` or `ia3`."""
        return config.peft_type in _OWN and _OWN[config.peft_type].reads_batches(config)

    @classmethod
    def start(cls, model: PeftModel, data: StartData) -> None:
        """As the method that bears the type's name, `lora` or `ia3`."""
        _OWN[model.active_peft_config.peft_type].start(model, data)

    @classmethod
    def restart(cls, model: PeftModel, shapes: Mapping[str, Sequence[int]]) -> None:
        """As the method that bears the type's name, `lora` or `ia3`."""
        _OWN[model.active_peft_config.peft_type].restart(model, shapes)

    @classmethod
    def saved_tensors(cls, model: PeftModel, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Trained tensors, and others that peft writes."""
        config = model.active_peft_config
        if config.peft_type in _OWN:
            return _OWN[config.peft_type].saved_tensors(model, trained)
        return {name: tensor.cpu() for name, tensor in file_tensors(model, trained).values()}

    @classmethod
    def file_tensors(cls, model: PeftModel, trained: dict[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        """Tensors in the form in which `saved_tensors` writes them."""
        return file_tensors(model, trained)

    @classmethod
    def saved_fields(cls, config: PeftConfig) -> dict[str, Any]:
        """Those of the method that the type is by itself."""
        return _OWN[config.peft_type].saved_fields(config) if config.peft_type in _OWN else {}

    @classmethod
    def unpackable(cls, config: PeftConfig, attention: str) -> str | None:
        """A type that mixes tokens would mix those of all texts of a row."""
        return _kind(config).mixes or None

    @classmethod
    def unmergeable(cls, config: PeftConfig) -> str | None:
        """Reason why the type does not merge, from the table of types."""
        return _kind(config).unmergeable or None

    @classmethod
    def no_lora(cls, config: PeftConfig) -> str | None:
        """Reason why the change is no LoRA, except for type lora; peft's `save_as_lora` approximates some of the
        others."""
        if config.peft_type == PeftType.LORA:
            return Lora.no_lora(config)
        return "its change has not the form of a LoRA; peft's own save_as_lora approximates that of some types."

    @classmethod
    def lora_pairs(cls, model: PeftModel, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """See the method `lora`."""
        return Lora.lora_pairs(model, adapter_name)

    @classmethod
    def kind(cls, name: str) -> str:
        """Prefixes differ by type: what is no whole module and no bias of a frozen layer is the adapter."""
        if ".modules_to_save." in name:
            return "head"
        if name.endswith("base_layer.bias"):
            return "bias"
        return "norm" if ".ln_tuning_layers." in name else "peft"


def _config(name: str, given: dict[str, Any], origin: Origin) -> PeftConfig:
    """The config of a type from the fields that a recipe gives. Raises BadInput."""
    if name in METHODS:
        return _OWN[name.upper()].config(typed(METHODS[name], given, "method.options", origin), origin)
    known = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())]
    try:
        return typed(known, given, "method.options", origin, list(_fields(known).values()))
    except ImportError as error:
        raise BadInput(f"{origin('method.type')}: {name}: {one_line(error)}") from error


def _fields(known: type[PeftConfig]) -> dict[str, dataclasses.Field]:
    """Fields of a type's config, without those that every config has."""
    common = {f.name for f in dataclasses.fields(PeftConfig)}
    return {f.name: f for f in dataclasses.fields(known) if f.name not in common}


def _kind(config: PeftConfig) -> Kind:
    return KINDS[config.peft_type.value.lower()]


def _placing(config: PeftConfig) -> Placing:
    return vars(config).get("placing", Placing())


def _placed_by_sites(config: PeftConfig) -> bool:
    return bool(_kind(config).places) and config.target_modules is None


def _chosen(config: PeftConfig, sites: Sites) -> Selection:
    layers = vars(config).get("layers_to_transform")
    return _placing(config).chosen(sites, [layers] if isinstance(layers, int) else layers)


def _check_lookups(model: PeftModel) -> None:
    """Refuse single tokens in an embedding that does more than look up, which peft's layer leaves out."""
    for path, module in model.named_modules():
        # a Linear is an output layer that shares the weights of the embedding
        if isinstance(module, TrainableTokensLayer) and type(base := module.get_base_layer()) not in (
            nn.Embedding,
            nn.Linear,
        ):
            kind, path = type(base).__name__, path.removeprefix("base_model.model.")
            raise BadInput(f"type: trainable_tokens cannot stand for {path} ({kind}), which does more than look up.")


@contextlib.contextmanager
def _watched(peft_type: PeftType) -> Iterator[None]:
    """Inside, peft makes layers of this type with the frozen module gathered, and must leave its weights alone."""
    tuner, kind = PEFT_TYPE_TO_TUNER_MAPPING[peft_type], KINDS[peft_type.value.lower()]

    class Watched(tuner):
        def _create_and_replace(
            self, config: PeftConfig, name: str, target: nn.Module, *args: Any, **more: Any
        ) -> None:
            frozen = list(target.parameters())
            with gathered([] if kind.gathers else frozen):
                before = [p.detach().clone() for p in frozen]
                super()._create_and_replace(config, name, target, *args, **more)
                if not all(p.is_meta or torch.equal(p, kept) for p, kept in zip(frozen, before, strict=True)):
                    raise BadInput(
                        f"type: with these options {peft_type.value.lower()} changes the frozen weights when it is "
                        "attached, and the adapter would not fit the base as it is. Leave out the option that does."
                    )

    Watched.__name__, Watched.__qualname__ = tuner.__name__, tuner.__qualname__
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = Watched
    try:
        yield
    finally:
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner


ENTRY = Peft
