"""Positions of a text encoder that nothing reads are left out, and nothing else changes."""

import copy

import peft
import pytest
import torch

import mmpeft_ds
from mmpeft_ds.sites.base import AdapterLayer
from tests.helpers.models.tiny_composed_encoder import entry, inputs, write_towers


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return write_towers(tmp_path_factory.mktemp("towers"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("head_input", ["pooler", "raw"])
def test_the_last_layer_finishes_only_the_position_that_is_read(towers, head_input, checkpointing):
    """Same logits and gradients as with all positions, also where one text has an image and another has none."""
    backbone = entry(towers, head_input=head_input)
    config = mmpeft_ds.RoutedLoraConfig(r=4, train_norms=True, train_bias=True)
    model = peft.get_peft_model(backbone.build().double(), config)
    for name, parameter in model.named_parameters():
        if name.endswith("B"):
            torch.nn.init.normal_(parameter)
    if checkpointing:
        model.get_base_model()._set_gradient_checkpointing(True)
    batch = inputs(backbone, images=1)
    batch["pixel_values"] = batch["pixel_values"].double() / 255
    rows = []
    watched = model.get_base_model().text_model.encoder.layer[-1].intermediate
    hook = watched.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    results = []
    for whole in (False, True):
        model.zero_grad()
        out = model(**batch, return_last_hidden_state=whole)
        (out.logits * torch.arange(out.logits.numel()).view_as(out.logits)).sum().backward()
        results.append([out.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        assert (out.last_hidden_state is not None) == whole
    hook.remove()
    assert set(rows) == {1, batch["input_ids"].shape[1] + 1}  # it really left the others out
    for short, long in zip(*results, strict=True):
        torch.testing.assert_close(short, long, atol=1e-10, rtol=1e-9)
    assert all(g is not None and g.any() for g in results[0])


def unpadded(backbone, config, checkpointing=False):
    """Logits and gradients without and with padding after the attentions, and the shapes that the first layer saw."""
    model = peft.get_peft_model(backbone.build().double(), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "head" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if checkpointing:
        model.get_base_model()._set_gradient_checkpointing(True)
    batch = inputs(backbone, images=1)
    batch["pixel_values"] = batch["pixel_values"].double() / 255
    shapes, results = [], []
    watched = model.get_base_model().text_model.encoder.layer[0].intermediate
    watched.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[:2])))
    for whole in (False, True):
        model.zero_grad()
        logits = model(**batch, return_last_hidden_state=whole).logits
        (logits * torch.arange(logits.numel()).view_as(logits)).sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    # one image vector stands before the words of the only text whose slot has an image
    padded = (len(batch["input_ids"]), batch["input_ids"].shape[1] + 1)
    return *results, shapes, (1, int(batch["attention_mask"].sum()) + 1), padded


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("text", "head_input"), [("roberta", "pooler"), ("bert", "raw"), ("bert", "mean")])
@pytest.mark.parametrize(
    "config",
    [
        mmpeft_ds.RoutedLoraConfig(r=4, train_norms=True, train_bias=True),
        peft.LoraConfig(r=4, target_modules=["query", "dense"], modules_to_save=["head"]),
        mmpeft_ds.AdapterConfig(r=4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_padding_meets_no_matrix_behind_an_attention(towers, config, text, head_input, checkpointing):
    short, long, shapes, tight, padded = unpadded(
        entry(towers, text=text, head_input=head_input), copy.deepcopy(config), checkpointing
    )
    assert set(shapes) == {tight, padded}
    for a, b in zip(short, long, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)
    assert all(g is not None and g.any() for g in short)


@pytest.mark.parametrize(
    "config",
    [
        mmpeft_ds.RoutedAdapterConfig(r=4),
        mmpeft_ds.PAdapterConfig(r=4),
        mmpeft_ds.AdapterConfig(r=4, style="parallel"),
    ],
)
def test_an_adapter_that_asks_for_the_row_keeps_the_padding(towers, config):
    short, long, shapes, _, padded = unpadded(entry(towers, head_input="raw"), config)
    assert set(shapes) == {padded}
    for a, b in zip(short, long, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


def test_an_adapter_that_lies_about_rows_is_wrong(towers):
    """The negative control of the two tests above."""

    class ByRow(torch.nn.Module, AdapterLayer):
        tokenwise = rowless = True

        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, x):
            return self.base_layer(x) * torch.arange(len(x)).view(-1, 1, 1)

    model = entry(towers, head_input="raw").build()
    batch = inputs(entry(towers))
    output = model.text_model.encoder.layer[0].output
    output.dropout = ByRow(output.dropout)
    with torch.no_grad():
        want = model(**batch, return_last_hidden_state=True).logits
        assert not torch.allclose(model(**batch).logits, want)
        ByRow.rowless = False
        torch.testing.assert_close(model(**batch).logits, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("route", "options"), [("matmul1", {}), ("xtxt", {}), ("mul", {"condition": "self_mean"})])
def test_behind_the_last_attention_a_routed_adapter_sees_all_tokens_only_if_it_mixes_them(towers, route, options):
    backbone = entry(towers)
    model = peft.get_peft_model(backbone.build(), mmpeft_ds.RoutedAdapterConfig(r=4, route=route, **options))
    for name, parameter in model.named_parameters():
        if "routed_adapter" in name:
            torch.nn.init.normal_(parameter)
    rows = []
    last = model.get_base_model().text_model.encoder.layer[-1]
    last.intermediate.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    batch = inputs(backbone)
    with torch.no_grad():
        short, long = (model(**batch, return_last_hidden_state=whole).logits for whole in (False, True))
    torch.testing.assert_close(short, long, atol=1e-6, rtol=1e-5)
    assert (rows[0] == 1) == (route == "matmul1")


def test_an_adapter_that_mixes_tokens_gets_all_of_them(towers):
    class Mean(torch.nn.Module, AdapterLayer):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, x):
            return self.base_layer(x) + x.mean(1, keepdim=True)

    model = entry(towers).build()
    batch = inputs(entry(towers))
    output = model.text_model.encoder.layer[-1].output
    output.dropout = Mean(output.dropout)
    with torch.no_grad():
        got, want = model(**batch).logits, model(**batch, return_last_hidden_state=True).logits
        assert torch.equal(got, want)
        output.dropout.tokenwise = True  # a lie changes the answer
        assert not torch.allclose(model(**batch).logits, want)
