"""Layer files of routed adapters: the end of an attention sublayer of a tiny BERT or GPT-2, `get_peft_model`."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn

from mmpeft_ds import RoutedAdapterConfig
from mmpeft_ds.sites.condition import Condition, conditioned
from tests.goldens.check_routed_lora import bert, gpt2
from tests.helpers.goldens import Golden, checks

NAMES = {"W_down": "A", "b_down": "down_bias", "W_up": "B", "b_up": "up_bias"}


def layer(golden: Golden, kind: str) -> nn.Module:
    """The wrapped end of the first attention sublayer, its adapter filled from the file."""
    decoder = "decoder" in golden.name
    model, _ = (gpt2 if decoder else bert)(golden.array("x").shape[-1])
    path = "h.0.attn.resid_dropout" if decoder else "encoder.layer.0.attention.output.dropout"
    config = RoutedAdapterConfig(
        r=int(golden.number("rank")),
        route=kind,
        reshape_compat=True,
        residual=True if "residual" in golden.name else None,
    )
    wrapped = peft.get_peft_model(model, config).get_base_model().get_submodule(path)
    with torch.no_grad():
        for key, name in NAMES.items():
            getattr(wrapped.routed_adapter["default"], name).copy_(golden.tensor(key))
    return wrapped


def leaves(golden: Golden, wrapped: nn.Module) -> dict[str, Tensor]:
    return {key: getattr(wrapped.routed_adapter["default"], name) for key, name in NAMES.items()}


@checks("routing/adapter_*")
def adapter(golden: Golden) -> None:
    for kind in golden.cases():
        wrapped = layer(golden, kind)
        x, y = golden.tensor("x", True), golden.tensor("y", True)
        with conditioned(Condition(y)):
            out = wrapped(x)
        loss = (out * golden.tensor("cotangent")).sum()
        loss.backward()
        golden.same(f"{kind}__out", out)
        golden.same(f"{kind}__loss", loss)
        for key, leaf in {"x": x, "y": y, **leaves(golden, wrapped)}.items():
            name = f"{kind}__grad_{key}"
            if key == "y" and kind == "none":
                assert leaf.grad is None, f"{golden.name}: `none` routes on nothing"
                assert name not in golden or not golden.array(name).any()
            else:
                golden.same(name, leaf.grad)
