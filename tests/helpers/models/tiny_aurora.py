"""Tiny stock BLIP and other models for the tests of Aurora, with a helper that attaches it."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipForQuestionAnswering, CLIPConfig, CLIPModel

from mmpeft_ds import AuroraConfig

D, VOCAB = 16, 23
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 4, 5, 3, 2]])


def blip(cls: type = BlipForImageTextRetrieval, seed: int = 0, layers: int = 2, **text: object) -> nn.Module:
    """Retrieval or answering BLIP whose biases and norms are not what a fresh model has."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": D, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 4 * D}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    config = BlipConfig(
        text_config={**sizes, "encoder_hidden_size": D, "vocab_size": VOCAB, **quiet, **ids, **text},
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        image_text_hidden_size=6,
        projection_dim=6,
    )
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "orm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def answering(seed: int = 0) -> nn.Module:
    return blip(BlipForQuestionAnswering, seed)


def clip() -> nn.Module:
    """Towers of different widths: image 24, text 16."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "hidden_size": 24, "intermediate_size": 96, "image_size": 8, "patch_size": 4}
    text = {**sizes, "hidden_size": D, "intermediate_size": 64, "vocab_size": VOCAB, "eos_token_id": 2}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def attach(model: nn.Module, filled: bool = True, **options: object) -> peft.PeftModel:
    """Aurora on `model`; its `up` and gates are not near zero unless `filled` is False."""
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(model, AuroraConfig(**{"r": 4, "dropout": 0.0, **options}))
    return fill(wrapped) if filled else wrapped


def fill(model: nn.Module, seed: int = 1, scale: float = 0.3) -> nn.Module:
    """Move every trainable parameter away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def pixels(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def output(model: nn.Module, multimodal: bool = True) -> Tensor:
    """States of the text encoder of a BLIP model, with or without an image."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    images = pixels().to(next(model.parameters()).dtype)
    states = base.vision_model(images).last_hidden_state if multimodal else None
    return base.text_encoder(IDS, encoder_hidden_states=states).last_hidden_state


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
