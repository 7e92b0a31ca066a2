"""Multimodal language models: the stock loss and generation, packed; chat labels; adapters; batches without images."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlavaNextProcessor, LlavaProcessor

from mmpeft_ds import RoutedLoraConfig
from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.engine.assembly import modality
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.methods import get
from mmpeft_ds.sites import find_sites
from tests.helpers.models import tiny_mllm
from tests.helpers.packs import packed

FAMILIES = list(tiny_mllm.FAMILIES)
one_of_each_kind = pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: tiny_mllm.write(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def made(folders, family, **options):
    backbone = ENTRY(Options(folders[family], **options), None)
    backbone.check()
    return backbone, backbone.build().eval()


def image(seed):
    """Of another size for every seed."""
    shape = (3, 6 + seed % 5, 16 - 2 * (seed % 4))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch(backbone, *samples):
    return packed(backbone, image, samples)


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen2_vl", {"patch_size": 4}, "patch_size 4, .* patch_size 2"),
        ("qwen2_5_vl", {"merge_size": 1}, "merge_size 1, .* spatial_merge_size 2"),
        ("llava", {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}, "crop_size 12, .* 8"),
    ],
)
def test_an_image_processor_of_another_checkpoint_is_refused_in_one_line(tmp_path, family, change, words):
    tiny_mllm.write(tmp_path, family)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BadInput, match=f"preprocessor_config.json has {words}.*one checkpoint"):
        made({family: str(tmp_path)}, family)


ONE = ([1], [Prompted("what color is it ?", "red .")])
TWO = ([2, 3], [Prompted("<image> and <image> same shape ?", "no")])
SHARED = ([4], [Prompted("is it round ?", "yes"), Prompted("what shape is it ?", "a big circle .")])
TALK = ([], [Prompted("and the square ?", "blue .", (("user", "is there a circle ?"), ("assistant", "no .")))])
ALL = (ONE, TWO, SHARED, TALK)


@torch.no_grad()
def losses(backbone, model, *samples):
    return torch.stack(forward(model, backbone, batch(backbone, *samples)).token_losses(), 1)


def stock_inputs(backbone, family, sample, image_backend="torchvision"):
    """What transformers' own pieces make of a sample with one text: pixels, ids with all placeholders."""
    numbers, (text,) = sample
    processor, words = tiny_mllm.image_processor(family, image_backend), backbone._tokenizer
    pixels = processor(images=[image(n).numpy() for n in numbers], return_tensors="pt") if numbers else {}
    encoded = backbone._chat.encode(Prompted(text.prompt, text.target, text.turns, len(numbers)))
    if family.startswith("qwen"):
        counts = [int(grid.prod()) // 4 for grid in pixels.get("image_grid_thw", [])]
    else:
        own = {"llava": LlavaProcessor, "llava_next": LlavaNextProcessor}[family](
            processor, words, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
        kwargs = {"images_kwargs": {}}
        counts = own._get_num_multimodal_tokens([image(n).shape[1:] for n in numbers] or None, **kwargs)
        counts = counts["num_image_tokens"] if numbers else []
    ids, labels, left = [], [], iter(counts)
    for token, label in zip(encoded.ids, encoded.labels, strict=True):
        times = next(left) if token == tiny_mllm.IMAGE else 1
        ids += [token] * times
        labels += [label] * times
    found = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), **pixels}
    if family.startswith("qwen"):
        found["mm_token_type_ids"] = (found["input_ids"] == tiny_mllm.IMAGE).int()
    return found


@pytest.mark.parametrize("image_backend", ["torchvision", "pil"])
@pytest.mark.parametrize("sample", [ONE, TWO, TALK], ids=["one", "two", "talk"])
def test_the_loss_is_the_stock_models_own(folders, family, sample, image_backend):
    backbone, model = made(folders, family, image_backend=image_backend)
    stock = tiny_mllm.FAMILIES[family][1].from_pretrained(folders[family]).eval()
    with torch.no_grad():
        want = stock(**stock_inputs(backbone, family, sample, image_backend)).loss
    total, asked = losses(backbone, model, sample)[0]
    torch.testing.assert_close(total / asked, want, rtol=1e-5, atol=1e-6)


def test_both_image_backends_scale_to_the_same_pixels_but_for_rounding(folders, family):
    wave = torch.linspace(0, 9, 60)[:, None] * torch.linspace(0, 7, 90)
    picture = torch.stack([wave.sin(), wave.cos(), (2 * wave).sin()]).mul(100).add(128).to(torch.uint8)
    by = {b: made(folders, family, image_backend=b)[0].image_transform(False) for b in ("torchvision", "pil")}
    fast, pillow = (by[backend](picture) for backend in ("torchvision", "pil"))
    assert type(by["pil"].processor).__name__ == type(by["torchvision"].processor).__name__ + "Pil"
    assert fast.keys() == pillow.keys()
    pixels = fast.pop("pixel_values"), pillow.pop("pixel_values")
    assert all(torch.equal(fast[name], pillow[name]) for name in fast)
    assert pixels[0].dtype == pixels[1].dtype == torch.uint8 and pixels[0].shape == pixels[1].shape
    apart = (pixels[0].int() - pixels[1].int()).abs()
    assert apart.max() <= 2 and apart.float().mean() < 0.1
    other = by["pil"](picture.flip(2))["pixel_values"].int()
    assert (pixels[0].int() - other).abs().float().mean() > 10  # negative control


def test_packing_changes_nothing_and_the_tower_sees_each_image_once(folders, family):
    backbone, model = made(folders, family)
    alone = torch.cat([losses(backbone, model, sample) for sample in ALL])
    seen = []
    tower = model.get_submodule(tiny_mllm.FAMILIES[family][3])
    hook = tower.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs.get("grid_thw", args[0])), with_kwargs=True
    )
    together = losses(backbone, model, *ALL)
    hook.remove()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1
    if family != "llava_next":  # which cuts images into tiles
        assert len(seen[0]) == 4


def test_loss_is_on_what_the_assistant_says_and_nothing_else(folders, family):
    backbone, _ = made(folders, family)
    texts = batch(backbone, TALK, ONE).texts
    words = backbone._tokenizer
    end = words.eos_token
    for row, want in zip(texts["labels"], [f"no . {end} blue . {end}", f"red . {end}"], strict=True):
        assert words.decode(row[row != -100]) == want
    for row in range(2):
        last = texts["labels"][row, texts["prompt_length"][row] :]
        before = texts["input_ids"][row, : texts["prompt_length"][row]]
        assert int((last != -100).sum()) == 3
        assert words.decode(before).endswith("assistant" if family.startswith("qwen") else "ASSISTANT :")


def greedy_without_cache(backbone, stock, family, sample, steps):
    """Tokens by the stock forward over the whole text, one by one."""
    numbers, (text,) = sample
    found = stock_inputs(backbone, family, (numbers, [Prompted(text.prompt, "", text.turns)]))
    del found["labels"]
    start = found["input_ids"].shape[1]
    for _ in range(steps):
        logits = stock(**found).logits[:, -1:]
        logits[..., tiny_mllm.IMAGE] = float("-inf")  # what random weights may say
        chosen = logits.argmax(-1)
        found["input_ids"] = torch.cat([found["input_ids"], chosen], 1)
        if "mm_token_type_ids" in found:
            found["mm_token_type_ids"] = (found["input_ids"] == tiny_mllm.IMAGE).int()
        if int(chosen) == backbone._tokenizer.eos_token_id:
            break
    return backbone._tokenizer.decode(found["input_ids"][0, start:], skip_special_tokens=True).strip()


@torch.no_grad()
def test_generation_is_greedy_decoding_of_the_stock_model_whatever_the_batch(folders, family):
    backbone, model = made(folders, family)
    stock = tiny_mllm.FAMILIES[family][1].from_pretrained(folders[family]).eval()
    samples = [ONE, TWO, TALK]
    want = [greedy_without_cache(backbone, stock, family, sample, 6) for sample in samples]
    assert len(set(want)) > 1, "answers that are all alike would prove nothing"
    packed = batch(backbone, *samples)
    assert backbone.generate(model, packed, max_new_tokens=6) == want
    assert backbone.generate(model, packed, max_new_tokens=6, use_cache=False) == want


def test_beams_with_and_without_cache_agree(folders, family):
    backbone, base = made(folders, family, condition="pooled")
    model = with_routed_lora(base)
    packed = batch(backbone, *ALL)
    beams = dict(num_beams=3, max_new_tokens=5)
    got = backbone.generate(model, packed, **beams)
    assert got == backbone.generate(model, packed, use_cache=False, **beams)
    with model.disable_adapter():
        assert got != backbone.generate(model, packed, **beams)


def with_routed_lora(base, **options):
    method, config = get("routed_lora"), RoutedLoraConfig(route="mul", r=2, **options)
    method.check(config, find_sites(base), base.config.text_config.hidden_size)
    model = peft.get_peft_model(base, config)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@pytest.mark.parametrize("condition", ["pooled", "tokens"])
def test_texts_are_routed_on_the_images_of_their_own_slot(folders, family, condition):
    backbone, base = made(folders, family, condition=condition)
    assert backbone.condition_width == tiny_mllm.WIDTH
    model = with_routed_lora(base, pool="mean")
    together = losses(backbone, model, *ALL)
    torch.testing.assert_close(together, torch.cat([losses(backbone, model, s) for s in ALL]), rtol=1e-4, atol=1e-4)
    plain, _ = made(folders, family)
    with pytest.raises(BadInput, match="none was published"):
        losses(plain, with_routed_lora(plain.build()), ONE)


def test_lora_trains_and_loads_on_the_stock_model(folders, family, tmp_path):
    backbone, base = made(folders, family)
    frozen = losses(backbone, base, *ALL)
    method = get("lora")
    config = method.prepare(peft.LoraConfig(r=2, init_lora_weights=False), base, find_sites(base))
    model = peft.get_peft_model(base, config)
    packed = batch(backbone, *ALL)
    forward(model, backbone, packed).token_losses()[0].sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(g is not None and g.abs().sum() > 0 for g in trained.values())
    assert all("language_model" in n for n in trained)
    tuned = losses(backbone, model, *ALL)
    assert (tuned - frozen)[:, 0].abs().min() > 1e-3
    with model.disable_adapter():
        assert torch.equal(losses(backbone, model, *ALL), frozen)
    assert tiny_mllm.FAMILIES[family][3] in backbone.frozen_prefix(model.get_base_model())
    model.save_pretrained(tmp_path)
    stock = tiny_mllm.FAMILIES[family][1].from_pretrained(folders[family])
    stock = peft.PeftModel.from_pretrained(stock, tmp_path).eval()
    with torch.no_grad():
        want = stock(**stock_inputs(backbone, family, ONE)).loss
    torch.testing.assert_close(tuned[0, 0] / tuned[0, 1], want, rtol=1e-5, atol=1e-6)


@one_of_each_kind
def test_recomputed_layers_give_the_same_gradients(folders, family):
    backbone, base = made(folders, family, condition="pooled")
    model = with_routed_lora(base).train()
    packed = batch(backbone, *ALL)

    def gradients():
        model.zero_grad()
        forward(model, backbone, packed).token_losses()[0].sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    assert plain and plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5)


class Asked:
    """As much of a task as the dummy pass needs."""

    def collate(self, targets):
        return {}

    def dummy_text(self, text):
        return text

    def dummy_target(self):
        return 0


def vision_lora(backbone, base):
    # LLaVA reads the last but one layer
    targets = [s.v.path for s in find_sites(base).attention if s.modality == "image" and s.layer < 2]
    return peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))


def test_a_batch_without_images_runs_the_tower_on_a_dummy_that_changes_nothing(folders, family):
    backbone, base = made(folders, family)
    model = vision_lora(backbone, base)
    packed = batch(backbone, TALK)
    assert packed.modalities == {"text"}
    completed = modality.complete(packed, [1.0, 2.0], backbone, Asked())
    assert completed.modalities == {"image", "text"} and completed.text_weight.tolist() == [1.0, 0.0]
    total, asked = forward(model, backbone, completed).token_losses()
    torch.testing.assert_close(total[:1], forward(model, backbone, packed).token_losses()[0])
    (total * completed.text_weight).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in gradients)


def test_images_that_no_text_speaks_of_reach_the_tower_in_backward(folders, family):
    backbone, base = made(folders, family)
    model = vision_lora(backbone, base)
    packed = modality.complete(batch(backbone, ([1], [])), [2.0, 1.0], backbone, Asked())
    total, _ = forward(model, backbone, packed).token_losses()
    (total * packed.text_weight).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@one_of_each_kind
def test_padding_alone_gets_one_of_everything(folders, family):
    backbone, model = made(folders, family)
    empty = pack([Sample()], backbone.collate_images, backbone.collate_texts, lambda t: {})
    completed = modality.complete(empty, [0.0, 0.0], backbone, Asked())
    assert forward(model, backbone, completed).token_losses()[0].isfinite().all()
    assert len(backbone.generate(model, completed, max_new_tokens=2)) == 1


def test_a_text_is_cut_around_its_image_which_is_read(folders):
    backbone, model = made(folders, "qwen2_vl", max_text_length=16)
    long = ([1], [Prompted("is it a big red square and a round blue circle is it <image> ?", "no")])
    packed = batch(backbone, long, ONE)
    assert packed.texts["input_ids"].shape[1] <= 16 and packed.changed_texts() == [1, 0, 0]
    assert backbone.inputs(packed)["media_rows"].tolist() == [0, 1]
    torch.testing.assert_close(losses(backbone, model, long, ONE)[1:], losses(backbone, model, ONE))


def test_another_number_of_images_than_the_text_names_is_a_bad_sample(folders):
    backbone, _ = made(folders, "qwen2_vl")
    with pytest.raises(BadSample, match="names <image> 2 times, but the sample has 1 images"):
        batch(backbone, ([1], TWO[1]))


def test_a_placeholder_that_somebody_typed_is_no_image(folders):
    backbone, _ = made(folders, "qwen2_vl")
    ids = backbone._chat.encode(Prompted("is <|video_pad|> it ?", "no")).ids
    assert len(backbone._chat.ids) == 2 and not set(backbone._chat.ids) & set(ids)


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for m in messages %}{{ m['content'][-1]['text'] }} {% endfor %}", "comes to 0 placeholders"),
        (
            "{% for m in messages %}{{ raise_exception('no system\nturns') }}{% endfor %}",
            "cannot render the turns user",
        ),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}", "when a turn is"),
        ("{% for m in messages %}", "cannot render"),
    ],
)
def test_a_template_that_cannot_work_is_refused_in_one_line(folders, tmp_path, template, said):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    with pytest.raises(BadInput, match=said) as error:
        made(folders, "llava", chat_template=str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "family, options, said",
    [
        ("llava", {"max_pixels": 784}, "max_pixels"),
        ("qwen2_vl", {"max_pixels": 100}, "max_pixels"),
        ("llava", {"max_text_length": 3}, "max_text_length"),
        ("llava", {"chat_template": "nowhere.jinja"}, "no file"),
    ],
)
def test_impossible_options_are_refused_in_one_line(folders, family, options, said):
    with pytest.raises(BadInput, match=said) as error:
        made(folders, family, **options)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_lacks_a_part_is_refused(folders, tmp_path):
    import shutil

    for lacking, said in (
        ("preprocessor_config.json", "image processor"),
        ("chat_template.jinja", "no chat template"),
    ):
        folder = tmp_path / lacking
        shutil.copytree(folders["qwen2_vl"], folder)
        (folder / lacking).unlink()
        with pytest.raises(BadInput, match=said):
            backbone, _ = made({"qwen2_vl": str(folder)}, "qwen2_vl")
            backbone.image_transform(False)


def test_a_system_turn_is_put_first_where_there_is_none(folders):
    backbone, _ = made(folders, "qwen2_vl", system="a big circle")
    words = backbone._tokenizer
    assert words.decode(backbone._chat.encode(ONE[1][0]).ids).startswith("<|im_start|> system a big circle")
    given = Prompted("is it ?", turns=(("system", "a square"),))
    assert "circle" not in words.decode(backbone._chat.encode(given).ids)


def test_fewer_pixels_make_fewer_tokens(folders):
    few, many = (made(folders, "qwen2_vl", max_pixels=n)[0] for n in (784, 4096))
    large = torch.zeros(3, 100, 100, dtype=torch.uint8)
    grids = [b.image_transform(False)(large)["image_grid_thw"].prod().item() for b in (few, many)]
    assert grids[0] <= 784 / 4 < grids[1] <= 4096 / 4


@one_of_each_kind
def test_a_half_precision_base_keeps_float32_adapters(folders, family):
    backbone = ENTRY(Options(folders[family], condition="pooled"), None)
    backbone.dtype = torch.bfloat16
    model = with_routed_lora(backbone.build())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    total, _ = forward(model, backbone, batch(backbone, *ALL)).token_losses()
    assert total.dtype == torch.float32 and total.isfinite().all()
    total.sum().backward()


@one_of_each_kind
def test_random_weights_need_no_checkpoint_and_meta_no_storage(folders, family):
    backbone = ENTRY(Options(folders[family], random_weights=True), None)
    assert {p.device.type for p in backbone.build(on_meta=True).parameters()} == {"meta"}
    first, second = backbone.build(), backbone.build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_answers_can_be_held_to_a_closed_list(folders, family):
    backbone, model = made(folders, family)
    choices = ["a big circle", "a red square", "no"]
    got = backbone.generate(model, batch(backbone, *ALL), choices=choices, max_new_tokens=99)
    assert len(got) == 5 and set(got) <= set(choices)


def test_a_longest_text_with_its_prompt_makes_no_sense_here(folders):
    backbone, model = made(folders, "llava")
    with pytest.raises(BadInput, match="max_new_tokens"):
        backbone.generate(model, batch(backbone, ONE), max_length=20)


def test_the_recipe_s_max_pixels_wins_over_those_in_the_checkpoint_s_file(tmp_path):
    folder = tiny_mllm.write(tmp_path / "qwen", "qwen2_vl")
    path = Path(folder) / "preprocessor_config.json"
    config = json.loads(path.read_text())
    del config["size"]  # checkpoints on the hub have these keys in its place
    path.write_text(json.dumps(config | {"min_pixels": 784, "max_pixels": 12_845_056}))
    backbone = ENTRY(Options(folder, max_pixels=4096), None)
    made = backbone.image_transform(False)(torch.zeros(3, 300, 300, dtype=torch.uint8), None)
    _, height, width = made["image_grid_thw"][0].tolist()
    patch = backbone._config.vision_config.patch_size
    assert height * width * patch**2 <= 4096
