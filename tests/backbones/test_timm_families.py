"""Families whose vision tower is timm's, held against their stock classes; only where timm is installed.

timm needs torchvision, whose build on the usual index is for torch with CUDA: beside a torch for the CPU, every import
of transformers ends with `operator torchvision::nms does not exist`. No tower here uses these operators, so that a
`sitecustomize.py` which declares them is enough:

    import torch
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from PIL import Image

from mmpeft_ds.engine.assembly.forward import forward
from tests.helpers.models import tiny_families
from tests.helpers.models.families.parts import TEXT as LLM
from tests.helpers.models.families.parts import Tiny
from tests.helpers.models.family_samples import ALL, ONE, TALK, TEXT, TWO, attached, batch, image
from tests.helpers.models.family_stock import check_against_stock, made, processed, stock

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed"),
]


def fast_vlm(of):
    sizes = {"embed_dims": [8, 8, 8, 32, 32], "layers": [1] * 5, "inference_mode": True}
    vision = dict(model_type="timm_wrapper", architecture="fastvit_mci3", do_pooling=True, hidden_size=64)
    return dict(
        vision_config=vision | {"model_args": sizes},
        text_config=dict(LLM, model_type="qwen2"),
        image_token_index=of("<image>"),
        image_seq_length=4,
    )


def perception_lm(of):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "ref_feat_shape": [4, 4]}
    vision = dict(
        model_type="timm_wrapper", architecture="vit_pe_core_tiny_patch16_384", do_pooling=False, model_args=sizes
    )
    vision |= dict(num_classes=0, hidden_size=16)
    ids = dict(image_token_id=of("<image>"), video_token_id=of("<video>"))
    return dict(vision_config=vision, text_config=dict(LLM, model_type="llama"), projector_pooling_ratio=2, **ids)


SQUARE = {"height": 128, "width": 128}
TINY = {
    "fast_vlm": Tiny(
        fast_vlm,
        ("CLIPImageProcessorPil", dict(size={"shortest_edge": 128}, crop_size=SQUARE)),
        processor=dict(
            processor_class="LlavaProcessor",
            patch_size=64,
            vision_feature_select_strategy="full",
            num_additional_image_tokens=0,
        ),
    ),
    "perception_lm": Tiny(
        perception_lm,
        ("PerceptionLMImageProcessor", dict(tile_size=32, max_num_tiles=2)),
        tokens=("<video>",),
        named=dict(image_token="<image>", video_token="<video>"),
        processor=dict(patch_size=8, pooling_ratio=2),
    ),
}


@pytest.fixture(scope="module", params=TINY)
def folder(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(tiny_families.FAMILIES, request.param, TINY[request.param])
        yield tiny_families.write(tmp_path_factory.mktemp(request.param), request.param)


def test_it_says_what_the_stock_class_says(folder):
    backbone, model = made(folder)
    reference = stock(folder, backbone)
    # transformers' PerceptionLM makes no batch of images with other numbers of tiles
    two = ([2, 2], TWO[1]) if backbone._config.model_type == "perception_lm" else TWO
    samples = [two if sample is TWO else sample for sample in ALL]

    def inputs_of(images, text, answer=True):
        pictures = [Image.fromarray(image(n).permute(1, 2, 0).numpy()) for n in images]
        return processed(backbone, text.with_images(len(images)), answer, **({"images": pictures} if images else {}))

    packed = batch(backbone, *samples)
    given = backbone.inputs(packed)
    with torch.no_grad():
        features = model.media_features(given["images"], given["videos"])
        texts = (given["input_ids"], given["attention_mask"], given["labels"])
        widened = model.widen(*texts, features, given["media_rows"])
        out = backbone.read(model(**given), packed)
        inputs = {i: inputs_of(*text) for i, text in enumerate((n, t) for n, texts in samples for t in texts)}
        check_against_stock(backbone, out, widened, reference, inputs)
        ends = dict(pad_token_id=0, eos_token_id=backbone._tokenizer.eos_token_id, do_sample=False, max_new_tokens=4)
        for beams in (1, 2):
            asked = (two, ONE, TALK, TEXT)
            got = backbone.generate(model, batch(backbone, *asked), max_new_tokens=4, num_beams=beams)
            for written, (images, texts) in zip(got, asked, strict=True):
                fed = inputs_of(images, texts[0], answer=False)
                ids = reference.generate(**fed, **ends, num_beams=beams)[:, fed["input_ids"].shape[1] :]
                assert written == backbone._spelling.decode_all(ids.tolist(), None)[0]


@pytest.mark.parametrize("name", ["lora", "routed_lora", "deep_prompt"])
def test_adapters_train_in_it(folder, name):
    backbone, base = made(folder, condition="pooled" if name == "routed_lora" else "none")
    model = attached(name, backbone, base)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(parameter_name)))
    forward(model, backbone, batch(backbone, *ALL)).token_losses()[0].sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
