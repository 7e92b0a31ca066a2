"""Every family of multimodal language models: packed, it says what the stock class fed by its own processor says."""

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, CLIPImageProcessorPil, GenerationMixin, Idefics3Processor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING_NAMES
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from mmpeft_ds import registry
from mmpeft_ds.backbones.mllm import alike, families, processing, torchvision_functions
from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.model import media_ids
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.data.transform import apply
from mmpeft_ds.engine.assembly import modality
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput, BadSample
from tests.helpers import family_table
from tests.helpers.models import family_traits, tiny_families, tiny_mllm
from tests.helpers.models.family_samples import ALL, ONE, TALK, TEXT, TWO, attached, batch, image, samples_of
from tests.helpers.models.family_stock import check_against_stock, made, of_llava, processed, stock
from tests.helpers.models.family_traits import EVERY

FAMILIES = list(tiny_families.FAMILIES)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    return family_traits.write(tmp_path_factory.mktemp(request.param), request.param)


# Whose image processors transformers has for tensors alone.
ONE_FORM = ("cohere2_vision", "gemma4_unified", "inkling2", "kimi_k25", "lfm2_vl", "llama4", "minicpm_ocr")
ONE_FORM += ("minimax_m3_vl", "molmo2", "muse_glimmer", "muse_spark", "step3p7", "unlimited_ocr", "video_llava")
# One of each way in which an image is spelled and its features are merged; the others are slow where they take long.
QUICK = ("internvl", "gemma3", "idefics3", "qwen3_vl", "mistral3", "ovis2", "qwen3_5")
# Whose images are large in small models too: aria takes no less than 490 x 490, which takes as long as all others
# together, and the readers of pages cut them into thousands of patches.
SLOW = {"aria", "deepseek_ocr2", "got_ocr2", "unlimited_ocr"}
every_family, every_spelled_family = (
    pytest.mark.parametrize(
        "folder", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in of], indirect=True
    )
    for of in (EVERY, FAMILIES)
)
some_quick = pytest.mark.parametrize(
    "folder", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in EVERY], indirect=True
)


def stock_inputs(backbone, images, text, answer=True):
    """What the processor of the family makes of one conversation; without its answer for generation."""
    pictures = [Image.fromarray(image(n).permute(1, 2, 0).numpy()) for n in images]
    if backbone._config.model_type in ("llava", "llava_next"):
        return of_llava(backbone, pictures, text, answer)
    if backbone._config.model_type == "paligemma":
        suffix = text.target if answer else None
        prompt = "<image>" * len(images) + text.prompt
        made = dict(backbone._processor(images=pictures, text=[prompt], suffix=suffix, return_tensors="pt"))
        made.pop("labels")
        return made
    text = text.with_images(len(images))
    return processed(backbone, text, answer, **({"images": pictures} if images else {}))


def of_texts(samples):
    return [(images, text) for images, texts in samples for text in texts]


def test_images_to_scale_by_lanczos_are_left_to_pillow_where_torch_cannot(monkeypatch):
    def names():
        by = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC)
        return [type(processing._on_tensors(CLIPImageProcessorPil(resample=how))).__name__ for how in by]

    assert names() == ["CLIPImageProcessor"] * 2
    monkeypatch.setattr(torchvision_functions, "scales_by_lanczos", lambda: False)
    assert names() == ["CLIPImageProcessorPil", "CLIPImageProcessor"]


@every_spelled_family
def test_both_image_backends_give_the_same_images_but_for_rounding(folder):
    wave = torch.linspace(0, 9, 60)[:, None] * torch.linspace(0, 7, 90)
    picture = torch.stack([wave.sin(), wave.cos(), (2 * wave).sin()]).mul(100).add(128).to(torch.uint8)
    backbones = [ENTRY(Options(folder, image_backend=backend), None) for backend in ("torchvision", "pil")]
    names = [type(backbone._image_processor).__name__ for backbone in backbones]
    assert (names[0] == names[1]) == (backbones[0]._config.model_type in ONE_FORM)
    assert names[1] in (names[0], names[0] + "Pil")
    fast, pillow = (backbone.image_transform(False)(picture) for backbone in backbones)
    assert fast.spelling == pillow.spelling and fast.keys() == pillow.keys()
    for name, tensor in fast.items():  # normalised pixels are of size 1, so a rounded byte is 1/127 of it
        assert tensor.shape == pillow[name].shape and tensor.dtype == pillow[name].dtype
        assert (tensor.double() - pillow[name].double()).abs().max() < (2 if tensor.dtype == torch.uint8 else 0.02)


@every_family
@torch.no_grad()
def test_logits_and_loss_are_those_of_the_stock_class_fed_by_its_own_processor(folder):
    backbone, model = made(folder)
    samples = samples_of(backbone, *ALL)
    packed = batch(backbone, *samples)
    given = backbone.inputs(packed)
    features = model.media_features(given["images"], given["videos"])
    assert len(features) == sum(len(images) for images, _ in samples)  # each once, however many texts read it
    texts = (given["input_ids"], given["attention_mask"], given["labels"])
    widened = model.widen(*texts, features, given["media_rows"])
    out = backbone.read(model(**given), packed)
    losses, _ = out.token_losses()
    # inside the output layer, as in training; families that scale or cap their logits get them whole
    assert torch.allclose(
        forward(model, backbone, packed, scores=True).token_losses()[0], losses, rtol=1e-5, atol=1e-5
    )
    inputs = {i: stock_inputs(backbone, *text) for i, text in enumerate(of_texts(samples))}
    check_against_stock(backbone, out, widened, stock(folder, backbone), inputs)


@pytest.mark.parametrize("folder", family_traits.TRAITS["alone"].lacking, indirect=True)
def test_the_processor_of_a_family_that_reads_no_text_alone_takes_none(folder):
    backbone = made(folder)[0]
    with pytest.raises(IndexError, match=family_traits.lacking("alone", backbone._config.model_type).said):
        stock_inputs(backbone, [], TEXT[1][0])


@some_quick
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generated_text_is_that_of_the_stock_class(folder, beams):
    backbone, model = made(folder)
    reference = stock(folder, backbone)
    options = dict(max_new_tokens=4, num_beams=beams)
    ends = dict(pad_token_id=0, eos_token_id=backbone._tokenizer.eos_token_id, do_sample=False)
    ends |= dict(suppress_tokens=media_ids(backbone._config))
    samples = samples_of(backbone, TWO, ONE, TALK)
    # findings/transformers_glm4v_beams_mix_images.sh; test_sequences.py has what is right
    mixes = type(reference)._expand_multimodal_outputs is not GenerationMixin._expand_multimodal_outputs
    got = backbone.generate(model, batch(backbone, *samples), **options)
    for written, (images, text) in zip(got, of_texts(samples), strict=True):
        inputs = stock_inputs(backbone, images, text, answer=False)
        length = inputs["input_ids"].shape[1]
        if beams > 1 and images and (lacking := family_traits.lacking("beams", backbone._config.model_type)):
            with pytest.raises(ValueError, match=lacking.said):
                reference.generate(**inputs, **ends, **options)
            continue
        if beams > 1 and len(images) > 1 and mixes:
            continue
        ids = reference.generate(**inputs, **ends, **options)[:, length:]
        assert written == backbone._spelling.decode_all(ids.tolist(), None)[0]


@some_quick
@pytest.mark.parametrize("name", ["lora", "routed_lora", "deep_prompt"])
def test_an_adapter_is_trained_through_the_whole_model(folder, name):
    backbone, base = made(folder, condition="pooled" if name == "routed_lora" else "none")
    if lacking := family_traits.lacking(name, backbone._config.model_type):
        with pytest.raises(BadInput, match=lacking.said) as error:
            attached(name, backbone, base)
        assert "\n" not in str(error.value)
        return
    model = attached(name, backbone, base)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:  # not at its start, where half of a product has no gradient yet
            generator = torch.Generator().manual_seed(len(parameter_name))
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    forward(model, backbone, batch(backbone, *samples_of(backbone, *ALL))).token_losses()[0].sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


@pytest.mark.parametrize("family", ["internvl", "gemma3", "ovis2"])
def test_a_processor_that_counts_other_tokens_than_the_model_makes_is_refused(tmp_path, family):
    folder = tiny_families.write(tmp_path, family)
    settings = tiny_families.FAMILIES[family].processor
    (tmp_path / "processor_config.json").write_text(json.dumps(settings | {"image_seq_length": 5}))
    with pytest.raises(BadInput, match="spells the images with .* tokens, but the model makes .* of them") as error:
        ENTRY(Options(folder), None).check()
    assert "\n" not in str(error.value)


def test_an_image_that_mistral3_cannot_read_alone_is_a_bad_sample(tmp_path):
    backbone, model = made(tiny_families.write(tmp_path, "mistral3"))
    with pytest.raises(BadSample, match="one token"):
        apply(backbone.image_transform(False), torch.zeros(3, 5, 8, dtype=torch.uint8), None)
    # what stands for an image on a rank without any must not be one; its cell is 28 pixels wide in released models
    assert max(backbone.dummy("image").shape) > 28


@pytest.mark.parametrize("folder", ["idefics3"], indirect=True)
def test_an_image_of_weight_0_that_short_texts_cut_through_is_not_read(folder):
    """On a rank without images the text that stands for one gets the length of the rank's own."""
    backbone, model = made(folder)
    task = SimpleNamespace(collate=lambda targets: {}, dummy_text=lambda text: text, dummy_target=int)
    short = batch(backbone, ([], [Prompted("a", "a")]))
    completed = modality.complete(short, [1.0, 2.0], backbone, task)
    assert backbone.inputs(completed)["media_rows"].tolist() == []
    losses = [forward(model, backbone, b).token_losses()[0][:1] for b in (short, completed)]
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("folder", ["idefics3"], indirect=True)
def test_a_trained_tower_is_tied_to_the_loss_where_texts_read_all_images_too(folder):
    """At ZeRO-3 all ranks must go back from as many outputs, and one may have an image that no text reads."""
    backbone, model = made(folder)
    packed = batch(backbone, ONE)
    assert backbone.read(model(**backbone.inputs(packed)), packed).tie is None
    model.get_encoder(modality="image").requires_grad_(True)
    tie = backbone.read(model(**backbone.inputs(packed)), packed).tie
    assert tie.requires_grad and tie == 0


@pytest.mark.parametrize("rows, columns", [(0, 0), (1, 2), (3, 2)])
def test_smolvlm_spells_an_image_as_its_own_processor_does(rows, columns):
    processor = Idefics3Processor.__new__(Idefics3Processor)
    names = dict(fake_image_token="<f>", image_token="<i>", global_image_tag="<g>", image_seq_len=3)
    processor.__dict__.update(names)
    got = processor.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
    assert got == get_image_prompt_string(rows, columns, 3, "<f>", "<i>", "<g>")


def test_the_table_in_the_documentation_is_what_tests_try_and_expect():
    page = family_table.PAGE.read_text("utf-8")
    assert family_table.written(page, family_table.table()) == page, "stale: run python -m tests.helpers.family_table"
    for trait in family_traits.TRAITS.values():
        assert trait.lacking.keys() <= set(EVERY)


def test_the_documentation_lists_and_counts_the_families_that_are_tried():
    page = Path("docs/backbones.md").read_text().split("### Families")[1].split("\n* ")[0]
    table = {name for line in page.splitlines() if line.startswith("|") for name in re.findall("`([a-z0-9_]+)`", line)}
    assert table == {*FAMILIES, *tiny_mllm.FAMILIES, "model_type"}
    assert f"[{len(table) - 1} families]" in Path("README.md").read_text()


@pytest.mark.parametrize(
    "model_type, said",
    [
        ("florence2", "its text tower has an encoder"),
        ("git", "mm_encoder_outputs"),
        ("diffusion_gemma", "get_image_features"),
        ("bert", "no image-text-to-text model"),
    ],
)
def test_a_family_that_lacks_something_is_refused_with_what_it_is(tmp_path, model_type, said):
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=said) as error:
        ENTRY(Options(str(tmp_path)), None).check()
    assert "\n" not in str(error.value)


OTHERS = [f for f in MAPPING_NAMES if f not in FAMILIES and f not in tiny_mllm.FAMILIES]


@pytest.mark.parametrize("family", OTHERS)
def test_every_other_family_of_transformers_is_refused_in_one_line(tmp_path, family):
    """With an image token that the tokenizer has, so that more than its absence is looked at."""
    words = tiny_families.tokenizer(tiny_families.FAMILIES["idefics3"])
    config = CONFIG_MAPPING[family]()
    for name in ("image_token_id", "image_token_index"):
        if hasattr(config, name):
            setattr(config, name, words.convert_tokens_to_ids("<image>"))
    config.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="backbone") as error:
        ENTRY(Options(str(tmp_path)), None).check()
    assert "\n" not in str(error.value)


TOKENS = dict(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>", video_token="<video>")
TOKENS |= dict(audio_token="<sound>", boa_token="<boa>", eoa_token="<eoa>")


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
@pytest.mark.parametrize("family", ["gemma3n", "perception_lm", "fast_vlm"])
def test_a_family_whose_vision_tower_is_timms_says_which_package_it_needs(tmp_path, family):
    tiny = dataclasses.replace(tiny_families.FAMILIES["idefics3"], tokens=tuple(TOKENS.values()), named=TOKENS)
    words, config = tiny_families.tokenizer(tiny), CONFIG_MAPPING[family]()
    config.image_token_id = words.convert_tokens_to_ids("<image>")
    config.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    square = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=square, crop_size=square).save_pretrained(tmp_path)
    settings = {"patch_size": 4, "pooling_ratio": 1, "vision_feature_select_strategy": "full"}
    settings |= {"processor_class": "LlavaProcessor"} if family == "fast_vlm" else {}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=f"'{family}', which needs the package timm: pip install timm") as error:
        ENTRY(Options(str(tmp_path)), None).check()
    assert "\n" not in str(error.value)


def untried(folder, monkeypatch):
    """The backbone of a family that has a file, as if it had none."""
    backbone = ENTRY(Options(folder), None)
    monkeypatch.setattr(type(backbone), "_family", Family())
    return backbone


@pytest.mark.parametrize(
    "family, said",
    [
        ("molmo2", "makes other tokens of a conversation than its parts do, at place 0"),
        ("minicpmv4_6", "makes other tokens of a conversation than its parts do, at place"),
        ("minicpmv4_7", "makes other tokens of a conversation than its parts do, at place"),
    ],
)
def test_an_untried_family_whose_processor_writes_other_texts_is_refused_before_a_run(
    tmp_path, monkeypatch, family, said
):
    """Without the file of the family they would train on texts that no processor makes."""
    backbone = untried(tiny_families.write(tmp_path, family), monkeypatch)
    with pytest.raises(BadInput, match=said) as error:
        backbone.check()
    assert "\n" not in str(error.value)


def test_an_untried_family_whose_template_and_tokenizer_both_write_the_first_token_is_taken(tmp_path, monkeypatch):
    """transformers, too, lets the template alone write it."""
    folder = tiny_families.write(tmp_path, "internvl")
    path = tmp_path / "tokenizer.json"
    words = json.loads(path.read_text())
    bos, whole = "<s>", {"Sequence": {"id": "A", "type_id": 0}}
    number = next(token["id"] for token in words["added_tokens"] if token["content"] == bos)
    words["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, whole],
        "pair": [whole, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    path.write_text(json.dumps(words))
    path = tmp_path / "chat_template.jinja"
    path.write_text(bos + path.read_text())
    backbone = untried(folder, monkeypatch)
    assert backbone._tokenizer.bos_token == bos and backbone._tokenizer("a")["input_ids"][0] == number
    backbone.check()


def test_an_untried_family_with_positions_by_sizes_that_are_not_passed_on_is_refused(tmp_path, monkeypatch):
    backbone = untried(tiny_families.write(tmp_path, "minicpmv4_7"), monkeypatch)
    monkeypatch.setattr(Family, "numbered", get_family("minicpm").numbered)
    with pytest.raises(BadInput, match="gives target_sizes, which the model reads"):
        backbone.check()


def test_kinds_of_tokens_that_differ_from_the_processors_are_refused(tmp_path, monkeypatch):
    backbone = untried(tiny_families.write(tmp_path, "molmo2"), monkeypatch)
    monkeypatch.setattr(Family, "opening", get_family("molmo2").opening)
    monkeypatch.setattr(type(backbone), "_kind_ids", [])
    with pytest.raises(BadInput, match="marks other tokens as of an image"):
        backbone.check()


def get_family(name):
    return type(registry.load(families, name, "tests"))


@pytest.mark.parametrize("family", ["got_ocr2", "inkling2"])
def test_a_family_that_knows_no_other_attention_gets_eager(tmp_path, family):
    backbone = ENTRY(Options(tiny_families.write(tmp_path, family)), None)
    assert backbone.attentions == ("eager",) and backbone.build(on_meta=True).config._attn_implementation == "eager"


@pytest.mark.parametrize("folder", ["deepseek_ocr2", "step3p7", "unlimited_ocr"], indirect=True)
@torch.no_grad()
def test_at_stage_3_images_without_parts_take_the_way_of_images_with_parts(folder, monkeypatch):
    """A weight is gathered by all ranks together, so that each has to run the same modules as often."""
    backbone, model = made(folder)
    see, calls = backbone.image_transform(False), []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))

    def read(*sizes):
        calls.clear()
        images = backbone.collate_images([see(torch.zeros(3, *size, dtype=torch.uint8), None) for size in sizes])
        features = model.image_features(images)
        return "pixel_values_local" in images, list(calls), features.tokens

    (apart, ways, _), (whole, fewer, plain) = read((20, 300), (16, 16)), read((16, 16), (16, 16))
    assert apart and not whole and len(fewer) < len(ways)
    monkeypatch.setattr(alike, "is_split", lambda model: True)
    _, as_many, features = read((16, 16), (16, 16))
    assert as_many == ways and all(map(torch.equal, features, plain)) and len(features) == len(plain)


def test_colours_of_a_border_differ_by_channel():
    padded = torchvision_functions.pad(torch.zeros(2, 3, 1, 1), [1, 0, 0, 0], [1.0, 2.0, 3.0])
    assert padded.tolist() == [[[[1.0, 0.0]], [[2.0, 0.0]], [[3.0, 0.0]]]] * 2


@pytest.mark.parametrize("folder", ["qwen3_vl"], indirect=True)
def test_fewer_pixels_make_fewer_tokens_where_the_processor_bounds_them(folder):
    tokens = [made(folder, max_pixels=most)[0].tokens([Prompted("?", "a", images=1)], [(60, 60)]) for most in (0, 784)]
    assert tokens == [(26, 16, 26**2, 64, 64**2), (19, 9, 19**2, 36, 36**2)]


@pytest.mark.parametrize("folder", ["internvl"], indirect=True)
def test_a_bound_on_pixels_that_nothing_reads_is_refused(folder):
    with pytest.raises(BadInput, match="max_pixels"):
        made(folder, max_pixels=784)


@pytest.mark.parametrize("folder", ["internvl"], indirect=True)
def test_weights_of_another_shape_are_refused_in_one_line(folder, tmp_path):
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 40
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        BadInput, match=r"do not fit its configuration: .*_proj.* \(32, 48\), and \(32, 40\) by"
    ) as error:
        made(str(copied))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("said", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}])
def test_weights_that_are_quantised_already_are_refused_in_one_line(tmp_path, said):
    folder = tiny_families.write(tmp_path, "internvl")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    for use in (lambda b: b.check(), lambda b: b.build()):
        with pytest.raises(BadInput, match=f"quantised already .*{said['quant_method']}") as error:
            use(ENTRY(Options(folder), None))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "chameleon", "kimi_k25"])
def test_a_tokenizer_without_the_token_of_images_is_refused_in_one_line(tmp_path, model_type):
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    tiny_families.tokenizer(tiny_families.FAMILIES["idefics3"]).save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="no token for the features of an image") as error:
        ENTRY(Options(str(tmp_path)), None).check()
    assert "\n" not in str(error.value)
