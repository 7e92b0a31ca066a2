"""Texts read as one row without padding: losses and gradients of padded rows, for every family and kind of method."""

import dataclasses
import importlib

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmpeft_ds.backbones import vision_text_decoder
from mmpeft_ds.backbones.common import text_attention
from mmpeft_ds.backbones.common.text_row import TextRow
from mmpeft_ds.backbones.mllm.model import ImageText
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.engine import padding
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.sites.condition import enable_checkpointing
from tests.helpers.device import installing
from tests.helpers.models import tiny_mllm, tiny_towers
from tests.helpers.models.adapted_mllm import METHODS, adapted, batch_of, image, mllm

FAMILIES = list(tiny_mllm.FAMILIES)
QUESTIONS = [
    ([1], [Prompted("what color is it", "red")], 1.0),
    ([2, 3], [Prompted("is it the same shape", "no")], 1.0),
    ([4], [Prompted("is it round", "yes"), Prompted("what shape is it", "a big circle")], 1.0),
    ([], [Prompted("is there a square", "blue")], 1.0),
    ([], [Prompted("is it red", "no")], 0.0),
]
TURNS = (("user", "is there a circle ?"), ("assistant", "no ."))
TALK = [*QUESTIONS, ([], [Prompted("and the square ?", "blue .", TURNS)], 1.0)]
TALK_TEXTS = [text for _, texts, _ in TALK for text in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def decoder(folder, family="gpt2", **options):
    if not (folder / "vit").exists():
        tiny_towers.write_vision(folder / "vit", "vit")
    if not (folder / family).exists():
        tiny_towers.write_decoder(folder / family, family)
    entry, paths = vision_text_decoder.ENTRY, {"vision": str(folder / "vit"), "text": str(folder / family)}
    return entry(entry.Options(**paths, image_size=8, max_text_length=12, **options), None)


def outcome(backbone, model, batch, scores):
    """Mean loss of each text, tokens, right ones, and the gradient of the mean loss to every trained tensor."""
    model.zero_grad()
    output = forward(model, backbone, batch, scores=scores)
    losses, tokens = output.token_losses()
    ((losses * batch.text_weight).sum() / tokens.sum()).backward()
    trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return (
        losses.detach() / tokens,
        tokens.tolist(),
        output.tokens_right().tolist(),
        trained,
        tuple(map(int, padding.places(output, batch))),
    )


def compare(backbone, model, samples, scores=True, tolerance=1e-9):
    batch = batch_of(backbone, samples)
    padded = outcome(backbone, model, batch, scores)
    row = outcome(backbone, model, dataclasses.replace(batch, padding_free=True), scores)
    torch.testing.assert_close(row[0], padded[0], rtol=tolerance, atol=tolerance)
    assert row[1:3] == padded[1:3]
    assert row[3].keys() == padded[3].keys() and any(g.abs().max() > 1e-4 for g in padded[3].values())
    for name, gradient in padded[3].items():
        torch.testing.assert_close(row[3][name], gradient, rtol=tolerance, atol=tolerance, msg=name)
    (positions, read), (row_positions, row_read) = padded[4], row[4]
    assert row_read == read and read < row_positions < 0.8 * positions  # what is left is the text of weight 0
    counted = sum(
        backbone.tokens(texts, [image(n).shape[1:] for n in images])[0] for images, texts, _ in with_counts(samples)
    )
    assert counted == row_positions


def noting_masks(noted):
    """transformers' sdpa, which notes the length of the queries, whether they are those of one text, and the mask."""

    def sdpa(module, query, key, value, attention_mask, **kwargs):
        text = query.shape[0] == 1 and getattr(module, "is_causal", False)
        noted.append((query.shape[2], text, attention_mask))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    return sdpa


def with_counts(samples):
    return [(images, [t.with_images(len(images)) for t in texts], weight) for images, texts, weight in samples]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_gives_the_losses_and_gradients_of_padded_rows(folder, family):
    backbone = mllm(folder, family)
    compare(backbone, adapted(backbone), TALK)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora"])
def test_every_method_sees_each_text_by_itself(folder, method):
    backbone = mllm(folder, condition="tokens")
    compare(backbone, adapted(backbone, method), TALK)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_composed_decoders_read_one_row_too(folder, family):
    backbone = decoder(folder, family, prefix="tokens")
    compare(backbone, adapted(backbone, "routed_lora", r=2, route="mul"), QUESTIONS)


def test_without_a_prefix_and_with_a_token_before_it(folder):
    for options in ({"prefix": "none"}, {"prefix": "pooled", "begin_token": True}):
        backbone = decoder(folder, **options)
        compare(backbone, adapted(backbone, "adapter", r=2), QUESTIONS)


def test_eager_attention_and_plain_logits_in_float32(folder):
    backbone = mllm(folder, "qwen2_vl")
    model = adapted(backbone, attention="eager", dtype=torch.float32)
    compare(backbone, model, TALK, scores=False, tolerance=1e-6)


def test_texts_that_see_each_other_have_other_losses(folder, monkeypatch):
    """The negative control: where positions run on through the row, the mask is that of a single causal text."""
    backbone, original = mllm(folder), ImageText.row_arguments
    model = adapted(backbone)

    def running_on(self, row, arguments):
        found = original(self, row, arguments)
        return found | {"position_ids": torch.arange(found["position_ids"].shape[1])[None]}

    monkeypatch.setattr(ImageText, "row_arguments", running_on)
    with pytest.raises(AssertionError, match="not close"):
        compare(backbone, model, TALK)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_flash_attention_reads_every_text_by_itself_without_a_mask(folder, tmp_path, family):
    installing.describe(tmp_path, "flash-attn", "2.8.3", "flash_attn")
    with installing.installed(installing.FLASH_2, tmp_path):
        calls = importlib.import_module("flash_attn").calls
        backbone = mllm(folder, family)
        model = adapted(backbone, attention="flash_attention_2", dtype=torch.bfloat16)
        batch = batch_of(backbone, TALK)
        padded = outcome(backbone, model, batch, True)
        calls.clear()
        row = outcome(backbone, model, dataclasses.replace(batch, padding_free=True), True)
        assert calls.count("flash_attn_varlen_func") >= tiny_mllm.LAYERS
    torch.testing.assert_close(row[0], padded[0], rtol=0.02, atol=0.02)
    assert row[0].std() > 0.2  # far more than that lies between texts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_sdpa_reads_every_text_by_itself_without_a_mask(folder, family, recomputed, monkeypatch):
    backbone, masks = mllm(folder, family), []
    monkeypatch.setattr(text_attention, "sdpa_attention_forward", noting_masks(masks))
    model = adapted(backbone, attention=text_attention.NAME)
    if recomputed:
        enable_checkpointing(model.get_base_model())
        model.train()
    compare(backbone, model, TALK)
    rows = [shape for shape, text, _ in masks if text]
    assert len(rows) == (2 if recomputed else 1) * tiny_mllm.LAYERS * len(TALK_TEXTS)
    assert all(mask is None for _, text, mask in masks if text)


def test_texts_told_apart_wrongly_are_an_error_or_have_other_losses(folder, monkeypatch):
    """The negative control."""
    backbone, original = mllm(folder), TextRow.attention_arguments
    model = adapted(backbone, attention=text_attention.NAME)
    for change, error, message in (
        (lambda lengths: lengths[1:], ValueError, "in a row of"),
        (lambda lengths: (sum(lengths),), AssertionError, "not close"),
    ):
        monkeypatch.setattr(
            TextRow,
            "attention_arguments",
            lambda self, name, change=change: {k: change(v) for k, v in original(self, name).items()},
        )
        with pytest.raises(error, match=message):
            compare(backbone, model, TALK)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_composed_decoders_read_every_text_by_itself(folder, family):
    backbone = decoder(folder, family, prefix="tokens")
    model = adapted(backbone, "lora", attention=text_attention.NAME, r=2)
    compare(backbone, model, QUESTIONS)


def test_flash_attention_is_told_where_texts_end():
    keep = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0]]).bool()
    row = TextRow(keep)
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    told = row.attention_arguments("flash_attention_2")
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert told["cu_seq_lens_q"].dtype == torch.int32 and told["max_length_q"] == 3
    assert row.attention_arguments("sdpa") == {}


def test_segments_give_every_text_a_row_and_put_them_back():
    row = TextRow(torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool())
    values = torch.arange(12.0).view(1, 6, 2)
    rows = row.segments.split(values)
    assert rows.shape == (3, 3, 2) and rows[1, 1:].eq(0).all() and rows[2, 1].tolist() == [10, 11]
    assert torch.equal(row.segments.join(rows), values)
