"""The composed vision-text decoder: wiring, what the loss asks for, writing with cache and beams, refusals."""

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForCausalLM

import mmpeft_ds
from mmpeft_ds.backbones.vision_text_decoder.backbone import ENTRY, Options
from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites.condition import current
from tests.helpers.models import tiny_towers

LORA = {"train_bias": True, "train_norms": True, "r": 4}
ADAPTER = {"train_norms": True, "r": 4}
METHODS = {
    "lora": lambda **o: mmpeft_ds.RoutedLoraConfig(**{**LORA, **o}),
    "adapter": lambda **o: mmpeft_ds.RoutedAdapterConfig(**{**ADAPTER, **o}),
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    made = {f: tiny_towers.write_decoder(folder / f, f) for f in tiny_towers.DECODERS}
    made["vit"] = tiny_towers.write_vision(folder / "vit", "vit")
    made["wide"] = tiny_towers.write_vision(folder / "wide", "vit", width=32)
    made["bert"] = tiny_towers.write_text(folder / "bert", "bert")
    return made


def entry(towers, text="gpt2", vision="vit", **options):
    options = {"max_text_length": 12, **options}
    made = ENTRY(Options(vision=towers[vision], text=towers[text], image_size=8, **options), None)
    made.check()
    return made


def pixels(seed):
    return torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch(backbone, *slots):
    """Each slot: seeds of its images, and (prompt, target) pairs."""
    samples = [
        Sample(str(i), 1.0, [pixels(s) for s in seeds], [Prompted(*t) for t in texts], [0] * len(texts))
        for i, (seeds, texts) in enumerate(slots)
    ]
    return pack(samples, backbone.collate_images, backbone.collate_texts, lambda t: {})


def adapted(model, method="lora", **options):
    """A peft model whose adapter does something."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, METHODS[method](**options)).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return wrapped


MIXED = (
    ([1], [("", "is it a red circle"), ("what color", "blue")]),
    ([2, 3], [("", "the big square")]),
    ([], [("is there", "a circle")]),
)


@torch.no_grad()
def test_with_one_image_it_is_the_stock_model_behind_one_more_embedding(towers):
    backbone = entry(towers)
    model = backbone.build().eval()
    packed = batch(backbone, ([1], [("", "is it red")]))
    stock = AutoModelForCausalLM.from_pretrained(towers["gpt2"]).eval()
    tower = AutoModel.from_pretrained(towers["vit"]).eval()
    image = tower((packed.images["pixel_values"] / 255 - 0.5) / 0.5).pooler_output
    embedded = torch.cat([image[:, None], stock.transformer.wte(packed.texts["input_ids"])], 1)
    out = model(**backbone.inputs(packed))
    torch.testing.assert_close(out.logits, stock(inputs_embeds=embedded).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.image_features[:, 0], image, atol=1e-5, rtol=1e-5)
    packed.images["image_features"] = out.image_features
    del packed.images["pixel_values"]
    assert torch.equal(model(**backbone.inputs(packed)).logits, out.logits)


@pytest.mark.parametrize(
    ("text", "prefix", "condition", "route", "method"),
    [
        *(("gpt2", prefix, "none", "none", "lora") for prefix in ("pooled", "tokens")),
        *(("gpt2", prefix, "pooled", "mul", "lora") for prefix in ("none", "pooled")),
        *(("gpt2", prefix, "tokens", "matmul1", "adapter") for prefix in ("none", "pooled", "tokens")),
        *(("llama", prefix, "pooled", "add", "adapter") for prefix in ("none", "tokens")),
        ("llama", "pooled", "tokens", "matmul1", "lora"),
    ],
)
def test_in_every_wiring_a_text_is_written_and_rated_as_if_alone(towers, text, prefix, condition, route, method):
    backbone = entry(towers, text, prefix=prefix, condition=condition)
    model = adapted(backbone.build(), method, route=route)
    together = batch(backbone, *MIXED)
    alone = [batch(backbone, (seeds, [t])) for seeds, texts in MIXED for t in texts]
    with torch.no_grad():
        total, count = forward(model, backbone, together).token_losses()
        each = [forward(model, backbone, b).token_losses() for b in alone]
    torch.testing.assert_close(total, torch.cat([t for t, _ in each]), atol=2e-5, rtol=1e-5)
    assert torch.equal(count, torch.cat([c for _, c in each]))
    written = backbone.generate(model, together, num_beams=2, max_new_tokens=3)
    assert written == [w for b in alone for w in backbone.generate(model, b, num_beams=2, max_new_tokens=3)]
    assert len(written) == 4


@pytest.mark.parametrize("prefix", ["none", "pooled"])
def test_the_image_matters_where_it_is_used(towers, prefix):
    backbone = entry(towers, prefix=prefix)
    for route, matters in (("none", prefix != "none"), ("mul", True)):
        model = adapted(backbone.build(), route=route)
        with torch.no_grad():
            one, other = (model(**backbone.inputs(batch(backbone, ([s], [("", "it is")])))).logits for s in (1, 9))
        assert ((one - other).abs().max() > 1e-4) == matters


def test_fixed_labels_ask_for_every_word_and_one_end_but_for_no_prompt_and_no_padding(towers):
    backbone = entry(towers)
    packed = batch(backbone, ([1], [("what color", "red"), ("", "! is it"), ("is it", "")]))
    ids = {word: i for word, i in backbone._tokenizer.get_vocab().items()}
    end = ids["<|endoftext|>"]
    assert packed.texts["labels"].tolist() == [
        [-100, -100, ids["red"], end],
        [ids["!"], ids["is"], ids["it"], end],
        [-100] * 4,
    ]
    assert packed.texts["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    with torch.no_grad():
        written = forward(backbone.build(), backbone, packed)
    # the image predicts the first word; what follows the last token is not asked
    assert written.logits.shape[1] == 5 and written.labels[1].tolist() == [0, ids["is"], ids["it"], end, -100]
    cut = batch(entry(towers, max_text_length=3), ([1], [("", "is it a red circle")])).texts
    assert cut["labels"].tolist() == [[ids["is"], ids["it"], ids["a"]]], "what is cut does not end"


@pytest.mark.parametrize("prefix", ["none", "pooled"])
def test_the_official_loss_is_the_published_one(towers, prefix):
    backbone = entry(towers, loss="official", prefix=prefix, max_text_length=7)
    packed = batch(backbone, ([1], [("", "is it red ! !"), ("", "a big blue circle")]))
    with torch.no_grad():
        written = forward(backbone.build(), backbone, packed)
    tokens = packed.texts["input_ids"]
    assert tokens.shape == (2, 7), "padded to the full length"
    shifted = written.logits[:, 1:-1] if prefix == "pooled" else written.logits[:, :-1]
    want = cross_entropy(shifted.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)
    total, count = written.token_losses()
    torch.testing.assert_close(total.sum() / count.sum(), want)
    assert torch.equal(count, (packed.texts["labels"] != -100).sum(1)), "known before the forward"
    start = 1 if prefix == "none" else 0
    assert count.tolist() == [7 - 1 - 2, 6], "padding is asked for, the two ! and the first token are not"
    assert (tokens[0, :start] == backbone._tokenizer.get_vocab()["<s>"]).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("route", ["none", "mul", "add", "matmul1", "matmul2", "matmul1_relu", "ones"])
def test_a_later_token_never_changes_an_earlier_one(towers, method, route):
    backbone = entry(towers)
    model = adapted(backbone.build(), method, route=route)
    with torch.no_grad():
        packed = batch(backbone, ([1], [("", "is it a red circle")]))
        before = model(**backbone.inputs(packed)).logits
        packed.texts["input_ids"][:, 3:] = 2
        after = model(**backbone.inputs(packed)).logits
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("route", ["mul", "matmul1"])
@pytest.mark.parametrize("beams", [1, 3])
def test_writing_with_cache_and_beams_equals_writing_without(towers, method, route, beams):
    backbone = entry(towers)
    model = adapted(backbone.build(), method, route=route)
    asked = {k: v for k, v in backbone.inputs(batch(backbone, *MIXED)).items() if k not in ("input_ids",)}
    prompts = batch(backbone, *((seeds, [(p, "") for p, _ in texts]) for seeds, texts in MIXED)).texts
    asked |= {"input_ids": prompts["input_ids"], "attention_mask": prompts["attention_mask"]}
    options = dict(num_beams=beams, max_new_tokens=6, do_sample=False, pad_token_id=0)
    cached = model.generate(**asked, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**asked, **options, use_cache=False))


def test_greedy_writing_takes_the_best_token_of_the_full_forward(towers):
    backbone = entry(towers)
    model = adapted(backbone.build(), "adapter", route="matmul1")
    packed = batch(backbone, ([4], [("", "")]))
    written = model.generate(
        pixel_values=packed.images["pixel_values"], max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    ids = torch.zeros(1, 0, dtype=torch.int64)
    with torch.no_grad():
        for token in written[0]:
            best = model(input_ids=ids, pixel_values=packed.images["pixel_values"]).logits[0, -1].argmax()
            assert token == best
            ids = torch.cat([ids, best.view(1, 1)], 1)


def test_every_step_sees_the_condition_of_its_own_row_for_every_beam(towers):
    backbone = entry(towers)
    model = adapted(backbone.build())
    seen = []
    layer = model.get_base_model().text_model.transformer.h[0]
    layer.register_forward_pre_hook(lambda *_: seen.append(current().tokens))
    packed = batch(backbone, ([1], [("", "")]), ([2], [("", "")]))
    backbone.generate(model, packed, num_beams=3, max_new_tokens=4)
    with torch.no_grad():
        images = model.get_base_model().encode_images(packed.images["pixel_values"])
    assert len(seen) >= 2 and all(torch.equal(tokens, images.repeat_interleave(3, 0)) for tokens in seen[1:])
    assert current() is None


def test_the_longest_length_counts_the_image_and_the_prompt(towers):
    backbone = entry(towers)
    model = backbone.build().eval()
    packed = batch(backbone, ([1], [("", "")]))
    never_ends = {"suppress_tokens": [backbone._end_id, 1, 2]}  # nor writes what is not shown
    assert len(backbone.generate(model, packed, max_length=6, **never_ends)[0].split()) == 5
    assert len(backbone.generate(model, packed, max_new_tokens=6, **never_ends)[0].split()) == 6
    start = entry(towers, prefix="none")  # one token: <s>
    assert len(start.generate(start.build().eval(), packed, max_length=6, **never_ends)[0].split()) == 5
    with pytest.raises(BadInput, match="counts the prompt") as error:
        backbone.generate(model, batch(backbone, ([1], [("is it red", "")])), max_length=4)
    assert "\n" not in str(error.value)


def test_choices_are_all_that_it_writes(towers):
    backbone = entry(towers)
    model = backbone.build().eval()
    written = backbone.generate(model, batch(backbone, *MIXED), choices=["red", "big blue"])
    assert set(written) <= {"red", "big blue"} and len(written) == 4


@pytest.mark.parametrize("method", METHODS)
def test_disabling_the_adapter_writes_and_rates_as_the_frozen_model_to_the_bit(towers, method, tmp_path):
    backbone = entry(towers)
    packed = batch(backbone, *MIXED)

    @torch.no_grad()
    def said(model):
        return forward(model, backbone, packed).logits

    frozen = said(backbone.build().eval())
    model = adapted(backbone.build(), method)
    changed = said(model)
    assert not torch.equal(changed, frozen)
    with model.disable_adapter():
        assert torch.equal(said(model), frozen)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(backbone.build(), tmp_path).eval()
    assert torch.equal(said(again), changed)
    assert backbone.generate(again, packed, num_beams=2) == backbone.generate(model, packed, num_beams=2)


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_layers_see_the_condition_of_their_own_forward(towers, method):
    backbone = entry(towers)

    def gradients(checkpointing):
        model = adapted(backbone.build(), method, route="matmul1")
        calls = []
        model.get_base_model().text_model.transformer.h[0].attn.register_forward_hook(lambda *_: calls.append(1))
        if checkpointing:
            model.get_base_model()._set_gradient_checkpointing(True)
        model.train()
        losses = []
        for seed in (1, 2):  # two forwards before one backward
            written = forward(model, backbone, batch(backbone, ([seed], [("", "is it red")])))
            losses.append(written.token_losses()[0].sum())
        sum(losses).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, len(calls)

    (plain, once), (recomputed, twice) = gradients(False), gradients(True)
    assert (once, twice) == (2, 4)
    assert all(g is not None and g.any() for g in plain.values())
    torch.testing.assert_close(recomputed, plain)


def test_frozen_towers_stay_in_eval_mode_unless_dropout_is_asked_for(towers):
    backbone = entry(towers)
    model = peft.get_peft_model(backbone.build(), METHODS["lora"](dropout=0.5)).train()
    base = model.get_base_model()
    assert not any(m.training for m in base.modules() if isinstance(m, torch.nn.Dropout))
    assert any(m.training for n, m in base.named_modules() if n.endswith("routed_lora.default"))
    assert backbone.frozen_prefix(base) == [
        "vision_model",
        "text_model.transformer.wte",
        "text_model.transformer.wpe",
    ]
    backbone.train_dropout = True
    noisy = backbone.build().train()
    assert noisy.text_model.transformer.drop.training and not noisy.vision_model.training


def test_a_bfloat16_base_has_float32_trainables(towers):
    backbone = entry(towers)
    backbone.dtype = torch.bfloat16
    for method in METHODS:
        model = adapted(backbone.build(), method)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        packed = batch(backbone, *MIXED)
        total, _ = forward(model, backbone, packed).token_losses()
        assert total.dtype == torch.float32 and total.isfinite().all()
        assert len(backbone.generate(model, packed, max_new_tokens=2)) == 4


def test_the_model_is_known_to_the_auto_classes_and_keeps_its_tied_head(towers, tmp_path):
    backbone = entry(towers)
    model = backbone.build().eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.text_model.lm_head.weight is loaded.text_model.transformer.wte.weight
    packed = batch(backbone, *MIXED)
    with torch.no_grad():
        assert torch.equal(loaded(**backbone.inputs(packed)).logits, model(**backbone.inputs(packed)).logits)


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize(("prefix", "condition"), [("pooled", "none"), ("tokens", "pooled"), ("none", "tokens")])
def test_a_projection_joins_towers_of_different_width_and_trains_with_the_adapter(
    towers, projection, prefix, condition, tmp_path
):
    backbone = entry(towers, "llama", "wide", projection=projection, prefix=prefix, condition=condition)
    assert backbone.condition_width == (None if condition == "none" else tiny_towers.WIDTH)
    torch.manual_seed(5)
    base = backbone.build()
    assert base.head_modules == ("vision_projection",)
    route = {"none": "none", "pooled": "mul", "tokens": "matmul1"}[condition]
    model = adapted(base, route=route, modules_to_save=[*base.head_modules])
    packed = batch(backbone, *MIXED)
    outputs = forward(model, backbone, packed)
    outputs.token_losses()[0].sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "vision_projection.modules_to_save" in n}
    assert len(grads) == (6 if projection == "mlp" else 2)
    assert all(g is not None and g.any() for g in grads.values())
    assert not any(p.grad is not None for n, p in model.named_parameters() if ".original_module." in n)
    model.save_pretrained(tmp_path)
    torch.manual_seed(6)  # the projection of the new base is another, the adapter brings the trained one
    again = peft.PeftModel.from_pretrained(backbone.build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(forward(again, backbone, packed).logits, outputs.logits)
    assert backbone.generate(again, packed, max_new_tokens=3) == backbone.generate(model, packed, max_new_tokens=3)


def test_a_text_without_image_does_not_depend_on_the_projection(towers):
    backbone = entry(towers, "llama", "wide", projection="mlp", condition="none")
    packed = batch(backbone, ([], [("", "a red circle")]))
    model = backbone.build().eval()
    with torch.no_grad():
        before = model(**backbone.inputs(packed)).logits
        model.vision_projection.out.weight.add_(1)
        assert torch.equal(model(**backbone.inputs(packed)).logits, before)


@torch.no_grad()
def test_a_begin_token_stands_before_the_images_and_once_where_there_are_none(towers):
    plain, begun = (entry(towers, "llama", condition="none", begin_token=b) for b in (False, True))
    model, other = plain.build().eval(), begun.build().eval()
    packed = batch(plain, *MIXED)
    stock = AutoModelForCausalLM.from_pretrained(towers["llama"]).eval()
    images = model.encode_images(packed.images["pixel_values"])[:, 0]
    ids = packed.texts["input_ids"][2:3, : int(packed.texts["attention_mask"][2].sum())]  # the text about two images
    embed = stock.get_input_embeddings()
    begin = embed(torch.full((1, 1), stock.config.bos_token_id))
    embedded = torch.cat([begin, images[None, 1:3], embed(ids)], 1)
    logits = other(**begun.inputs(packed)).logits
    length = 2 + ids.shape[1]
    torch.testing.assert_close(
        logits[2, 1 : 1 + length], stock(inputs_embeds=embedded).logits[0, 1:], atol=1e-5, rtol=1e-5
    )
    outputs = [forward(m, b, packed).token_losses()[0] for m, b in ((model, plain), (other, begun))]
    # the row of the text without images is as long with the token as without, beside longer rows
    torch.testing.assert_close(outputs[0][3], outputs[1][3], rtol=1e-6, atol=0)
    assert not torch.isclose(outputs[0], outputs[1])[:3].any()
    alone = [batch(begun, (seeds, [t])) for seeds, texts in MIXED for t in texts]
    each = torch.cat([forward(other, begun, b).token_losses()[0] for b in alone])
    torch.testing.assert_close(outputs[1], each, atol=2e-5, rtol=1e-5)
    written = begun.generate(other, packed, max_new_tokens=3)
    assert written == [w for b in alone for w in begun.generate(other, b, max_new_tokens=3)]


def test_a_model_with_a_projection_is_saved_whole(towers, tmp_path):
    backbone = entry(towers, "llama", "wide", projection="mlp")
    model = backbone.build().eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    packed = batch(backbone, *MIXED)
    with torch.no_grad():
        assert torch.equal(loaded(**backbone.inputs(packed)).logits, model(**backbone.inputs(packed)).logits)


def test_random_weights_are_the_same_in_every_build(towers):
    backbone = entry(towers, random_weights=True)
    torch.manual_seed(1)
    one = backbone.build()
    torch.manual_seed(2)
    other = backbone.build()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vision": "wide"}, "32 wide.*projection: mlp"),
        ({"projection": "deep"}, "none, linear or mlp"),
        ({"begin_token": True, "prefix": "none"}, "leaves no image vector"),
        ({"text": "bert"}, "family 'bert'"),
        ({"max_text_length": 40}, "positions"),
        ({"max_text_length": 1}, "at least 2"),
        ({"prefix": "none", "start": ""}, "nothing to begin with"),
        ({"loss": "mean"}, "fixed or official"),
        ({"image_size": 9}, "patch size"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(towers, change, says):
    options = {"image_size": 8, "max_text_length": 12, **change}
    options |= {k: towers[options.get(k, d)] for k, d in (("vision", "vit"), ("text", "gpt2"))}
    with pytest.raises(BadInput, match=says) as error:
        ENTRY(Options(**options), None).check()
    assert "\n" not in str(error.value)
