"""MokA on a composed model, whose image vectors stand before the text: kinds of tokens, packed rows, generation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.assembly.resolve import check_kinds
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods import get
from mmpeft_ds.methods.moka.layer import MokaLinear
from mmpeft_ds.sites.condition import MEDIA, OTHER, QUESTION, current
from tests.helpers.models import tiny_towers
from tests.helpers.models.adapted_mllm import adapted, image

M, Q, X = MEDIA, QUESTION, OTHER
SAMPLES = [([1], "is there a red circle", "yes"), ([], "what color", "red"), ([2, 3], "is it", "no")]


@pytest.fixture(scope="module", params=["pooled", "tokens"])
def backbone(request, tmp_path_factory):
    from mmpeft_ds import backbones, registry

    folder, entry = tmp_path_factory.mktemp("towers"), registry.load(backbones, "vision_text_decoder", "tests")
    towers = dict(vision=tiny_towers.write_vision(folder / "v", "vit"), text=tiny_towers.write_decoder(folder / "t"))
    begun = request.param == "pooled"
    options = entry.Options(**towers, image_size=8, max_text_length=19, prefix=request.param, begin_token=begun)
    return entry(options, None)


def batch_of(backbone, samples=SAMPLES, padding_free=False):
    transform = backbone.image_transform(False)
    given = [
        Sample(str(i), 1.0, [transform(image(n), None) for n in images], [Prompted(asked, said)], [{}])
        for i, (images, asked, said) in enumerate(samples)
    ]
    batch = pack(given, backbone.collate_images, backbone.collate_texts, lambda t: {})
    return dataclasses.replace(batch, padding_free=True) if padding_free else batch


def kinds_seen(model, run):
    seen, layer = [], next(m for m in model.modules() if isinstance(m, MokaLinear))
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(current().token_kinds()))
    result = run()
    handle.remove()
    return seen, result


def test_image_vectors_question_and_answer_are_told_apart(backbone):
    model, batch = adapted(backbone, "moka", r=2), batch_of(backbone)
    (kinds,), _ = kinds_seen(model, lambda: forward(model, backbone, batch))
    vectors, labels = backbone._prefix_length, batch.texts["labels"]
    for row, (images, _, _), asked in zip(kinds, SAMPLES, labels, strict=True):
        words, first = row[len(row) - labels.shape[1] :], int((asked != -100).nonzero()[0])
        assert int((row == M).sum()) == len(images) * vectors and not (words == M).any()
        assert (words[:first] == Q).all() and (words[first:] == X).all()
        before = row[: len(row) - labels.shape[1]]
        assert (before[len(before) - len(images) * vectors :] == M).all()


def test_texts_in_one_row_give_the_losses_of_padded_ones(backbone):
    model = adapted(backbone, "moka", r=2)
    with torch.no_grad():
        padded, row = (
            forward(model, backbone, batch_of(backbone, padding_free=free)).token_losses()[0] for free in (False, True)
        )
        torch.testing.assert_close(row, padded, rtol=1e-10, atol=1e-12)
        with model.disable_adapter():
            frozen = forward(model, backbone, batch_of(backbone)).token_losses()[0]
    assert (frozen - padded).abs().min() > 1e-6


def test_an_answer_does_not_reach_the_loss_of_its_first_token(backbone):
    """Nor of a text beside it; image tokens read the question alone."""
    model = adapted(backbone, "moka", r=2)
    with torch.no_grad():
        outs = [
            forward(model, backbone, batch_of(backbone, [([1], "is there a red circle", said)]))
            for said in ("yes", "no")
        ]
    at = int((outs[0].labels[0] != -100).nonzero()[0])
    assert torch.equal(outs[0].logits[0, at], outs[1].logits[0, at])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_reads_the_same_kinds_with_and_without_a_cache(backbone, beams):
    model, batch = adapted(backbone, "moka", r=2, alpha=64.0), batch_of(backbone)
    options = {"max_new_tokens": 6, "num_beams": beams}
    seen, cached = kinds_seen(model, lambda: backbone.generate(model, batch, **options))
    (whole,), _ = kinds_seen(model, lambda: forward(model, backbone, batch))
    prompts = seen[0].view(len(SAMPLES), -1, seen[0].shape[1])[:, 0]
    for prompt, row in zip(prompts, whole, strict=True):
        assert prompt[prompt != X].tolist() == row[row != X].tolist()
    assert cached == backbone.generate(model, batch, use_cache=False, **options)
    with model.disable_adapter():
        assert cached != backbone.generate(model, batch, **options)


def test_it_is_refused_where_no_image_vector_stands_before_the_text(backbone):
    options = dataclasses.replace(backbone.options, prefix="none", begin_token=False)
    with pytest.raises(BadInput, match="Use backbone mllm or vision_text_decoder"):
        check_kinds(type(backbone)(options, None), get("moka"), get("moka").Config())
