"""Tiny stock models and the helpers that the method tests share."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from mmpeft_ds import RoutedLoraConfig
from mmpeft_ds.sites.condition import Condition, conditioned

D, VOCAB = 16, 23
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 4, 5, 3, 2]])


def bert(seed: int = 0, roberta: bool = False, **options) -> nn.Module:
    torch.manual_seed(seed)
    cls, config = (RobertaModel, RobertaConfig) if roberta else (BertModel, BertConfig)
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _with_biases(cls(config(**sizes, **quiet, vocab_size=VOCAB, **options)).eval())


def gpt2(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    ids = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _with_biases(GPT2LMHeadModel(GPT2Config(n_embd=D, n_layer=2, n_head=2, **ids, **quiet)).eval())


def _with_biases(model: nn.Module) -> nn.Module:
    # Fresh models have zero biases and unit norms, which would hide a lost copy.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name or "ln_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def wrap(model: nn.Module, filled: bool = True, **options) -> peft.PeftModel:
    """A peft model whose `up` is not zero unless `filled` is False."""
    options = {"r": 4, "alpha": 8, **options}
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(model, RoutedLoraConfig(**options))
    return fill(wrapped) if filled else wrapped


def fill(model: nn.Module, seed: int = 1, scale: float = 0.3) -> nn.Module:
    """Move every trainable parameter away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def image(rows: int = 2, m: int = 1, seed: int = 2, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, m, D, generator=generator).requires_grad_(requires_grad)


def output(model: nn.Module, y: Tensor | None = None, ids: Tensor = IDS) -> Tensor:
    """First output of a forward under condition `y`."""
    y = image(len(ids)) if y is None else y
    y = y.to(next(model.parameters()).dtype)
    with conditioned(Condition(y)):
        return model(ids)[0]


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
