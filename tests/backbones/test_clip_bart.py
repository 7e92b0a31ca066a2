"""CLIP features + BART: the published wiring, conditions, generation with cache and beams, stored features."""

import copy

import numpy as np
import peft
import pytest
import torch
from torch.nn.functional import adaptive_max_pool2d, layer_norm
from transformers import AutoModelForSeq2SeqLM, BartForConditionalGeneration

import mmpeft_ds
from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.stream import Stream, StreamSource
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.sites.condition import current
from tests.helpers.data.tiny_shards import RawSample, read, write_shards
from tests.helpers.models import tiny_clip_bart


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clip_bart")


def samples():
    """Two questions on one image, one on a pair, one without an image, padding."""
    return [
        Sample(
            "a",
            1.0,
            [tiny_clip_bart.grid(0)],
            [Prompted("vqa : is it red ?", "yes"), Prompted("what", "red blue .")],
            [0, 0],
        ),
        Sample(
            "b", 1.0, [tiny_clip_bart.grid(1), tiny_clip_bart.grid(2)], [Prompted("nlvr : is it round", "true")], [0]
        ),
        Sample("c", 1.0, [], [Prompted("a big circle", "square")], [0]),
        Sample(),
    ]


def packed(backbone, given=None):
    return pack(given or samples(), backbone.collate_images, backbone.collate_texts, lambda t: {})


def asked(backbone, batch):
    return {name: value for name, value in backbone.inputs(batch).items() if name != "decoder_input_ids"}


def spread(model, std=0.5):
    """Logits that differ from row to row, so that what is written does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "shared" in name or "visual_embedding" in name and parameter.dim() > 1:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def attach(model, **options):
    """The model with a routed LoRA in both towers that really changes it."""
    options = {"r": 4, "alpha": 8, "tower": ["text"], "route": "mul", **options}
    wrapped = peft.get_peft_model(model, mmpeft_ds.RoutedLoraConfig(**options, modules_to_save=["visual_embedding"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if ".routed_lora." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def test_the_visual_embedding_is_the_published_sum(folder):
    backbone = tiny_clip_bart.make(folder)
    model = spread(backbone.build())
    grids = torch.stack([tiny_clip_bart.grid(1), tiny_clip_bart.grid(2)])
    with torch.no_grad():
        got, keep = model._visual_tokens(grids, torch.zeros(1, 3).long(), torch.tensor([0, 0]), torch.tensor([0]), 1)
        v = model.visual_embedding
        pooled = adaptive_max_pool2d(grids.transpose(1, 2).reshape(2, tiny_clip_bart.FEATURES, 3, 3), 2)
        features = (
            layer_norm(v.feature(pooled.flatten(2).transpose(1, 2)), (tiny_clip_bart.WIDTH,)) * v.feature_norm.weight
        )
        box = layer_norm(v.box.bias, (tiny_clip_bart.WIDTH,)) * v.box_norm.weight + v.box_norm.bias
        table = model.text_model.model.shared.weight
        assert len(table) == len(tiny_clip_bart.WORDS) + 9
        want = features + v.feature_norm.bias + box + v.image_order.weight[:2, None] + table[-4:].flip(0)
    torch.testing.assert_close(got, want.reshape(1, 8, tiny_clip_bart.WIDTH), atol=1e-5, rtol=1e-5)
    assert keep.all()


def test_without_images_it_is_stock_bart(folder):
    backbone = tiny_clip_bart.make(folder)
    model = backbone.build().eval()
    batch = packed(
        backbone, [Sample("c", 1.0, [], [Prompted("a big red circle", "it is"), Prompted("a", "red")], [0, 0])]
    )
    stock = BartForConditionalGeneration.from_pretrained(folder / "bart").eval()
    texts = {k: v for k, v in batch.texts.items() if k != "labels"}
    with torch.no_grad():
        want = stock(**texts).logits
        got = model(**backbone.inputs(batch)).logits
    torch.testing.assert_close(got[..., : want.shape[-1]], want, atol=1e-5, rtol=1e-5)


def test_the_rows_that_name_places_are_the_same_in_every_build(folder):
    first, again = (tiny_clip_bart.make(folder).build().text_model.model.shared.weight[-9:] for _ in range(2))
    assert torch.equal(first, again) and first.std() > 0.01
    saved = BartForConditionalGeneration.from_pretrained(folder / "bart").model.shared.weight
    assert torch.equal(tiny_clip_bart.make(folder).build().text_model.model.shared.weight[:-9], saved)


def test_labels_are_aligned_and_unknown_answers_ask_nothing(folder):
    backbone = tiny_clip_bart.make(folder)
    model = backbone.build().eval()
    batch = packed(
        backbone, [Sample("c", 1.0, [tiny_clip_bart.grid(0)], [Prompted("a", "red blue"), "what color"], [0, 0])]
    )
    words = {word: i for i, word in enumerate(tiny_clip_bart.WORDS)}
    red, blue = words["red"], words["blue"]
    assert batch.texts["labels"].tolist() == [[0, red, blue, 2], [-100] * 4]
    assert batch.texts["decoder_input_ids"].tolist() == [[2, 0, red, blue], [2, 0, 2, 1]]
    with torch.no_grad():
        written = backbone.read(model(**backbone.inputs(batch)), batch)
        # transformers' own loss of the same labels is the mean over the asked tokens
        total, count = written.token_losses()
        loss = model(**asked(backbone, batch), labels=batch.texts["labels"]).loss
    assert count.tolist() == [4, 0] and total[1] == 0
    torch.testing.assert_close(total.sum() / 4, loss)


@pytest.mark.parametrize("condition", ["visual", "embedding", "tokens", "none"])
def test_what_adapters_are_given_to_route_on(folder, condition):
    backbone = tiny_clip_bart.make(folder, condition=condition)
    model = spread(backbone.build())
    seen = {}
    base = model.text_model.model
    for name, module in (("encoder", base.encoder.layers[0].fc1), ("decoder", base.decoder.layers[0].fc1)):
        module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: current()}))
    batch = packed(backbone)
    with torch.no_grad():
        encoded = model.encode(**asked(backbone, batch))
        out = model(**backbone.inputs(batch))
    length = batch.texts["input_ids"].shape[1]
    visual = encoded.visual[:, length:]
    assert visual.sum(1).tolist() == [4, 4, 8, 0] and not encoded.visual[:, :length].any()
    assert torch.equal(seen["encoder"].own_mask, encoded.mask)
    assert torch.equal(seen["decoder"].encoder, out.encoder_last_hidden_state)
    assert torch.equal(seen["decoder"].encoder_mask, encoded.visual)
    if condition == "none":
        assert seen["encoder"].tokens is None and seen["decoder"].tokens is None
        return
    if condition == "tokens":
        assert seen["encoder"].tokens.shape == (4, 8, tiny_clip_bart.WIDTH) and torch.equal(
            seen["encoder"].mask, visual
        )
        assert torch.equal(seen["decoder"].tokens, seen["encoder"].tokens)
        assert torch.equal(seen["decoder"].mask, visual)
        return
    assert seen["encoder"].tokens.shape == (4, 1, tiny_clip_bart.WIDTH)
    assert seen["encoder"].tokens[3].eq(0).all() and seen["decoder"].tokens[3].eq(0).all()
    states = encoded.last_hidden_state[2, length : length + 8].mean(0)
    assert torch.equal(seen["encoder"].tokens[0], seen["encoder"].tokens[1])  # two questions about one image
    if condition == "visual":
        torch.testing.assert_close(seen["decoder"].tokens[2, 0], states, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(seen["decoder"].tokens, seen["encoder"].tokens)


@pytest.mark.parametrize("source", ["given", "cross_mean", "cross"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_cache_equals_generation_without_it_and_routes_follow_beams(folder, source, beams):
    backbone = tiny_clip_bart.make(folder)
    route = {"given": "mul", "cross_mean": "add", "cross": "matmul1"}[source]
    model = attach(spread(backbone.build()), route=route, condition=source)
    told = dict(output_scores=True, return_dict_in_generate=True)
    options = dict(num_beams=beams, max_new_tokens=5, do_sample=False, eos_token_id=None, no_repeat_ngram_size=0)

    def written(given, **more):
        return model.generate(**asked(backbone, packed(backbone, given)), **told, **options, **more)

    cached, plain = written(samples()), written(samples(), use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.scores, plain.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    first = cached.scores[0]
    assert len({tuple(row.tolist()) for row in first}) == 4  # else rows of others might have been read
    if beams == 1:  # the first step is the forward's first position
        inputs = {**asked(backbone, packed(backbone)), "decoder_input_ids": torch.full((4, 1), 2)}
        torch.testing.assert_close(first, model(**inputs).logits[:, 0], atol=1e-4, rtol=1e-4)
    if source != "cross":  # all encoder states as published, those of padding included
        alone = [written([s]) for s in samples() if s.texts]
        assert torch.equal(cached.sequences, torch.cat([w.sequences for w in alone]))
        last = torch.cat([w.scores[-1] for w in alone])
        torch.testing.assert_close(cached.scores[-1], last, atol=1e-4, rtol=1e-4)


def test_closed_choices_are_compared_at_the_first_token_that_differs(folder):
    backbone = tiny_clip_bart.make(folder)
    torch.manual_seed(0)  # with some visual embeddings all twelve answers are the same
    model = spread(backbone.build())
    rows = [Sample(f"{i}", 1.0, [tiny_clip_bart.grid(i)], [Prompted("nlvr : is it red")], [0]) for i in range(12)]
    batch = packed(backbone, rows)
    words = {word: i for i, word in enumerate(tiny_clip_bart.WORDS)}
    with torch.no_grad():
        logits = model(**asked(backbone, batch), decoder_input_ids=torch.tensor([[2, 0]]).expand(12, -1)).logits[:, 1]
    want = ["true" if row[words["true"]] > row[words["false"]] else "false" for row in logits]
    assert backbone.generate(model, batch, choices=["true", "false"]) == want
    assert len(set(want)) == 2
    got = backbone.generate(model, batch, choices=["red blue", "red red", "red"])
    assert set(got) <= {"red blue", "red red", "red"}


def test_the_routed_gradient_reaches_the_visual_embedding_with_and_without_recomputation(folder):
    def gradients(checkpointing, route="mul"):
        backbone = tiny_clip_bart.make(folder)
        model = attach(backbone.build(), route=route)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        batch = packed(backbone)
        total, _ = backbone.read(model(**backbone.inputs(batch)), batch).token_losses()
        total.sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys() and any("visual_embedding" in n for n in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)
        used = "box.weight" not in name and "box_norm.weight" not in name  # boxes are zero, and so is box.bias yet
        assert (gradient.abs().max() > 0) == used, name


def test_dropout_is_barts_own_or_none(folder):
    batch = packed(tiny_clip_bart.make(folder))

    def twice(train_dropout):
        backbone = tiny_clip_bart.make(folder)
        backbone.train_dropout = train_dropout
        model = backbone.build().train()
        return [model(**backbone.inputs(batch)).logits for _ in range(2)]

    assert torch.equal(*twice(False)) and not torch.equal(*twice(True))


def test_disabling_and_reloading_an_adapter_is_exact(folder, tmp_path):
    backbone = tiny_clip_bart.make(folder)
    batch = packed(backbone)
    frozen = spread(backbone.build())
    with torch.no_grad():
        before = frozen(**backbone.inputs(batch)).logits
        model = attach(copy.deepcopy(frozen), train_bias=["text_model.*"], train_norms=False)
        changed = model(**backbone.inputs(batch)).logits
        with model.disable_adapter():
            assert torch.equal(model(**backbone.inputs(batch)).logits, before)
        assert (changed - before).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(frozen), tmp_path).eval()
        assert torch.equal(again(**backbone.inputs(batch)).logits, changed)


def test_auto_classes_know_the_model(folder, tmp_path):
    backbone = tiny_clip_bart.make(folder, vision="clip")
    model = backbone.build().eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    ids = torch.tensor([[0, 5, 6, 2]])
    with torch.no_grad():
        first = model(ids, pixel_values=pixels, decoder_input_ids=ids)
        assert torch.equal(loaded(ids, pixel_values=pixels, decoder_input_ids=ids).logits, first.logits)
        assert torch.equal(first.image_features, model.encode_images(pixels)), "to be passed back instead of pixels"
        given = model(ids, image_features=first.image_features, decoder_input_ids=ids)
        assert torch.equal(given.logits, first.logits)
        assert not torch.equal(model(ids, decoder_input_ids=ids).logits, first.logits)
        assert model.generate(ids, pixel_values=pixels, max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("family", ["vit", "clip", "dinov2", "siglip"])
def test_a_tower_gives_its_patches_as_the_grid(folder, family):
    backbone = tiny_clip_bart.make(folder, vision=family)
    backbone.check()
    model = backbone.build().eval()
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        grid = model.encode_images(pixels)
        tower = model.vision_model
        last = tower(model.pixel_norm(pixels)).last_hidden_state
        if family == "clip":
            last = tower.post_layernorm(last)
    torch.testing.assert_close(grid, last[:, 0 if family == "siglip" else 1 :])
    assert grid.shape == (2, 4, 16)
    assert not any(p.requires_grad for p in tower.parameters()) and backbone.frozen_prefix(model) == ["vision_model"]


def test_stored_features_travel_through_the_stream_in_the_place_of_images(folder, tmp_path):
    one, two = tiny_clip_bart.grid(0).half().numpy(), np.stack([tiny_clip_bart.grid(1), tiny_clip_bart.grid(2)])
    record = {"texts": ["what"], "answers": [1]}
    raw = [RawSample("x", [], record, one), RawSample("y", [], record, two), RawSample("z", [], record)]
    raw.append(RawSample("bad", [], record, one[:7]))
    manifest = write_shards(tmp_path / "data", raw)
    backbone = tiny_clip_bart.make(folder)
    source = StreamSource(
        manifest, "train", read, backbone.image_transform(False), backbone.collate_images, backbone.collate_texts,
        lambda t: {},
    )  # fmt: skip
    stream = Stream([source], DataOptions(global_batch=4, workers=0), train=False)
    (batch,) = next(iter(stream.epoch(0))).micro
    stream.close()
    assert batch.image_owner.tolist() == [0, 1, 1] and batch.weight.tolist() == [1, 1, 1, 0]
    assert batch.bad[0][0] == "features" and not any("features" in record for record in batch.records)
    torch.testing.assert_close(batch.images["image_features"][1:].float(), torch.from_numpy(two))
    model = backbone.build().eval()
    assert model(**backbone.inputs(batch)).logits.isfinite().all()


def test_features_of_another_shape_are_refused():
    transform = tiny_clip_bart.registry.load(tiny_clip_bart.backbones, "clip_bart", "backbone.name")(
        tiny_options(), None
    ).image_transform(True)
    for shape in ((9, 5), (8, tiny_clip_bart.FEATURES), (tiny_clip_bart.FEATURES,), (2, 9, tiny_clip_bart.FEATURES)):
        with pytest.raises(BadSample, match="features"):
            transform(torch.zeros(shape), None)


def tiny_options(**options):
    return tiny_clip_bart.registry.load(tiny_clip_bart.backbones, "clip_bart", "x").Options(
        feature_width=tiny_clip_bart.FEATURES, **options
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_text_length": 2}, "max_text_length"),
        ({"max_target_length": 49}, "48 positions"),
        ({"grid": 4, "order_tokens": 9}, "16 places need"),
        ({"vision": "vit", "image_size": 9}, "patch size 4"),
        ({"vision": "vit", "grid": 3}, "sees 2 patches a side"),
        ({"max_images": 0}, "max_images"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(folder, options, message):
    with pytest.raises(BadInput, match=message) as problem:
        tiny_clip_bart.make(folder, **options).check()
    assert "\n" not in str(problem.value)


def test_another_family_and_too_many_images_are_refused(folder):
    with pytest.raises(BadInput, match="family 'vit'"):
        tiny_clip_bart.tiny_towers.write_vision(folder / "other", "vit")
        tiny_clip_bart.make(folder, text=str(folder / "other")).check()
    backbone = tiny_clip_bart.make(folder, max_images=1)
    with pytest.raises(BadInput, match="max_images: a sample has 2 images"):
        backbone.build()(**backbone.inputs(packed(backbone)))


def test_the_loss_of_a_float64_model_is_float64(folder):
    backbone = tiny_clip_bart.make(folder)
    model, ids = backbone.build().double(), torch.tensor([[0, 5, 6, 2]])
    assert model(ids, labels=ids).loss.dtype == torch.float64
    assert model.float()(ids, labels=ids).loss.dtype == torch.float32
