"""Options of LoRA: the fields of peft's own config that a recipe may set, with peft's defaults."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from mmpeft_ds.methods.base import MethodOptions

# Values of `init_lora_weights` that work; those of REWRITING are computed from the frozen weights.
STARTS = (
    "true, false, gaussian, orthogonal, pissa, pissa_niter_4 (or another number), olora, eva, corda, lora_ga or, with "
    "backbone.quantise, loftq"
)
REWRITING = re.compile(r"pissa|pissa_niter_\d+|olora|corda|lora_ga")
FROM_DATA = ("eva", "corda", "lora_ga", "loftq")  # by what the recipe names besides the frozen model
# Options of a start that is computed over batches, and those of its fields that are left open.
OF_STARTS = {
    "eva_config": ("eva", None),
    "corda_config": ("corda", ("corda_method",)),
    "lora_ga_config": ("lora_ga", ("direction", "scale", "stable_gamma")),
}
REFUSED_STARTS = {
    "mica": "one of its factors is frozen and in no adapter file",
}
# Options that peft has and that do not end in an adapter which loads onto the base as it is.
REFUSED = {
    "loftq_config": "backbone.quantise says the bits, and more than one iteration would need another base. Leave it "
    "out.",
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
    modules_to_save: list[str] | None = field(default=None, metadata=_said("Further fully trained modules."))
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
    loftq_config: dict[str, Any] = field(default_factory=dict, metadata=_said("LoftQ; refused."))
    eva_config: dict[str, Any] | None = field(default=None, metadata=_said("Of init_lora_weights: eva; rho and tau."))
    corda_config: dict[str, Any] | None = field(default=None, metadata=_said("Of `corda`; corda_method."))
    lora_ga_config: dict[str, Any] | None = field(default=None, metadata=_said("Of `lora_ga`."))
    start_batches: int = field(
        default=16, metadata=_said("Batches, of at most 16 samples, for init_lora_weights: corda and lora_ga.")
    )
    use_dora: bool = field(default=False, metadata=_said("Weight-decomposed LoRA (DoRA, arXiv 2402.09353)."))
    velora_config: dict[str, Any] | None = field(default=None, metadata=_said("VeLoRA."))
    alora_invocation_tokens: list[int] | None = field(default=None, metadata=_said("Tokens that activate aLoRA."))
    use_qalora: bool = field(default=False, metadata=_said("Quantisation-aware LoRA, for GPTQ."))
    qalora_group_size: int = field(default=16, metadata=_said("Group size of QALoRA's pooling."))
    monteclora_config: dict[str, Any] | None = field(default=None, metadata=_said("Monteclora."))
    layer_replication: list[tuple[int, int]] | None = field(default=None, metadata=_said("Layers to repeat."))
    runtime_config: dict[str, Any] = field(default_factory=dict, metadata=_said("peft's LoraRuntimeConfig."))
    lora_bias: bool = field(default=False, metadata=_said("`up` has a bias."))
    target_parameters: list[str] | None = field(
        default=None, metadata=_said("Ends of names of weights that are no modules, as fused experts have them.")
    )
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
        self._check_start(stage)
        if not self.lora_alpha and not self.alpha_pattern:
            self._refuse("lora_alpha", "0 leaves the low-rank term out, so that nothing of it trains. Use more.")
        if self.lora_dropout >= 1:
            self._refuse("lora_dropout", f"{self.lora_dropout:g} drops all there is. Use less than 1.")
        self._check_parameters(stage)
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

    def _check_parameters(self, stage: int) -> None:
        if not self.target_parameters:
            return
        if stage == 3:
            self._refuse(
                "target_parameters",
                "not offered at ZeRO stage 3: peft replaces weights that are partitioned. Use stage 2 or below.",
            )
        for name in ("use_dora", "use_bdlora", "lora_bias", "lora_dropout"):
            if getattr(self, name):
                self._refuse(name, "does not go with target_parameters in peft. Leave out one of them.")
        if self.init_lora_weights is not True and self.init_lora_weights != "gaussian":
            self._refuse("init_lora_weights", f"{self.init_lora_weights}: not with target_parameters. Use true.")

    def _check_start(self, stage: int) -> None:
        start = self.init_lora_weights
        for name, (of, known) in OF_STARTS.items():
            given = getattr(self, name)
            if given and start != of:
                self._refuse(name, f"is of init_lora_weights: {of}, not {start}. Leave out one of them.")
            for key in given or () if known else ():
                if key not in known:
                    self._refuse(name, f"{key} is not offered, only {', '.join(known)} is. Leave it out.")
        if self.start_batches != 16 and start not in ("corda", "lora_ga"):
            self._refuse("start_batches", f"is of init_lora_weights: corda and lora_ga, not {start}. Leave it out.")
        self._at_least("start_batches", 1)
        gamma = (self.lora_ga_config or {}).get("stable_gamma", 1)
        if isinstance(gamma, (int, float)) and not gamma > 0:
            self._refuse("lora_ga_config", f"stable_gamma must be above 0, got {gamma}.")
        if isinstance(start, bool) or start in ("gaussian", "orthogonal"):
            return
        if start not in FROM_DATA and not REWRITING.fullmatch(start):
            reason = REFUSED_STARTS.get(start, "there is no such start")
            self._refuse("init_lora_weights", f"{start!r} is not offered: {reason}. Use {STARTS}.")
        if start in FROM_DATA and stage == 3:
            self._refuse(
                "init_lora_weights",
                f"{start!r} is not offered at ZeRO stage 3: it runs the model before DeepSpeed starts, when weights "
                "are partitioned. Use stage 2 or below, or pissa.",
            )
        # eva itself shares the ranks out
        unfit = ("rank_pattern", "alpha_pattern") if start == "eva" else ()
        for name in ("use_dora", "use_bdlora", "lora_bias", *unfit):
            if getattr(self, name):
                self._refuse(name, f"does not go with init_lora_weights: {start}. Leave out one of them.")


Options = LoraOptions
