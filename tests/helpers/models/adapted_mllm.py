"""Tiny multimodal language models with moved adapters, and packed batches of whole samples for them."""

import torch

from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from mmpeft_ds.data.batch import Sample, pack
from mmpeft_ds.methods import get
from mmpeft_ds.sites import find_sites
from tests.helpers.models import tiny_mllm

# method -> options
METHODS = {
    "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "routed_lora": {"r": 2, "route": "matmul1"},
    "routed_adapter": {"r": 4, "route": "add", "pool": "mean"},
    "adapter": {"r": 4},
    "aurora": {"r": 2, "dropout": 0.0, "towers": ["text"]},
    "p_adapter": {"r": 2, "r2": 2},
    "deep_prompt": {"length": 3},
    "moka": {"r": 2},
}


def image(seed):
    shape = (3, 6 + seed % 5, 16 - 2 * (seed % 4))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch_of(backbone, samples):
    """A packed batch of samples (seeds of images, texts, weight)."""
    transform = backbone.image_transform(False)
    given = [
        Sample(str(i), weight, [transform(image(n)) for n in images], texts, [0] * len(texts))
        for i, (images, texts, weight) in enumerate(samples)
    ]
    return pack(given, backbone.collate_images, backbone.collate_texts, lambda t: {})


def mllm(folder, family="llava", **options):
    """The backbone over a tiny model of a family, which is written once a folder."""
    if not (folder / family).exists():
        tiny_mllm.write(folder / family, family)
    return ENTRY(Options(str(folder / family), **options), None)


def adapted(backbone, method="lora", attention="sdpa", dtype=torch.float64, **options):
    """The model with a method whose trained weights are no longer those of the start, which may change nothing."""
    backbone.attention, backbone.dtype = attention, dtype
    backbone.check()
    base = backbone.build().eval()
    entry = get(method)
    config = entry.config(entry.Options(**(options or METHODS[method])), lambda key: key)
    model = entry.attach(entry.prepare(config, base, find_sites(base)), base).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model
