"""Convolutions over single patches are matrix products: the same features and gradients in every family."""

import json
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from torch import nn

from mmpeft_ds.backbones.mllm import patch_products, processing
from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from tests.helpers.models import adapted_mllm, family_traits
from tests.helpers.models.family_samples import ALL, batch, samples_of

# Families whose vision tower gets single patches, and those that merge patches by another such convolution.
MERGING = ("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga", "glm5_next")
PATCHES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paddleocr_vl", "video_llama_3", "exaone4_5", "hyperclovax_vision_v2")
PATCHES += ("qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "hunyuan_vl", "cohere_compass", "cosmos3_omni", "kimi_k25")
PATCHES += ("minimax_m3_vl", "qwen4_exp", *MERGING)
# Of those, and of further ones, whose patches stay whole numbers though the processor spells the images; in the last
# a linear layer embeds them.
LINEAR = ("lfm3_vl", "ernie4_5_vl_moe", "cosmos3_edge")
WHOLE = (*(family for family in PATCHES if family not in ("qwen2_vl", "qwen2_5_vl")), *LINEAR)
QUICK = ("qwen2_vl", "qwen3_vl", "glm4v", "kimi_k25", "ernie4_5_vl_moe")
# Families whose small random models make more than 3e-7 of the losses of what float32 rounds in a pixel.
ROUNDED = {"glm4v_moe": 2e-6, "cosmos3_edge": 6e-7}
CONVOLUTIONS = (patch_products.PatchConv2d, patch_products.PatchConv3d)


def seen(folder, trained, monkeypatch=None):
    """Features of all images, gradients of the convolutions where they are trained, and sizes of what these got."""
    if monkeypatch:
        monkeypatch.setattr(patch_products, "used", lambda model: model)
    backbone = ENTRY(Options(folder), None)
    backbone.attention, backbone.dtype = "eager", torch.float64
    backbone.check()
    model = backbone.build().eval()
    given = backbone.inputs(batch(backbone, *samples_of(backbone, *ALL)))
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.requires_grad_(trained)
            look = lambda module, args, name=name: sizes.setdefault(name, tuple(args[0].shape[2:])) and None  # noqa: E731
            module.register_forward_pre_hook(look)
    features = torch.cat(model.media_features(given["images"], given["videos"]).tokens)
    if trained:
        features.square().sum().backward()
    kinds = {name: type(model.get_submodule(name)) for name in sizes}
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return features.detach(), grads, kinds, sizes, model


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in PATCHES])
def test_features_and_gradients_are_those_of_the_convolutions(tmp_path, monkeypatch, family, trained):
    folder = family_traits.write(tmp_path, family)
    features, grads, kinds, sizes, model = seen(folder, trained)
    single = [name for name, size in sizes.items() if size == model.get_submodule(name).kernel_size]
    assert len(single) == 1 + (family in MERGING) and all(kinds[name] in CONVOLUTIONS for name in single)
    wanted, gradients, of_torch, *_ = seen(folder, trained, monkeypatch)
    assert set(of_torch.values()) <= {nn.Conv2d, nn.Conv3d}  # the other side of the comparison convolves
    assert (features - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert grads.keys() == gradients.keys() and bool(grads) == trained
    for name, gradient in gradients.items():
        assert (grads[name] - gradient).abs().max() <= 1e-12 * gradient.abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in family_traits.EVERY if f not in (*PATCHES, "aria")])
def test_no_other_family_gives_a_convolution_one_patch(tmp_path, family):
    *_, sizes, model = seen(family_traits.write(tmp_path, family), trained=False)
    assert not [name for name, size in sizes.items() if size == model.get_submodule(name).kernel_size]


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=4, stride=2),
        dict(kernel_size=4, stride=4, padding=1),
        dict(kernel_size=4, stride=4, groups=3),
        dict(kernel_size=2, stride=2, dilation=2),
    ],
)
def test_a_convolution_that_is_no_product_of_patches_stays_as_it_is(options):
    model = nn.Sequential(nn.Conv2d(3, 6, **options))
    patch_products.used(model)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("padding", [0, "valid"])
def test_an_image_of_several_patches_is_convolved(padding):
    plain = nn.Conv2d(3, 5, kernel_size=4, stride=4, padding=padding)
    x, wanted = (image := torch.randn(2, 3, 8, 12)), plain(image)
    patch_products.used(plain)
    assert type(plain) is patch_products.PatchConv2d
    assert torch.equal(plain(x), wanted)


def test_names_of_weights_and_what_isinstance_says_stay():
    plain = nn.Conv3d(3, 5, kernel_size=(2, 4, 4), stride=(2, 4, 4), bias=False)
    names = list(plain.state_dict())
    patch_products.used(plain)
    assert isinstance(plain, nn.Conv3d) and list(plain.state_dict()) == names


@torch.no_grad()
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in WHOLE])
def test_whole_numbers_give_the_losses_of_patches_that_the_processor_has_normalised(
    tmp_path, monkeypatch, family, backend
):
    folder = family_traits.write(tmp_path, family)

    def given(dtype, channels=1):
        backbone = ENTRY(Options(folder, image_backend=backend), None)
        backbone.attention, backbone.dtype = "eager", dtype
        with monkeypatch.context() as patched:
            if channels is None:
                patched.setattr(type(backbone), "_channels", None)
            backbone.check()
            return backbone, backbone.build().eval(), batch(backbone, *samples_of(backbone, *ALL))

    def loss(backbone, model, packed):
        return backbone.read(model(**backbone.inputs(packed)), packed).token_losses()[0].sum().item()

    ours, theirs = given(torch.float32), given(torch.float32, channels=None)
    assert [t.spellings for t in ours[2].raw_texts] == [t.spellings for t in theirs[2].raw_texts]
    numbers, normalised = (packed.images["pixel_values"] for *_, packed in (ours, theirs))
    assert numbers.dtype == torch.uint8 and normalised.dtype == torch.float32
    assert len(numbers) == len(normalised) and numbers.nbytes * 4 <= normalised.nbytes
    assert loss(*ours) == pytest.approx(loss(*theirs), rel=ROUNDED.get(family, 3e-7), abs=0)
    # In float64 what standardises them, and what is repeated, changes nothing.
    backbone, model, packed = given(torch.float64)
    pixels = backbone._normalise((numbers if numbers.dim() == 4 else numbers.unflatten(1, (3, 1, -1))).double())
    if numbers.dim() == 2:
        pixels = pixels.repeat(1, 1, model.raw_pixels.values // numbers.shape[1], 1).flatten(1)
    wanted = features_of(model, packed.images | {"pixel_values": pixels})
    assert (features_of(model, packed.images) - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("changed", [{"do_normalize": False}, {"do_rescale": False}, {"image_mean": [0.5]}])
def test_a_processor_that_standardises_otherwise_does_it_itself(tmp_path, changed):
    folder = family_traits.write(tmp_path, "qwen3_vl")
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    backbone = ENTRY(Options(folder), None)
    see = backbone.image_transform(False)
    assert not see.patches and see.processor is backbone._processor
    assert not hasattr(backbone.build(on_meta=True).config, "pixel_statistics")


def test_the_processor_of_other_parts_still_normalises(tmp_path):
    backbone = ENTRY(Options(family_traits.write(tmp_path, "qwen3_vl")), None)
    see = backbone.image_transform(False)
    assert not see.processor.image_processor.do_normalize and not see.processor.image_processor.do_rescale
    assert backbone._processor.image_processor.do_normalize and backbone._image_processor.do_rescale


def test_pixels_that_are_no_whole_numbers_are_told():
    whole = torch.tensor([[0.0, 255.0]])
    assert torch.equal(processing.whole_numbers(whole), whole.to(torch.uint8))
    for wrong in (0.5, -1.0, 256.0, torch.nan):
        with pytest.raises(ValueError, match="no whole numbers up to 255"):
            processing.whole_numbers(torch.tensor([wrong]))


def features_of(model, images):
    return torch.cat(model.image_features(images).tokens)


@pytest.fixture
def flat(tmp_path):
    """Qwen2-VL in float64, pixels of images as its transform gives them, and as the stock processor does."""
    backbone = adapted_mllm.mllm(tmp_path, "qwen2_vl")
    backbone.attention, backbone.dtype = "eager", torch.float64
    backbone.check()
    pictures, see = [adapted_mllm.image(n) for n in (1, 2, 3)], backbone.image_transform(False)
    stock = [
        backbone._image_processor([p.numpy()], input_data_format="channels_first", return_tensors="pt")
        for p in pictures
    ]
    whole = {name: torch.cat([one[name] for one in stock]) for name in ("pixel_values", "image_grid_thw")}
    return backbone, backbone.build().eval(), backbone.collate_images([see(p) for p in pictures]), whole


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 10**6])
def test_whole_numbers_of_one_frame_give_the_features_of_the_processors_pixels(flat, monkeypatch, rows):
    _, model, raw, whole = flat
    assert raw["pixel_values"].dtype == torch.uint8
    assert raw["pixel_values"].numel() * 2 == whole["pixel_values"].numel()
    monkeypatch.setattr(patch_products, "CACHED", rows * raw["pixel_values"].shape[1])
    wanted = features_of(model, whole)
    # the processor multiplies by 1/255 and subtracts the mean in float32, in one step or in two
    assert (features_of(model, raw) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@torch.no_grad()
def test_a_call_of_another_thread_in_the_middle_of_one_reads_its_own_pixels(flat):
    backbone, model, raw, _ = flat
    other = backbone.collate_images([backbone.image_transform(False)(adapted_mllm.image(4))])
    wanted, found = [features_of(model, images) for images in (raw, other)], []

    def call(*args):
        hook.remove()
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(torch.no_grad()(features_of), model, other).result())

    hook = model.inner.visual.patch_embed.register_forward_pre_hook(call)
    found.insert(0, features_of(model, raw))
    assert all(map(torch.equal, found, wanted))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_one_frame_is_that_frame_standardised_and_repeated(flat, dtype):
    backbone, model, raw, _ = flat
    model.to(dtype)
    pixels = raw["pixel_values"].unflatten(1, (3, -1))
    pixels = backbone._normalise(pixels.double() if dtype == torch.float64 else pixels).to(dtype)
    repeated = raw | {"pixel_values": pixels[:, :, None].expand(-1, -1, 2, -1).flatten(1)}
    apart = (features_of(model, raw) - features_of(model, repeated)).abs().max()
    assert apart <= {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0}[dtype]


def test_adapters_on_the_patch_embedding_read_normalised_patches(flat):
    _, base, raw, whole = flat
    config = peft.LoraConfig(r=2, target_modules=r".*patch_embed\.proj", init_lora_weights=False)
    model = peft.get_peft_model(base, config).get_base_model()
    wanted = features_of(model, whole)
    assert (features_of(model, raw) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_what_else_reads_the_pixels_of_a_tower_gets_no_numbers(flat):
    _, model, raw, _ = flat
    read = []
    model.inner.visual.patch_embed.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    features_of(model, raw)
    assert read[0].isnan().all() and read[0].untyped_storage().nbytes() == 8


def test_a_tower_that_embeds_some_patches_at_a_time_is_told(flat):
    _, model, raw, _ = flat
    embedding = model.inner.visual.patch_embed
    removed = embedding.register_forward_pre_hook(lambda module, args: (args[0][:4],))
    try:
        with pytest.raises(RuntimeError, match="embeds 4 of .* patches at a time"):
            features_of(model, raw)
    finally:
        removed.remove()
