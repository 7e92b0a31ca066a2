"""MokA: gradients of a dense reference, which tokens read which, generation, and what is refused."""

import peft
import pytest
import torch
from torch import nn

from mmpeft_ds import MokaConfig
from mmpeft_ds.backbones.mllm import model as mllm_model
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.assembly.resolve import check_kinds
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods import get
from mmpeft_ds.methods.moka.layer import MokaLinear
from mmpeft_ds.sites.condition import MEDIA, OTHER, PROMPT, QUESTION, Condition, Segments, conditioned, current
from tests.helpers.models import tiny_backbones
from tests.helpers.models.adapted_mllm import adapted, batch_of, mllm
from tests.helpers.models.tiny_zoo import ZOO, output

M, P, Q = MEDIA, PROMPT, QUESTION
X = OTHER  # answers and padding
KINDS = torch.tensor(
    [
        [P, M, M, Q, Q, X, X, X],
        [M, P, M, Q, X, M, X, X],  # an image after the first answer reads the first question
        [Q, Q, Q, Q, X, X, X, X],
        [M, M, X, X, X, X, X, X],  # nothing to read
    ]
)
CHAT = [([1], [Prompted("what color is it", "red")], 1.0), ([], [Prompted("is it round", "yes")], 1.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def layer_of(parts, **options):
    torch.manual_seed(5)
    layer = MokaLinear(nn.Linear(6, 7).double().requires_grad_(False), "default")
    layer.update_layer("default", parts, MokaConfig(r=2, alpha=6.0, **options), "here")
    nn.init.normal_(layer.moka["default"].B)
    return layer


def reference(layer, x, kinds, parts, weight, readable):
    """One token after the other, as the paper writes it."""
    delta, base = layer.moka["default"], layer.base_layer
    rows = []
    for tokens, of in zip(x, kinds.tolist(), strict=True):
        for token, kind in zip(tokens, of, strict=True):
            out, up = base.weight @ token + base.bias, 0
            for part, (start, width) in enumerate(parts):
                rank = slice(2 * part, 2 * part + 2)
                h = (delta.A_image if kind == M else delta.A_text)[rank] @ token
                keys = [delta.A_text[rank] @ t for t, k in zip(tokens, of, strict=True) if k in readable]
                if kind == M and keys:
                    keys = torch.stack(keys)
                    h = h + weight * torch.softmax(keys @ h / 2**0.5, 0) @ keys
                own = 3.0 * delta.B[up : up + width] @ h
                out = out + nn.functional.pad(own, (start, 7 - start - width))
                up += width
            rows.append(out)
    return torch.stack(rows).view(*x.shape[:2], 7)


def gradients(layer, x, out):
    layer.zero_grad()
    x.grad = None
    (out * torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))).sum().backward()
    return [x.grad.clone(), *(p.grad.clone() for p in layer.moka.parameters())]


@pytest.mark.parametrize("parts", [((0, 7),), ((0, 3), (5, 2))], ids=["whole", "fused"])
@pytest.mark.parametrize(("read", "readable"), [("question", (Q,)), ("prompt", (P, Q))])
@pytest.mark.parametrize("weight", [1.0, 0.05, 0.0])
def test_it_gives_the_gradients_of_a_dense_reference(parts, read, readable, weight):
    layer = layer_of(parts, read=read, attention=weight)
    x = torch.randn(4, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with conditioned(Condition(kinds=KINDS)):
        out = layer(x)
    expected = reference(layer, x, KINDS, parts, weight, readable)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(layer, x, out), gradients(layer, x, expected)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_texts_in_one_row_read_their_own_question_alone():
    layer = layer_of(((0, 7),))
    x = torch.randn(4, 8, 6, dtype=torch.float64)
    lengths = (7, 8, 4, 5)
    text = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    place = torch.cat([torch.arange(n) for n in lengths])
    with conditioned(Condition(kinds=KINDS)):
        padded = layer(x)[text, place]
    with conditioned(Condition(kinds=KINDS, segments=Segments(text, place, lengths))):
        torch.testing.assert_close(layer(x[text, place][None])[0], padded, rtol=1e-12, atol=1e-12)


def test_beams_read_the_question_of_their_text_and_a_generated_token_is_text():
    layer = layer_of(((0, 7),))
    x = torch.randn(4, 8, 6, dtype=torch.float64)
    with conditioned(Condition(kinds=KINDS)):
        once = layer(x)
        torch.testing.assert_close(layer(x.repeat_interleave(3, 0)), once.repeat_interleave(3, 0))
        alone = layer(x[:, 2:3])
    with conditioned(Condition(kinds=torch.full((4, 1), Q))):
        torch.testing.assert_close(alone, layer(x[:, 2:3]))
    assert not torch.allclose(alone[:2], once[:2, 2:3])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_model_says_which_tokens_are_of_an_image_which_are_asked_and_which_are_answers(folder, family):
    backbone = mllm(folder, family)
    model = adapted(backbone, "moka", r=2)
    seen = []
    layer = next(m for m in model.modules() if isinstance(m, MokaLinear))
    layer.register_forward_pre_hook(lambda *_: seen.append(current().token_kinds()))
    base, batch = model.get_base_model(), batch_of(backbone, CHAT)
    output = forward(model, backbone, batch)
    (kinds,) = seen
    labels = base.widened_labels
    images = int((kinds[0] == M).sum())
    assert images > 0 and (kinds[labels != -100] == X).all() and not (kinds[1] == M).any()
    first, length = int((labels[0] != -100).nonzero()[0]), int(output.lengths[0])
    last = int((kinds[0] == M).nonzero()[-1])
    assert (kinds[0, last + 1 : first] == Q).all() and (kinds[0, first:length] == X).all()
    assert set(kinds[0, :last].tolist()) <= {P, M} and (kinds[0, length:] == X).all()
    assert int((kinds[1] == Q).sum()) == int((labels[1] != -100).nonzero()[0])


def states_before_the_answer(backbone, model, answer):
    found = []
    layers = [m for m in model.modules() if isinstance(m, MokaLinear)]
    handle = layers[-1].register_forward_hook(lambda _m, _a, out: found.append(out.detach()))
    forward(model, backbone, batch_of(backbone, [([1], [Prompted("what color is it", answer)], 1.0)]))
    handle.remove()
    first = int((model.get_base_model().widened_labels[0] != -100).nonzero()[0])
    return found[0][0, :first]


def test_no_answer_reaches_the_tokens_before_it(folder, monkeypatch):
    backbone = mllm(folder)
    model = adapted(backbone, "moka", r=2)
    with torch.no_grad():
        red, blue = (states_before_the_answer(backbone, model, word) for word in ("red", "blue"))
        assert torch.equal(red, blue)
        # negative control: were answers read too, they would
        plain = mllm_model.kinds_of
        monkeypatch.setattr(mllm_model, "kinds_of", lambda keep, media, labels: plain(keep, media, None))
        red, blue = (states_before_the_answer(backbone, model, word) for word in ("red", "blue"))
        assert not torch.allclose(red, blue)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_with_and_without_a_cache(folder, beams):
    backbone = mllm(folder)
    model = adapted(backbone, "moka", r=2, alpha=64.0)
    options = {"max_new_tokens": 6, "num_beams": beams}
    batch = batch_of(backbone, CHAT)
    seen = []
    layer = next(m for m in model.modules() if isinstance(m, MokaLinear))
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(current().token_kinds()))
    cached = backbone.generate(model, batch, **options)
    forward(model, backbone, batch)
    handle.remove()
    for prompt, whole in zip(seen[0], seen[-1], strict=True):  # the same prompt as in training, padded on the left
        assert prompt[prompt != X].tolist() == whole[whole != X].tolist()
    assert cached == backbone.generate(model, batch, use_cache=False, **options)
    with model.disable_adapter():
        assert cached != backbone.generate(model, batch, **options)


def test_the_last_layer_computes_all_positions_for_it(folder):
    from mmpeft_ds.sites.unread import LastLayer

    model = adapted(mllm(folder), "moka", r=2)
    last = LastLayer(model.get_base_model())
    assert last.parts and not last.may_leave_out()
    with model.disable_adapter():
        assert last.may_leave_out()


def test_a_stock_forward_without_kinds_and_a_prompt_in_chunks_are_refused_in_one_line():
    model = peft.get_peft_model(ZOO["llama"].build(), MokaConfig(r=2))
    with pytest.raises(BadInput, match="no condition says so") as error:
        output(model, ZOO["llama"])
    assert "\n" not in str(error.value)
    layer = layer_of(((0, 7),))
    with conditioned(Condition(kinds=KINDS)), pytest.raises(BadInput, match="4 x 8 tokens"):
        layer(torch.zeros(4, 3, 6, dtype=torch.float64))


def test_merging_is_refused(folder):
    with pytest.raises(BadInput, match="different `down` matrices"):
        adapted(mllm(folder), "moka", r=2).merge_adapter()


def test_a_backbone_without_images_in_its_sequence_is_refused(tmp_path):
    entry = get("moka")
    backbone = tiny_backbones.MAKERS["vision_text_encoder"](tmp_path)
    with pytest.raises(BadInput, match="Use backbone mllm or vision_text_decoder"):
        check_kinds(backbone, entry, MokaConfig())
    check_kinds(backbone, get("lora"), None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "1 or more"),
        ({"attention": -1.0}, "attention"),
        ({"read": "answers"}, "read"),
        ({"targets": ["lm_head"]}, "targets"),
        ({"layers": [99]}, "layers"),
        ({"tower": "image"}, "tower"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_in_one_line(options, words):
    with pytest.raises(BadInput, match=words) as error:
        peft.get_peft_model(ZOO["llama"].build(), MokaConfig(**options))
    assert "\n" not in str(error.value)
