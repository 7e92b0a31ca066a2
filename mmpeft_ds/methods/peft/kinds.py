"""Facts about each type of peft: its default places, or the reason why it is not offered.

Every reason was met in peft 0.21.2; `tests/methods/test_peft_types.py` tries all types again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PLACES = ("q", "k", "v", "out", "up", "gate", "down")
_PROMPT = (
    "it puts virtual tokens before those of one language model by a wrapper around that model's own forward, and here "
    "towers are called inside the forward of a larger model. Use method deep_prompt, which has prefixes and tokens"
)
_TASKS = "every forward must be told the number of a task, which no batch here holds. Use lora for one task"


@dataclass(frozen=True)
class Kind:
    """One type.

    Attributes:
        places: projections of the chosen layers; `norm` for their norms, empty for what peft chooses by itself.
        refused: why it cannot be used, in a clause; empty where it can.
        options: value of an option with which it cannot be used -> why.
        mixes: how a token's output depends on other tokens, in a sentence; empty where it does not. The module of such
            a layer is named in `sites/unread.py`.
        unmergeable: why it cannot be folded into the weights; empty where it can.
        stage3: why it cannot be used at ZeRO stage 3; empty where it can.
        gathers: peft itself gathers frozen weights that ZeRO-3 has partitioned when it makes a layer.
        values: peft computes with values of its own tensors when it makes a layer, which the meta device has none of.
        weights: peft needs the frozen weights, or a mask on their device, when it makes a layer.
        nf4: peft's layers of it work over 4-bit weights of bitsandbytes; those of norms and tokens over any.
        defaults: of options where those of peft differ between ranks, or print bars.
    """

    places: tuple[str, ...] = ("q", "v")
    refused: str = ""
    options: dict[tuple[str, object], str] = field(default_factory=dict)
    mixes: str = ""
    unmergeable: str = ""
    stage3: str = ""
    gathers: bool = False
    values: bool = False
    weights: bool = False
    nf4: bool = False
    defaults: dict[str, object] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "lora": Kind(),
    "adalora": Kind(
        refused="between backward and step it drops ranks by gradients, which ZeRO has split or freed by then, and it "
        "needs a loss of its own. Use lora with init_lora_weights: eva, which shares ranks out before training, or "
        "rank_pattern"
    ),
    "adamss": Kind(
        options={("use_asa", True): "it masks subspaces between backward and step by gradients, which ZeRO has split"}
    ),
    "adaption_prompt": Kind(
        refused="it replaces the attention of bare Llama, Mistral and GPT-2 models alone. Use method deep_prompt"
    ),
    "beft": Kind(places=("v",), nf4=True),
    "boft": Kind(nf4=True, values=True),
    "c3a": Kind(),
    "cartridge": Kind(refused=_PROMPT),
    "cpt": Kind(refused=_PROMPT),
    "deft": Kind(),
    "delora": Kind(),
    "fourierft": Kind(nf4=True),
    "frod": Kind(
        defaults={"progressbar": False},
        stage3="it factorises the weights of all layers together, which have no values of their own there",
        weights=True,
    ),
    "glora": Kind(),
    "gralora": Kind(),
    "hira": Kind(nf4=True),
    "hra": Kind(),
    "ia3": Kind(),
    "lily": Kind(
        mixes="its factors are weighed by the mean over all tokens of a batch.",
        unmergeable="peft has not written how.",
        nf4=True,
    ),
    "ln_tuning": Kind(places=("norm",)),
    "loha": Kind(),
    "lokr": Kind(),
    "miss": Kind(nf4=True),
    "multitask_prompt_tuning": Kind(refused=_PROMPT),
    "oft": Kind(nf4=True),
    "osf": Kind(),
    "p_tuning": Kind(refused=_PROMPT),
    "peanut": Kind(),
    "poly": Kind(refused=_TASKS),
    "prefix_tuning": Kind(refused=_PROMPT),
    "prompt_tuning": Kind(refused=_PROMPT),
    "psoft": Kind(gathers=True),
    "pvera": Kind(nf4=True),
    "randlora": Kind(nf4=True),
    "road": Kind(nf4=True),
    "shadow": Kind(
        places=(),
        refused="it runs a second, smaller language model beside a bare decoder and adds its loss, which nothing here "
        "does. Use another type",
    ),
    "shira": Kind(defaults={"random_seed": 0}, weights=True, nf4=True),
    "supertuning": Kind(),
    "tinylora": Kind(),
    "trainable_tokens": Kind(places=(), stage3="peft reads the embedding where it is partitioned"),
    "unilora": Kind(values=True),
    "vblora": Kind(nf4=True),
    "vera": Kind(nf4=True),
    "waveft": Kind(nf4=True),
    "xlora": Kind(
        refused="it mixes finished LoRA adapters by a classifier over the hidden states of one language model, and "
        "needs two forwards for each. Use one lora"
    ),
}
