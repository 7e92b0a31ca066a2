"""Texts answered in groups of similar length: same answers and gradients, less padding, always as many passes."""

import itertools
import random

import peft
import pytest
import tiny_towers
import torch

import mmpeft_ds
from mmpeft_ds.backbones._vision_text_model import length_groups
from mmpeft_ds.backbones.vision_text_encoder import ENTRY, Options
from mmpeft_ds.errors import BadInput

# slot 0 has one image, slot 1 two, slot 2 none; lengths 3 to 9 in no order
TEXTS = ["is it red", "what color is the big circle", "is it", "red", "what shape is there", "is there a round square"]
OWNERS = [0, 0, 1, 1, 2, 2]
IMAGE_OWNERS = [0, 1, 1]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    made = {f: tiny_towers.write_text(folder / f, f) for f in ("bert", "roberta")}
    return {**made, "vision": tiny_towers.write_vision(folder / "vit", "vit")}


def entry(towers, text="roberta", **options):
    backbone = ENTRY(
        Options(vision=towers["vision"], text=towers[text], image_size=8, **options), ["yes", "no", "red"]
    )
    backbone.dtype = torch.float64
    return backbone


def inputs(backbone, texts=6, images=3):
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {
        **(backbone.collate_images(list(pixels[:images])) if images else {}),
        **backbone.collate_texts(TEXTS[:texts]),
        "image_owner": torch.tensor(IMAGE_OWNERS[:images], dtype=torch.int64),
        "text_owner": torch.tensor(OWNERS[:texts]),
        "num_slots": 3,
    }


def adapted(backbone):
    torch.manual_seed(0)
    route = {"none": "none", "pooled": "mul", "tokens": "matmul1"}[backbone.options.condition]
    config = mmpeft_ds.RoutedLoraConfig(r=4, route=route, train_norms=True, modules_to_save=["head"])
    model = peft.get_peft_model(backbone.build(), config).double()
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)
    return model.train()


def answers(model, batch, buckets, change=None):
    """Logits, gradients, shapes of the encoder's input per pass, and how many passes backward went through."""
    model.get_base_model().config.length_buckets = buckets
    model.zero_grad()
    forward, backward = [], []

    def watch(module, given, out):
        forward.append(given[0].shape[:2])
        out.last_hidden_state.register_hook(lambda gradient: backward.append(gradient.shape[:2]))

    hook = model.get_base_model().text_model.encoder.register_forward_hook(watch)
    logits = model(**batch).logits
    hook.remove()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    (logits * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients, forward, backward


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], atol=1e-12, rtol=1e-12)
    assert got[1].keys() == want[1].keys() and any("routed_lora" in n for n in want[1])
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, atol=1e-12, rtol=1e-10, msg=name)


@pytest.mark.parametrize("buckets", [2, 3, 8])
@pytest.mark.parametrize("images", [3, 1, 0])
@pytest.mark.parametrize("text", ["bert", "roberta"])
def test_answers_and_gradients_are_those_of_one_pass_and_less_is_computed(towers, text, images, buckets):
    backbone = entry(towers, text)
    model, batch = adapted(backbone), inputs(backbone, images=images)
    one, grouped = answers(model, batch, 1), answers(model, batch, buckets)
    assert_same(grouped, one)
    assert torch.pdist(one[0]).min() > 1e-3  # else answers in a wrong order would not show
    assert len(one[2]) == 1 and len(grouped[2]) == len(grouped[3]) == buckets
    assert sum(rows * length for rows, length in grouped[2]) < one[2][0].numel()


@pytest.mark.parametrize("head_input", ["pooler", "raw", "mean"])
@pytest.mark.parametrize("wiring", ["none", "pooled", "tokens"])
def test_every_wiring_gives_the_same_in_groups(towers, wiring, head_input):
    backbone = entry(towers, prefix=wiring, condition=wiring, head_input=head_input)
    model, batch = adapted(backbone), inputs(backbone)
    assert_same(answers(model, batch, 2), answers(model, batch, 1))


@pytest.mark.parametrize("texts, buckets", [(1, 2), (1, 3), (2, 3)])
def test_with_fewer_texts_than_groups_no_pass_is_missing_forward_or_backward(towers, texts, buckets):
    backbone = entry(towers)
    model, batch = adapted(backbone), inputs(backbone, texts=texts)
    grouped = answers(model, batch, buckets)
    assert len(grouped[2]) == len(grouped[3]) == buckets
    assert_same(grouped, answers(model, batch, 1))


def test_recomputed_layers_see_the_condition_of_their_own_group(towers):
    backbone = entry(towers)
    model, batch = adapted(backbone), inputs(backbone)
    plain = answers(model, batch, 1)
    base, calls = model.get_base_model(), []
    base.text_model.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append(1))
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(answers(model, batch, 2), plain)
    assert len(calls) == 4  # else nothing was recomputed


@pytest.mark.parametrize("mask", ["none", "left"])
def test_texts_without_mask_or_padded_on_the_left_are_not_cut(towers, mask):
    backbone = entry(towers, "bert")
    model, batch = adapted(backbone), inputs(backbone)
    if mask == "none":
        del batch["attention_mask"]
    else:
        batch["input_ids"], batch["attention_mask"] = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)
    assert_same(answers(model, batch, 2), answers(model, batch, 1))


def test_float32_answers_agree_closely(towers):
    backbone = entry(towers)
    backbone.dtype = torch.float32
    model, batch = backbone.build().eval(), inputs(backbone)
    with torch.no_grad():
        want = model(**batch)
        model.config.length_buckets = 2
        got = model(**batch)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-6, rtol=0)
    assert want.last_hidden_state is not None and got.last_hidden_state is None


def test_groups_are_the_cheapest_there_are():
    def cost(lengths, groups):
        return sum(len(group) * max(lengths[row] for row in group) for group in groups)

    draw = random.Random(0)
    for number, _ in itertools.product((1, 2, 3, 4), range(20)):
        lengths = [draw.randint(1, 9) for _ in range(draw.randint(4, 12))]
        groups, order = length_groups(lengths, number), sorted(range(len(lengths)), key=lengths.__getitem__)
        if len(set(lengths)) >= number:
            assert [row for group in groups for row in group] == order
            cuts = itertools.combinations(range(1, len(lengths)), number - 1)
            tried = ([order[a:b] for a, b in itertools.pairwise((0, *cut, None))] for cut in cuts)
            assert cost(lengths, groups) == min(cost(lengths, t) for t in tried)


def test_a_row_stands_in_for_groups_that_would_be_empty():
    assert length_groups([7], 3) == [[0], [0], [0]]
    assert length_groups([7, 7, 5], 2) == [[2], [0, 1]]
    assert sorted(map(len, length_groups([7, 7, 5], 4))) == [1, 1, 1, 2]


def test_the_option_reaches_the_model_and_its_saved_configuration(towers, tmp_path):
    model = entry(towers, length_buckets=2).build()
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.length_buckets == 2
    with pytest.raises(BadInput, match="length_buckets: 0"):
        entry(towers, length_buckets=0).check()
