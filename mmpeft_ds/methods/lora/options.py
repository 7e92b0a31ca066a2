"""Options of LoRA: the fields of peft's own config that a recipe may set, with peft's defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from mmpeft_ds.methods.base import MethodOptions

# Values of `init_lora_weights` that work; those of REWRITING are computed from the frozen weights.
STARTS = "true, false, gaussian, orthogonal, pissa, pissa_niter_4 (or another number) or olora"
REWRITING = re.compile(r"pissa|pissa_niter_\d+|olora")
REFUSED_STARTS = {
    "eva": "it needs activations of the training data before the first step, and without them the start is at random",
    "corda": "it needs activations of the training data before the first step",
    "lora_ga": "it needs gradients of the frozen weights before the first step",
    "loftq": "it replaces the frozen weights by quantised ones, and the adapter does not fit the base as it is",
    "mica": "one of its factors is frozen and in no adapter file",
}
_OF_A_START = "it belongs to a value of init_lora_weights that is not offered. Leave it out."
# Options that peft has and that do not end in an adapter which loads onto the base as it is.
REFUSED = {
    "loftq_config": _OF_A_START,
    "eva_config": _OF_A_START,
    "corda_config": _OF_A_START,
    "lora_ga_config": _OF_A_START,
    "megatron_config": "it is for layers of Megatron-core, which no backbone has. Leave it out.",
    "megatron_core": "it is for layers of Megatron-core, which no backbone has. Leave it out.",
    "velora_config": "its gradients are approximate, and its projections are in no adapter file. Leave it out.",
    "monteclora_config": "it needs a loss of its own, which nothing here adds. Leave it out.",
    "kasa_config": "it replaces the frozen weights and needs a loss of its own. Use init_lora_weights: pissa.",
    "alora_invocation_tokens": "it is for causal language models that get token ids alone. Leave it out.",
    "use_qalora": "it is for GPTQ weights, which no backbone has. Leave it out.",
    "qalora_group_size": "it is for GPTQ weights, which no backbone has. Leave it out.",
    "layer_replication": "the adapter would be of another model than the base. Leave it out.",
    "runtime_config": "parts of the base are never moved between devices here. Leave it out.",
    "target_parameters": "it is for weights of experts that are no modules. Use target_modules.",
    "arrow_config": "it routes between finished adapters and trains none. Leave it out.",
    "ensure_weight_tying": "trained copies of tied weights are not saved as one. Leave it out.",
}


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
    init_lora_weights: bool | str = field(default=True, metadata=_said(f"How the factors start: {STARTS}."))
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

    def check_training(self, dtype: str, stage: int) -> None:
        """Refuse what peft accepts and what would not end in an adapter that loads onto the base. Raises BadInput."""
        defaults = type(self)()
        for name, reason in REFUSED.items():
            if getattr(self, name) not in (getattr(defaults, name), None):
                self._refuse(name, f"is not offered: {reason}")
        self._check_start()
        self._check_whole_modules(self.modules_to_save, dtype)
        if self.trainable_token_indices and stage == 3:
            self._refuse(
                "trainable_token_indices",
                "not offered at ZeRO stage 3: peft reads the embedding where it is partitioned. Use stage 2 or below.",
            )
        if self.bias == "all":
            self._refuse("bias", "all is not offered: peft writes the biases of heads twice. Use method bitfit.")
        if self.bias != "none" and dtype != "float32":
            self._refuse(
                "bias",
                f"{self.bias} trains the frozen layers' own biases, which are {dtype} and would lose small updates. "
                "Use method bitfit, which trains copies in float32, or engine.dtype: float32.",
            )

    def _check_start(self) -> None:
        start = self.init_lora_weights
        if isinstance(start, bool) or start in ("gaussian", "orthogonal"):
            return
        if not REWRITING.fullmatch(start):
            reason = REFUSED_STARTS.get(start, "there is no such start")
            self._refuse("init_lora_weights", f"{start!r} is not offered: {reason}. Use {STARTS}.")
        for name in ("use_dora", "use_bdlora", "lora_bias"):
            if getattr(self, name):
                self._refuse(name, f"does not go with init_lora_weights: {start}. Leave out one of them.")


Options = LoraOptions
