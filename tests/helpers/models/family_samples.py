"""Samples of the tiny models of every family, and adapters on them."""

import peft
import torch

from mmpeft_ds import DeepPromptConfig, RoutedLoraConfig
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.methods import get
from mmpeft_ds.sites import find_sites
from tests.helpers.packs import packed

SIZES = {1: (20, 33), 2: (40, 16), 3: (16, 16), 4: (9, 30)}
ONE = ([1], [Prompted("what color ?", "red")])
SHARED = ([2], [Prompted("is this blue ?", "no"), Prompted("what is this ?", "a blue .")])
TWO = ([2, 3], [Prompted("<image> is <image> ?", "yes")])
TWO_BEFORE = ([2, 3], [Prompted("is this blue ?", "no")])
TEXT = ([], [Prompted("yes ?", "no")])
TALK = ([4], [Prompted("color ?", "red", (("user", "what ?"), ("assistant", "blue")))])
# Families whose attention has low-rank projections, which adapters reach by pattern alone.
WITHOUT_SITES = ("kimi_k25", "mistral_large4")
LOW_RANK = r".*language_model.*\.kv_b_proj"
ALL = (ONE, SHARED, TWO, TEXT, TALK)


def image(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, *SIZES[number]), dtype=torch.uint8, generator=generator)


def batch(backbone, *samples):
    """A packed batch of samples, each (numbers of images, texts)."""
    return packed(backbone, image, samples)


def samples_of(backbone, *samples):
    """PaliGemma reads one question, after its images, and nothing without any."""
    return (ONE, SHARED, TWO_BEFORE) if backbone._config.model_type == "paligemma" else samples


def attached(name, backbone, base):
    """`base` with a method on its text layers, by the method's name."""
    method = get(name)
    text = [s.q.path for s in find_sites(base).attention if s.modality == "text"]
    assert bool(text) == (backbone._config.model_type not in WITHOUT_SITES)
    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=text or LOW_RANK, init_lora_weights=False),
        "routed_lora": lambda: RoutedLoraConfig(r=2, route="mul"),
        "deep_prompt": lambda: DeepPromptConfig(),
    }[name]()
    method.check(config, find_sites(base), backbone.condition_width)
    return peft.get_peft_model(base, config)
