"""Families in configurations that few checkpoints have say what the stock class says, and train adapters: fused
projections, projectors without or with biases, several feature layers, other shuffles of pixels, shared embeddings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from transformers import PretrainedConfig

from mmpeft_ds.backbones.mllm import first_forward
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.families.gemma import Gemma
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput
from tests.helpers.models import tiny_families, tiny_mllm
from tests.helpers.models.family_samples import ALL, ONE, TALK, TWO, attached, batch, image
from tests.helpers.models.family_stock import check_against_stock, made, of_llava, processed, stock


@dataclasses.dataclass
class Odd:
    """A family in another configuration.

    Attributes:
        family: whose tiny checkpoint is changed.
        config: other keys of its configuration, or of the parts in it.
        processor, images: other settings of the processor, and of the image processor.
    """

    family: str
    config: dict[str, Any]
    processor: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: dict[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, folder: Any, monkeypatch: pytest.MonkeyPatch) -> str:
        if self.family in tiny_mllm.FAMILIES:
            usual, *others = tiny_mllm.FAMILIES[self.family]
            monkeypatch.setitem(tiny_mllm.FAMILIES, self.family, (functools.partial(self._changed, usual), *others))
            return tiny_mllm.write(folder, self.family)
        tiny = tiny_families.FAMILIES[self.family]
        name, settings = tiny.image_processor
        changed = dataclasses.replace(
            tiny,
            parts=lambda of: merged(tiny.parts(of), self.config),
            image_processor=(name, settings | self.images),
            processor=tiny.processor | self.processor,
        )
        monkeypatch.setitem(tiny_families.FAMILIES, self.family, changed)
        return tiny_families.write(folder, self.family)

    def _changed(self, usual: Callable[[], PretrainedConfig]) -> PretrainedConfig:
        given = merged(usual().to_dict(), self.config)
        if "model_type" in self.config.get("text_config", {}):  # of another language model, without what this one had
            given["text_config"] = tiny_mllm.TEXT | self.config["text_config"]
        return type(usual())(**{name: value for name, value in given.items() if name != "model_type"})


def merged(whole: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`whole` with other values, inside of mappings too."""
    inner = {
        k: merged(whole[k], v) for k, v in changes.items() if isinstance(v, dict) and isinstance(whole.get(k), dict)
    }
    return whole | changes | inner


CASES = {
    "fused q, k and v, a stronger shuffle": Odd(
        "internvl",
        {"text_config": {"model_type": "phi3"}, "image_seq_length": 1, "downsample_ratio": 0.25},
        processor={"image_seq_length": 1},
    ),
    "no shuffle, norms of q and k, biases": Odd(
        "internvl",
        {
            "vision_config": {"use_qk_norm": True, "attention_bias": True},
            "image_seq_length": 16,
            "downsample_ratio": 1.0,
        },
        processor={"image_seq_length": 16},
        images={"max_patches": 6},
    ),
    "one token an image": Odd(
        "idefics3",
        {
            "scale_factor": 4,
            "tie_word_embeddings": True,
            "text_config": {"attention_bias": True, "tie_word_embeddings": True},
        },
        processor={"image_seq_len": 1},
    ),
    "a projector with biases, no merging": Odd(
        "mistral3",
        {"spatial_merge_size": 1, "multimodal_projector_bias": True},
        processor={"spatial_merge_size": 1},
    ),
    "no biases, few tiles": Odd(
        "llava_onevision",
        {
            "multimodal_projector_bias": False,
            "vision_aspect_ratio": "anyres_max_1",
            "text_config": {"tie_word_embeddings": True},
            "tie_word_embeddings": True,
        },
        processor={"vision_aspect_ratio": "anyres_max_1"},
    ),
    "one feature layer, all positions": Odd(
        "vipllava",
        {"vision_feature_layers": [-1], "vision_feature_layer": [-1]},
        images={"do_center_crop": False, "size": {"height": 16, "width": 16}},
    ),
    "every image token": Odd("gemma3", {"mm_tokens_per_image": 16}, processor={"image_seq_length": 16}),
    "one deep layer, shared embeddings": Odd(
        "qwen3_vl",
        {
            "vision_config": {"deepstack_visual_indexes": [0]},
            "text_config": {"tie_word_embeddings": True, "attention_bias": True},
            "tie_word_embeddings": True,
        },
    ),
    "logits capped at 3, a window of 4": Odd(
        "gemma4",
        {
            "text_config": {"final_logit_softcapping": 3.0, "sliding_window": 4, "tie_word_embeddings": False},
            "vision_config": {"pooling_kernel_size": 3},
            "tie_word_embeddings": False,
        },
        images={"pooling_kernel_size": 3},
    ),
    "logits times a quarter, one tile": Odd(
        "cohere2_vision",
        {"text_config": {"logit_scale": 0.25, "sliding_window": 4, "attention_bias": True}, "downsample_factor": 4},
        images={"crop_to_patches": False, "patch_size": 2},
    ),
    "the layer before the last, one token a tile": Odd(
        "aya_vision",
        {"vision_feature_layer": -2, "downsample_factor": 4, "text_config": {"use_qk_norm": True}},
        processor={"patch_size": 16},
    ),
    "biases in both towers, shared embeddings": Odd(
        "glm4v",
        {
            "vision_config": {"attention_bias": True},
            "text_config": {"tie_word_embeddings": True, "attention_bias": True},
            "tie_word_embeddings": True,
        },
    ),
    "whole images, every patch": Odd(
        "smolvlm",
        {"scale_factor": 1, "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}},
        processor={"image_seq_len": 16},
        images={"do_image_splitting": False},
    ),
    "no norm and no bias, convolutions with biases": Odd(
        "lfm2_vl",
        {
            "projector_bias": False,
            "projector_use_layernorm": False,
            "text_config": {"conv_bias": True, "conv_L_cache": 2, "layer_types": ["full_attention", "conv"]},
        },
        images={"do_image_splitting": False},
    ),
    "the likeliest visual word": Odd(
        "ovis2",
        {"vision_config": {"tokenize_function": "st_argmax", "hidden_stride": 1, "qkv_bias": True}},
        processor={"image_seq_length": 16},
    ),
    "features at one layer, scaled everywhere": Odd(
        "granite4_vision",
        {
            "text_config": {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
            "deepstack_layer_map": [[-1, 1]],
            "spatial_target_layers": [1, 1, 1, 1],
        },
    ),
    "the class token too": Odd(
        "video_llava",
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "multimodal_projector_bias": False},
        processor={"vision_feature_select_strategy": "full"},
    ),
    "two feature layers with their class tokens, a window": Odd(
        "llava",
        {
            "vision_feature_layer": [-2, -1],
            "vision_feature_select_strategy": "full",
            "multimodal_projector_bias": False,
            "text_config": {"model_type": "mistral", "sliding_window": 4},
        },
    ),
    "fused q, k and v after CLIP's last layer": Odd(
        "llava", {"vision_feature_layer": -1, "text_config": {"model_type": "phi3", "pad_token_id": 0}}
    ),
    "tiles of two layers, no bias, a window": Odd(
        "llava_next",
        {
            "vision_feature_layer": [-2, 0],
            "multimodal_projector_bias": False,
            "text_config": {"sliding_window": 4},
        },
    ),
    "a window in the upper layer, shared embeddings": Odd(
        "qwen2_vl",
        {
            "text_config": {
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": 1,
                "tie_word_embeddings": True,
            },
            "tie_word_embeddings": True,
        },
    ),
    "whole images in every block": Odd(
        "qwen2_5_vl", {"vision_config": {"fullatt_block_indexes": [0, 1, 2], "window_size": 16}}
    ),
    "fused q, k and v, two feature layers": Odd(
        "llava_next_video",
        {"vision_feature_layer": [-2, -1], "text_config": {"model_type": "phi3"}, "multimodal_projector_bias": False},
    ),
}
QUICK = ("fused q, k and v, a stronger shuffle", "one token an image")


@pytest.fixture(params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def folder(request, tmp_path, monkeypatch):
    return CASES[request.param].write(tmp_path, monkeypatch)


def stock_inputs(backbone: Any, images: list[int], text: Prompted, answer: bool = True) -> dict[str, Any]:
    pictures = [Image.fromarray(image(n).permute(1, 2, 0).numpy()) for n in images]
    if backbone._config.model_type in ("llava", "llava_next"):
        return of_llava(backbone, pictures, text, answer)
    return processed(backbone, text.with_images(len(images)), answer, **({"images": pictures} if images else {}))


def test_it_says_what_the_stock_class_says(folder):
    backbone, model = made(folder)
    reference = stock(folder, backbone)
    packed = batch(backbone, *ALL)
    given = backbone.inputs(packed)
    with torch.no_grad():
        features = model.media_features(given["images"], given["videos"])
        texts = (given["input_ids"], given["attention_mask"], given["labels"])
        widened = model.widen(*texts, features, given["media_rows"])
        out = backbone.read(model(**given), packed)
        of_texts = [(images, text) for images, texts in ALL for text in texts]
        inputs = {i: stock_inputs(backbone, *text) for i, text in enumerate(of_texts)}
        check_against_stock(backbone, out, widened, reference, inputs)
        ends = dict(pad_token_id=0, eos_token_id=backbone._tokenizer.eos_token_id, do_sample=False, max_new_tokens=4)
        got = backbone.generate(model, batch(backbone, TWO, ONE, TALK), max_new_tokens=4, num_beams=2)
        for written, (images, texts) in zip(got, (TWO, ONE, TALK), strict=True):
            asked = stock_inputs(backbone, images, texts[0], answer=False)
            ids = reference.generate(**asked, **ends, num_beams=2)[:, asked["input_ids"].shape[1] :]
            assert written == backbone._spelling.decode_all(ids.tolist(), None)[0]


def test_a_configuration_that_the_stock_class_cannot_read_an_image_with_is_refused_in_one_line(tmp_path, monkeypatch):
    """transformers 5.23 packs tiles without their class tokens alone."""
    odd = Odd("llava_next", {"vision_feature_select_strategy": "full", "vision_feature_layer": -1})
    with pytest.raises(BadInput, match="'llava_next', whose processor or model cannot be tried with a black") as error:
        made(odd.write(tmp_path, monkeypatch))
    assert "\n" not in str(error.value)


UNPOOLED = Odd("gemma4", {"vision_config": {"pooling_kernel_size": 1}}, images={"pooling_kernel_size": 1})


def test_a_configuration_that_a_family_is_known_to_fail_with_is_refused_before_a_run(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="'gemma4', and with pooling_kernel_size 1 transformers 5.23 takes") as error:
        made(UNPOOLED.write(tmp_path, monkeypatch))
    assert "\n" not in str(error.value)


def test_what_transformers_raises_at_the_first_batch_is_one_line_that_names_family_and_place(tmp_path, monkeypatch):
    monkeypatch.setattr(Family, "unreadable", lambda self, config: "")
    monkeypatch.setattr(Gemma, "unreadable", Family.unreadable)
    backbone, model = made(UNPOOLED.write(tmp_path, monkeypatch))
    with pytest.raises(BadInput, match=r"'gemma4', .* \(RuntimeError: .*; modeling_gemma4.py line \d+\)") as error:
        model(**backbone.inputs(batch(backbone, ONE)))
    assert "\n" not in str(error.value) and isinstance(error.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("words", "kind"), [("DefaultCPUAllocator: not enough memory: you", RuntimeError), ("shape", BadInput)]
)
def test_a_lack_of_memory_of_the_host_is_not_blamed_on_the_configuration(words, kind):
    stock = compile(f"raise RuntimeError({words!r})", "/site-packages/transformers/modeling.py", "exec")
    with pytest.raises((RuntimeError, BadInput), match=words) as error, first_forward.blamed(PretrainedConfig()):
        exec(stock)
    assert error.type is kind


def test_faults_of_other_code_and_of_later_batches_keep_their_traceback(tmp_path):
    backbone, model = made(tiny_families.write(tmp_path, "gemma3"))
    packed = backbone.inputs(batch(backbone, ONE))
    layer = model.get_decoder().layers[0]

    def fail(*args):
        raise RuntimeError("a fault of ours")

    hook = layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):  # raised by this file, below transformers' frames
        model(**packed)
    hook.remove()
    model(**packed)
    packed["attention_mask"] = packed["attention_mask"][:, :3]
    with pytest.raises(Exception) as error:  # noqa: B017 - whatever transformers says
        model(**packed)
    assert not isinstance(error.value, BadInput)


@pytest.mark.parametrize("name", ["lora", "routed_lora"])
def test_adapters_train_in_it(folder, name):
    backbone, base = made(folder, condition="pooled" if name == "routed_lora" else "none")
    model = attached(name, backbone, base)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:  # not at its start, where half of a product has no gradient yet
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(parameter_name)))
    forward(model, backbone, batch(backbone, *ALL)).token_losses()[0].sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@torch.no_grad()
def test_an_adapter_is_the_same_when_it_is_loaded_again_and_when_it_is_merged(folder, tmp_path):
    backbone, base = made(folder)
    model, packed = attached("lora", backbone, base).eval(), batch(backbone, *ALL)
    frozen = backbone.read(made(folder)[1](**backbone.inputs(packed)), packed).logits
    adapted = backbone.read(model(**backbone.inputs(packed)), packed).logits
    assert (adapted - frozen).abs().max() > 1e-3 * frozen.abs().max()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(made(folder)[1], tmp_path / "adapter").eval()
    assert torch.equal(backbone.read(loaded(**backbone.inputs(packed)), packed).logits, adapted)
    merged = model.merge_and_unload()
    difference = backbone.read(merged(**backbone.inputs(packed)), packed).logits - adapted
    assert difference.abs().max() <= 3e-5 * adapted.abs().max()
