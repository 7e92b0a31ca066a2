"""HeGraphAdapter as a peft method: invariants of the layer, configuration, the guide, bad input."""

import re

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from mmpeft_ds import HeGraphConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.methods.hegraph.standalone import HeGraphHead
from mmpeft_ds.ops import class_graph as ops
from mmpeft_ds.ops.class_relations import Coefficients
from tests.helpers import ROOT
from tests.helpers.models.tiny_hegraph import LABELS, TAU, C, D, Y, Z, base, draw, made, scores

NOTHING = {name: 0.0 for name in ("beta_pn", "beta_vn", "alpha_pp", "alpha_vp", "alpha_np", "alpha_np_test", "gamma")}


# --------------------------------------------------------------------------------------------------- invariants


def test_without_messages_it_is_zero_shot_and_a_plain_cache():
    model, head = made(**NOTHING)
    text, visual, _ = scores(model.train())
    with model.disable_adapter(), torch.no_grad():
        zero_shot = model(image_features=Z).logits
    torch.testing.assert_close(text, zero_shot, atol=1e-13, rtol=0)
    cache = ops.unit(head.bank.cache)
    affinity = (ops.unit(Z) @ cache.T - 1).exp() @ torch.nn.functional.one_hot(LABELS, C).double()
    torch.testing.assert_close(visual, TAU * affinity, atol=1e-12, rtol=0)


def test_weights_of_zero_move_nothing():
    _, head = made()
    with torch.no_grad():
        for weight in head.weights().values():
            weight.zero_()
        found = head.refined(training=True)
    assert torch.equal(found.negative, head.bank.negative_text) and torch.equal(found.text, head.bank.text)
    assert (found.shift == 0).all()


def test_permuted_classes_permute_the_scores():
    order = torch.tensor([3, 0, 4, 1, 2])
    plain, _ = made()
    bank = plain.get_base_model().features.base_layer.bank
    labels = order.argsort()[bank.support_labels]
    rows = labels.argsort(stable=True)
    moved = base(
        positive=bank.positive[order],
        negative=bank.negative[order],
        support=bank.support[rows],
        support_labels=labels[rows],
    )
    permuted, _ = made(model=moved)
    for a, b in zip(scores(plain), scores(permuted), strict=True):
        torch.testing.assert_close(a[:, order], b, atol=1e-12, rtol=0)


def test_each_weight_learns_from_its_own_head():
    model, head = made()
    for term, moved, still in ((0, ("W_n", "W_p"), ("W_v",)), (1, ("W_v",), ("W_n", "W_p"))):
        head.zero_grad()
        cross_entropy(model.train()(image_features=Z).terms[term][1], Y).backward()
        assert all(getattr(head, name).grad.abs().max() > 1e-6 for name in moved)
        assert all(getattr(head, name).grad is None or (getattr(head, name).grad == 0).all() for name in still)


def test_gradients_agree_with_differences():
    model, head = made(learned=True, topk=3)
    parameters = list(head.parameters())

    def loss(*_):
        return head.losses(Z, Y).sum()

    assert torch.autograd.gradcheck(loss, parameters, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"learned": True}, {"drop": ["vp", "vn"]}, {"activation": "relu"}])
def test_training_and_evaluation_differ_through_alpha_np_alone(options):
    model, head = made(**options)
    trained = scores(model.train())
    tested = scores(model.eval())
    assert (trained[0] - tested[0]).abs().max() > 1e-4
    assert torch.equal(trained[1], tested[1])
    # in training with the other number, and in evaluation with the same
    _, other = made(**options | {"alpha_np_test": None})
    with torch.no_grad():
        tested_as_trained = other.eval().both(Z)[0]
    torch.testing.assert_close(tested_as_trained, trained[0], atol=1e-14, rtol=0)
    if "learned" not in options:
        model, _ = made(**options | {"alpha_np": 0.1})
        torch.testing.assert_close(scores(model.train())[0], tested[0], atol=1e-14, rtol=0)


def test_one_class_and_a_class_without_images_stay_finite():
    lonely = base(classes=1, labels=torch.zeros(3, dtype=torch.int64))
    empty = base(labels=torch.tensor([0, 0, 2, 3, 4]))
    for model in (lonely, empty):
        for options in ({}, {"cache_reduce": "mean"}, {"degree": "target"}):
            tuned, head = made(model=model, **options)
            out = tuned.train()(image_features=torch.cat([Z, torch.zeros(1, D)]))
            sum(weight * cross_entropy(x, torch.zeros(7, dtype=torch.int64)) for weight, x in out.terms).backward()
            assert out.logits.isfinite().all()
            assert all(p.grad.isfinite().all() for p in head.parameters())
            model = tuned.unload()


# ------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("options", "text_moves", "visual_moves"),
    [
        ({"degree": "target"}, True, False),
        ({"activation": "relu"}, True, True),
        ({"activation": "identity"}, True, True),
        ({"flip": False}, True, False),
        ({"topk": 2}, True, True),
        ({"gamma": 0.0}, False, True),
        ({"visual_scale": 3.0}, False, True),
        ({"cache_reduce": "mean"}, False, True),
        *(({name: 0.01}, True, False) for name in ("beta_pn", "beta_vn", "alpha_pp", "alpha_vp", "alpha_np")),
        *(({"drop": [name]}, True, False) for name in ("pn", "vn", "pp", "vp", "np")),
        ({"drop": ["vv"]}, False, True),
        ({"fusion": 0.3}, False, False),
        ({"fuse": "logits"}, False, False),
    ],
)
def test_every_option_moves_what_it_should(options, text_moves, visual_moves):
    plain, _ = made()
    other, head = made(**options)
    with torch.no_grad():
        for kind, weight in head.weights().items():
            weight.copy_(head_of(plain).weights()[kind])
    before, after = scores(plain.train()), scores(other.train())
    assert ((before[0] - after[0]).abs().max() > 1e-5) == text_moves
    assert ((before[1] - after[1]).abs().max() > 1e-5) == visual_moves
    assert (before[2] - after[2]).abs().max() > 1e-7


def test_lambda_and_w_weigh_the_cache_head():
    model, head = made(visual_loss=0.7, fusion=0.0)
    out = model.train()(image_features=Z)
    assert [weight for weight, _ in out.terms] == [1.0, 0.7]
    torch.testing.assert_close(out.logits, out.terms[0][1].log_softmax(1))
    losses = [cross_entropy(x, Y, reduction="none") for _, x in out.terms]
    torch.testing.assert_close(head.losses(Z, Y), losses[0] + 0.7 * losses[1])


def test_what_nothing_reads_does_not_train():
    _, head = made(drop=["np"])
    assert sorted(head.weights()) == ["positive", "visual"] and head.needed(head.config) == ("text", "support")
    assert sorted(made(drop=["vv"])[1].weights()) == ["negative", "positive"]
    unread = base(negative=None)
    text, _, _ = scores(made(model=unread, drop=["np"])[0])
    assert text.isfinite().all()


def test_learned_factors_start_at_the_table_and_move():
    fixed, _ = made()
    model, head = made(learned=True)
    torch.testing.assert_close(scores(model.train())[0], scores(fixed.train())[0], atol=1e-13, rtol=0)
    head.losses(Z, Y).mean().backward()
    assert head.factors.shape == (6,) and (head.factors.grad != 0).all()
    with torch.no_grad():
        head.factors.fill_(-50)
        assert (head.message_factors(training=True) > 0).all()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4 and all(".hegraph_" in n for n in names)


def test_parameters_are_three_squares_and_start_small():
    model, head = made(model=base(torch.bfloat16))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * D * D
    for weight in head.weights().values():
        assert weight.dtype == torch.float32 and weight.abs().max() <= D**-0.5 < 1.2 * weight.abs().max()
    out = model(image_features=Z.bfloat16())
    assert out.logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = model(image_features=Z.bfloat16())
    assert torch.equal(out.logits, again.logits), "autocast reaches the exponentials"


# ---------------------------------------------------------------------------------------------------- the guide


def test_every_ablation_of_the_guide_is_a_config_that_scores_otherwise():
    page = ROOT / "docs" / "methods" / "hegraph.md"
    rows = re.findall(r"^\|[^|]*\| (`method\..*) \|$", page.read_text("utf-8"), re.M)
    assert len(rows) >= 15
    plain, _ = made()
    defaults = HeGraphConfig()
    for row in rows:
        overrides = dict(re.findall(r"method\.(\w+)=([^ `]+)", row))
        options = {key: yaml.safe_load(value) for key, value in overrides.items()}
        assert any(getattr(defaults, key) != value for key, value in options.items()), row
        model, head = made(**{key: 2 if key == "topk" else value for key, value in options.items()})
        with torch.no_grad():
            for kind, weight in head.weights().items():
                weight.copy_(head_of(plain).weights()[kind])
        if not {"learned", "search", "visual_loss"} & set(options):  # these change what is trained or found alone
            outs = [scores(m.eval())[2] for m in (plain, model)]
            assert not torch.equal(*outs), row


def test_the_class_alone_gives_what_the_method_gives():
    model, head = made()
    nodes = head.nodes()
    torch.manual_seed(0)
    alone = HeGraphHead(
        nodes.positive, nodes.negative, nodes.visual, nodes.cache, nodes.labels, coeffs={"gamma": 0.5}, tau=TAU
    )
    text, visual, fused = scores(model.train())
    with torch.no_grad():
        assert torch.equal(alone(Z)[0], text) and torch.equal(alone(Z)[1], visual)
        torch.testing.assert_close(alone.predict(Z), fused.exp())
        assert torch.equal(alone.refine()[0], head.refine()[0])
    assert sorted(alone.state_dict()) == ["W_n", "W_p", "W_v", "cache", "labels", "negative", "positive", "visual"]
    assert alone.hetero_data()["positive"].x is not None
    assert alone.coefficients == Coefficients()


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"drop": ["px"]}, "drop: 'px'"),
        ({"drop": list(ops.RELATIONS)}, "nothing would train"),
        ({"drop": ["np", "pp", "vp", "vv"]}, "nothing would train"),
        ({"activation": "gelu"}, "activation: 'gelu'"),
        ({"degree": "row"}, "degree: 'row'"),
        ({"shard": "rows"}, "shard: 'rows'"),
        ({"topk": 0}, "topk"),
        ({"fusion": -1.0}, "fusion"),
        ({"visual_loss": -0.1}, "visual_loss"),
        ({"multiples": []}, "multiples"),
        ({"learned": True, "gamma": 0.0}, "gamma: learned"),
        ({"gamma": "half"}, "gamma"),
    ],
)
def test_a_config_that_cannot_work_is_refused_in_one_line(options, says):
    with pytest.raises(BadInput, match=says) as told:
        HeGraphConfig(**options)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("part", ["positive", "negative", "support"])
def test_a_bank_without_what_it_reads_is_refused(part):
    parts = {part: None} if part != "support" else {"support": None, "support_labels": None}
    with pytest.raises(BadInput, match="not there"):
        made(model=base(**parts))


def test_images_of_another_space_are_refused():
    with pytest.raises(BadInput, match="width 6 and class texts 8"):
        made(model=base(width=6))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"neg": draw(C, D - 1)}, "neg: shape"),
        ({"vis": draw(C - 1, D)}, "vis: shape"),
        ({"cache": draw(3, D)}, "cache: shape"),
        ({"labels": torch.zeros(9)}, "labels: dtype"),
        ({"neg": None}, "neg: missing"),
        ({"coeffs": {"delta": 1.0}}, "coeffs: 'delta'"),
        ({"act": "gelu"}, "activation: 'gelu'"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(change, says):
    given = {"pos": draw(C, D), "neg": draw(C, D), "vis": draw(C, D), "cache": draw(9, D), "labels": LABELS} | change
    with pytest.raises(BadInput, match=says):
        HeGraphHead(**given, tau=1.0)
