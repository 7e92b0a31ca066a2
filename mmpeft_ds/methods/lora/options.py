"""Options of LoRA: the fields of peft's own config that a recipe may set, with peft's defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmpeft_ds.methods.base import MethodOptions


def _said(help: str) -> dict[str, str]:
    return {"help": help}


@dataclass
class LoraOptions(MethodOptions):
    """q and v of every layer of the text towers, unless `target_modules` says otherwise; peft's documentation of
    `LoraConfig` has the details of each field."""

    r: int = field(default=8, metadata=_said("Rank."))
    target_modules: list[str] | str | None = field(
        default=None, metadata=_said("Names or a regular expression of modules; default q and v of the text towers.")
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata=_said("Modules to leave out."))
    lora_alpha: int = field(default=8, metadata=_said("The low-rank term is scaled by lora_alpha / r."))
    lora_dropout: float = field(default=0.0, metadata=_said("Dropout before the low-rank term."))
    fan_in_fan_out: bool = field(default=False, metadata=_said("Weights are stored in x out (found without it)."))
    bias: Literal["none", "all", "lora_only"] = field(default="none", metadata=_said("Which biases train."))
    use_rslora: bool = field(default=False, metadata=_said("Scale by lora_alpha / sqrt(r) (arXiv 2312.03732)."))
    modules_to_save: list[str] | None = field(default=None, metadata=_said("Modules trained whole besides."))
    init_lora_weights: bool | str = field(default=True, metadata=_said("How the factors start: true, gaussian, ..."))
    layers_to_transform: list[int] | int | None = field(default=None, metadata=_said("Layer indices; default all."))
    layers_pattern: list[str] | str | None = field(default=None, metadata=_said("Name of the list of layers."))
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata=_said("Another r for some modules."))
    alpha_pattern: dict[str, Any] | None = field(default_factory=dict, metadata=_said("Another lora_alpha for some."))
    megatron_config: dict[str, Any] | None = field(default=None, metadata=_said("Megatron's TransformerConfig."))
    megatron_core: str | None = field(default="megatron.core", metadata=_said("Megatron's core module."))
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata=_said("Tokens whose embeddings train as well.")
    )
    loftq_config: dict[str, Any] = field(default_factory=dict, metadata=_said("LoftQ."))
    eva_config: dict[str, Any] | None = field(default=None, metadata=_said("EVA."))
    corda_config: dict[str, Any] | None = field(default=None, metadata=_said("CorDA."))
    lora_ga_config: dict[str, Any] | None = field(default=None, metadata=_said("LoRA-GA."))
    use_dora: bool = field(default=False, metadata=_said("Weight-decomposed LoRA (DoRA, arXiv 2402.09353)."))
    velora_config: dict[str, Any] | None = field(default=None, metadata=_said("VeLoRA."))
    alora_invocation_tokens: list[int] | None = field(default=None, metadata=_said("Tokens that activate aLoRA."))
    use_qalora: bool = field(default=False, metadata=_said("Quantisation-aware LoRA, for GPTQ."))
    qalora_group_size: int = field(default=16, metadata=_said("Group size of QALoRA's pooling."))
    monteclora_config: dict[str, Any] | None = field(default=None, metadata=_said("Monteclora."))
    layer_replication: list[tuple[int, int]] | None = field(default=None, metadata=_said("Layers to repeat."))
    runtime_config: dict[str, Any] = field(default_factory=dict, metadata=_said("peft's LoraRuntimeConfig."))
    lora_bias: bool = field(default=False, metadata=_said("`up` has a bias."))
    target_parameters: list[str] | None = field(default=None, metadata=_said("Parameters in the place of modules."))
    use_bdlora: dict[str, Any] | None = field(default=None, metadata=_said("Block-diagonal LoRA."))
    arrow_config: dict[str, Any] | None = field(default=None, metadata=_said("Arrow routing."))
    kasa_config: dict[str, Any] | None = field(default=None, metadata=_said("KaSA."))
    ensure_weight_tying: bool = field(default=False, metadata=_said("Tied weights stay tied."))


Options = LoraOptions
