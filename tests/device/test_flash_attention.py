"""Every backbone with every method on transformers' road to flash-attn, against SDPA, in bfloat16.

A stand-in takes the place of the package (`tests/helpers/device/stand_in`), so what runs is transformers' own choice,
unpadding and packing, and the models' own masks. What the kernels compute on a GPU is not seen here.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mmpeft_ds import methods
from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.data.batch import PackedBatch, Prompted, Sample, pack
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe import Origin
from mmpeft_ds.sites import find_sites
from tests.helpers import plain_methods
from tests.helpers.device import installing
from tests.helpers.models import tiny_backbones, tiny_mllm
from tests.helpers.models.tiny_stock import fill

METHODS = [
    name
    for name in plain_methods.names(heads=False)
    if not methods.get(name).observes_attention(methods.get(name).Config())
]
QUICK = ["deep_prompt", "lora"]  # fit every backbone
FLASH, SDPA = "flash_attention_2", "sdpa"
REFUSING = {"clip_bart": SDPA, "blip": "eager"}


def make_llava(folder: Path) -> BackboneBase:
    """The other multimodal family: images stand as embeddings among the texts."""
    made = tiny_backbones.make_mllm(folder)
    return type(made)(type(made.options)(tiny_mllm.write(folder / "llava", "llava"), condition="pooled"), None)


MAKERS = {**tiny_backbones.MAKERS, "llava": make_llava}
WITH_FLASH = [name for name in MAKERS if name not in REFUSING]


@pytest.fixture(scope="module")
def flash(tmp_path_factory) -> ModuleType:
    """The stand-in, installed."""
    described = tmp_path_factory.mktemp("flash_attn")
    installing.describe(described, "flash-attn", "2.8.3", "flash_attn")
    with installing.installed(installing.FLASH_2, described):
        yield importlib.import_module("flash_attn")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Bases:
    return Bases(tmp_path_factory.mktemp("backbones"))


def batch_of(backbone: BackboneBase) -> PackedBatch:
    """Texts of unequal length, an image, two images, none."""
    transform = backbone.image_transform(train=False)

    def sample(name: str, images: list[int], *texts: str) -> Sample:
        seeds = [torch.Generator().manual_seed(seed) for seed in images]
        pixels = [torch.randint(0, 256, (3, 9, 11), dtype=torch.uint8, generator=seed) for seed in seeds]
        asked = [Prompted(text, "a red circle") if backbone.generates else text for text in texts]
        return Sample(name, 1.0, [transform(p, torch.Generator()) for p in pixels], asked, [0] * len(asked))

    given = [
        sample("one", [1], "is there a red circle", "what color is it is it blue"),
        sample("pair", [2, 3], "is it round"),
        sample("text", [], "a"),
    ]
    return pack(given, backbone.collate_images, backbone.collate_texts, lambda t: {"label": torch.tensor(t)})


class Bases:
    """The frozen models, each loaded once and copied for every method."""

    def __init__(self, folder: Path):
        self.folder, self.made, self.loaded, self.exact, self.lost = folder, {}, {}, {}, {}

    def backbone(self, name: str) -> BackboneBase:
        if name not in self.made:
            self.made[name] = MAKERS[name](self.folder / name)
            self.made[name].check()
        return self.made[name]

    def copy(self, name: str, attention: str, dtype: torch.dtype) -> nn.Module:
        """Weights of bfloat16 in either dtype, so that only the arithmetic differs."""
        if (name, attention, dtype) not in self.loaded:
            backbone = self.backbone(name)
            backbone.attention, backbone.dtype = attention, dtype
            torch.manual_seed(0)
            model = backbone.build()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.bfloat16())
            self.loaded[name, attention, dtype] = model
        return copy.deepcopy(self.loaded[name, attention, dtype])

    def tuned(self, name: str, method: str, attention: str, dtype: torch.dtype) -> nn.Module:
        """With the method's layers, whose tensors are all away from their start. Raises BadInput."""
        entry, model = methods.get(method), self.copy(name, attention, dtype)
        config = entry.config(entry.Options(), Origin())
        sites = find_sites(model)
        entry.check(config, sites, self.backbone(name).condition_width)
        config = entry.prepare(config, model, sites)
        torch.manual_seed(1)
        return fill(entry.attach(config, model), scale=0.1)

    def run(self, name: str, method: str, attention: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The loss of every text, and the gradients of all trained parameters in one row. Raises BadInput."""
        backbone, model = self.backbone(name), self.tuned(name, method, attention, dtype)
        outputs = forward(model, backbone, batch_of(backbone))
        if backbone.generates:
            losses = outputs.token_losses()[0].float()
        else:
            given = outputs["logits"] if "logits" in outputs else outputs["text_features"]
            losses = given.float() @ torch.linspace(-1, 1, given.shape[-1])
        trained = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
        return losses.detach(), torch.cat([g.float().flatten() for g in found if g is not None])

    def errors(self, name: str, method: str, attention: str) -> tuple[float, float]:
        """What bfloat16 with `attention` loses of losses and of gradients, each as a share of its length."""
        if (name, method) not in self.exact:
            self.exact[name, method] = self.run(name, method, SDPA, torch.float32)
        rounded = self.run(name, method, attention, torch.bfloat16)
        return tuple(float((r - e).norm() / e.norm()) for r, e in zip(rounded, self.exact[name, method], strict=True))

    def rounding(self, name: str, method: str) -> float:
        """Most that gradients may lose with flash-attn: three times what SDPA loses, of this or a method nearby.

        One pair alone is a small sample: where tiny gradients nearly cancel, either may lose twice the other.
        """
        for near in {method, *QUICK} - {done for base, done in self.lost if base == name}:
            self.lost[name, near] = self.errors(name, near, SDPA)[1]
        return 3 * max(self.lost[name, near] for near in {method, *QUICK})


@pytest.mark.parametrize("name", WITH_FLASH)
@pytest.mark.parametrize("method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_losses_and_gradients_are_those_of_sdpa_but_for_rounding(flash, bases, name, method):
    flash.calls.clear()
    try:
        loss, gradient = bases.errors(name, method, FLASH)
    except BadInput as refusal:
        assert method not in QUICK
        pytest.skip(f"does not fit this backbone: {refusal}")
    assert flash.calls, "flash-attn was not called"
    assert loss < 0.03 and gradient < bases.rounding(name, method)


@pytest.mark.parametrize("name", WITH_FLASH)
def test_a_kernel_that_loses_a_row_would_be_seen(flash, bases, name, monkeypatch):
    attend = flash.attend

    def losing(q: Tensor, *args: object) -> Tensor:
        out = attend(q, *args)
        middle = len(out) // 2
        return torch.cat([out[:middle], torch.zeros_like(out[:1]), out[middle + 1 :]])

    monkeypatch.setattr(flash, "attend", losing)
    assert bases.errors(name, "lora", FLASH)[1] > bases.rounding(name, "lora")


@pytest.mark.parametrize("name", ["vision_text_decoder", "mllm", "llava"])
def test_a_causal_mask_at_the_top_left_would_be_seen(flash, bases, name, monkeypatch):
    """Where prompts stand before the keys alone, there are more keys than queries."""

    def at_the_top_left(queries: int, keys: int, causal: bool, window: tuple[int, int]) -> Tensor:
        seen = torch.ones(queries, keys, dtype=torch.bool)
        return seen.tril() if causal else seen

    monkeypatch.setattr(flash, "visible", at_the_top_left)
    assert bases.errors(name, "deep_prompt", FLASH)[1] > bases.rounding(name, "deep_prompt")


@pytest.mark.parametrize("name", WITH_FLASH)
def test_auto_takes_it_in_every_tower(flash, bases, name):
    backbone = bases.backbone(name)
    model = bases.copy(name, resolve.attention_of("auto", name, backbone, observed=False), torch.bfloat16)
    attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention") and "config" in vars(m)]
    assert {m.config._attn_implementation for m in attentions} == {FLASH}


@pytest.mark.parametrize("name", WITH_FLASH)
def test_a_method_that_reads_scores_trains_with_sdpa_though_flash_is_installed(flash, bases, name):
    chosen = resolve.attention_of("auto", name, bases.backbone(name), observed=True)
    flash.calls.clear()
    losses, gradients = bases.run(name, "p_adapter", chosen, torch.bfloat16)
    assert chosen == SDPA and not flash.calls and losses.isfinite().all() and gradients.abs().max() > 0
    with pytest.raises(BadInput, match="cannot be observed"):
        bases.run(name, "p_adapter", FLASH, torch.bfloat16)


@pytest.mark.parametrize("name, own", REFUSING.items())
def test_a_backbone_that_cannot_use_it_says_so_and_auto_takes_its_own(flash, bases, name, own):
    assert resolve.attention_of("auto", name, bases.backbone(name), observed=False) == own
    with pytest.raises(BadInput, match=f"flash_attention_2.*does not work with {name}"):
        resolve.attention_of(FLASH, name, bases.backbone(name), observed=False)


def test_clip_bart_would_be_wrong_with_it(flash, bases):
    """Its padding stands between text and image, where transformers takes the wrong rows of the queries."""
    own, theirs = (bases.errors("clip_bart", "lora", attention)[1] for attention in (SDPA, FLASH))
    assert theirs > 10 * own, "transformers has mended it: flash-attn can be allowed"


def test_the_stand_in_computes_attention_and_refuses_what_the_real_one_refuses(flash):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    half = [x.bfloat16() for x in (q, k, v)]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    turned = [x.transpose(1, 2).float() for x in half]
    want = torch.nn.functional.scaled_dot_product_attention(*turned, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    got = flash.flash_attn_func(*half, causal=True)
    torch.testing.assert_close(got.float(), want, atol=0.02, rtol=0.02)
    ends_q, ends_k = torch.tensor([0, 3, 6], dtype=torch.int32), torch.tensor([0, 5, 10], dtype=torch.int32)
    packed = [x.flatten(0, 1) for x in half]
    rows = flash.flash_attn_varlen_func(*packed, ends_q, ends_k, 3, 5, causal=True)
    assert torch.equal(rows, got.flatten(0, 1))
    with pytest.raises(RuntimeError, match="only support fp16 and bf16"):
        flash.flash_attn_func(q, k, v)
    with pytest.raises(RuntimeError, match="same dtype"):
        flash.flash_attn_func(half[0], half[1].half(), half[2])
    with pytest.raises(RuntimeError, match="int32"):
        flash.flash_attn_varlen_func(*packed, ends_q.long(), ends_k, 3, 5)
    with pytest.raises(RuntimeError, match="longer than max_seqlen"):
        flash.flash_attn_varlen_func(*packed, ends_q, ends_k, 2, 5)
    with pytest.raises(RuntimeError, match="Number of heads"):
        flash.flash_attn_func(half[0][:, :, :3], *half[1:])
