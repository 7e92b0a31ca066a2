"""HeGraphAdapter in a run: factors found on validation, training and evaluation, what is kept, saved and exported."""

import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpeft_ds import HeGraphConfig
from mmpeft_ds.engine.evaluator import evaluate
from mmpeft_ds.engine.step import set_modes
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.ops.class_graph import classify
from mmpeft_ds.sites.feature_site import Features, Labelled
from tests.helpers.models.tiny_hegraph import D, Y, Z, base, draw, made, scores

# -------------------------------------------------------------------------------------- factors found on validation


def labelled(z, y):
    n = len(z)
    return Labelled(Features(z, None, torch.ones(n, dtype=torch.bool), torch.arange(n)), y)


def test_a_search_takes_the_first_best_multiples_and_touches_evaluation_alone(tmp_path):
    model, head = made(search=True, multiples=[1.0, 0.0, 3.0])
    z = draw(40, D, seed=9)
    configured = scores(model.eval(), z)
    trained = scores(model.train(), z)[:2]
    # what evaluation would say with another choice, as labels: the search must find a choice as good
    head.searched.copy_(torch.tensor([3.0, 0.0, 1.0, 0.0]))
    y = scores(model.eval(), z)[2].argmax(1)
    assert (y != configured[2].argmax(1)).any()
    head.searched.fill_(1.0)
    told = head.train().calibrate(labelled(z, y), labelled(z, y))
    assert told["validation_accuracy"] == 1.0 and head.training
    assert torch.equal(scores(model.eval(), z)[2].argmax(1), y)
    for a, b in zip(scores(model.train(), z), trained, strict=False):
        assert torch.equal(a, b), "training has changed"

    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(scores(again, z)[2], scores(model, z)[2])
    torch.testing.assert_close(classify(head.export(), z), scores(model, z)[2])


def test_a_search_in_which_nothing_is_better_keeps_the_configured_factors():
    model, head = made(search=True)
    z = draw(20, D, seed=9)
    y = scores(model.eval(), z)[2].argmax(1)
    told = head.calibrate(labelled(z, y), labelled(z, y))
    assert (head.searched == 1).all()
    assert {k: round(v, 9) for k, v in told.items()} == {
        "validation_accuracy": 1.0, "alpha_np_test": 0.1, "alpha_vp": 0.24, "gamma": 0.5, "fusion": 1.0
    }  # fmt: skip


def test_without_search_nothing_is_found_and_nothing_more_is_saved():
    _, head = made()
    assert head.calibrate(labelled(Z, Y), None) == {} and not head.calibrates and not head.calibrated
    assert sorted(head.state_dict()) == ["W_n", "W_p", "W_v"]


def test_a_search_without_validation_is_refused():
    _, head = made(search=True)
    with pytest.raises(BadInput, match="search on|searched on validation"):
        head.calibrate(labelled(Z, Y), None)


# -------------------------------------------------------------------------------------------- modes of the engine


def test_the_engine_trains_the_head_in_training_mode_without_dropout_and_after_an_evaluation():
    model, head = made()
    backbone = SimpleNamespace(frozen_prefix=lambda model: [])
    quiet = SimpleNamespace(engine=SimpleNamespace(train_dropout=False, gradient_checkpointing=False))
    want = scores(model.train())[0]
    set_modes(model.eval(), backbone, quiet)
    assert not model.training and head.training
    assert torch.equal(scores(model)[0], want)
    modes = []

    def no_steps():
        modes.append(head.training)
        yield from ()

    evaluate(model, backbone, SimpleNamespace(score=lambda rows: {}, concludes=False), no_steps(), "cpu")
    assert modes == [False], "an evaluation scores in evaluation mode"
    assert head.training and not model.training, "and gives the mode back"


def test_without_its_mark_the_head_would_train_with_the_factor_of_evaluation(monkeypatch):
    """Negative control."""
    model, head = made()
    quiet = SimpleNamespace(engine=SimpleNamespace(train_dropout=False, gradient_checkpointing=False))
    monkeypatch.setattr(type(head), "follows_training", False)
    set_modes(model.train(), SimpleNamespace(frozen_prefix=lambda model: []), quiet)
    assert not head.training


def test_gradients_in_evaluation_mode_are_warned_of_once():
    model, _ = made()
    with pytest.warns(UserWarning, match="alpha_np_test"):
        model.eval()(image_features=Z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(image_features=Z)
        model.train()(image_features=Z)
    _, head = made()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        head.eval().both(Z)


# --------------------------------------------------------------------------- made once, and made again when it must be


def test_what_is_kept_between_batches_follows_weights_and_bank():
    model, head = made()
    model.eval()
    first = scores(model)[2]
    assert torch.equal(scores(model)[2], first) and head._kept is not None
    head.W_p.data.mul_(1.5)  # as an optimizer that torch does not count
    second = scores(model)[2]
    assert not torch.equal(first, second)
    with torch.no_grad():
        head.bank.positive.mul_(-1)
    third = scores(model)[2]
    assert not torch.equal(second, third)
    fresh, _ = made()
    head_of(fresh).bank.positive.mul_(-1)
    head_of(fresh).W_p.data.mul_(1.5)
    torch.testing.assert_close(scores(fresh.eval())[2], third)
    model.float()
    assert scores(model, Z.float())[2].dtype == torch.float32


def test_an_evaluation_in_inference_mode_leaves_nothing_that_training_cannot_use():
    model, head = made()
    with torch.inference_mode():
        model.eval()(image_features=Z)
    head.train().losses(Z, Y).mean().backward()
    assert head.W_n.grad is not None


# ------------------------------------------------------------------------------------------- export, saving, verbs


@pytest.mark.parametrize(
    "options", [{}, {"fuse": "logits"}, {"cache_reduce": "mean", "visual_scale": 2.0}, {"drop": ["vv"]}]
)
def test_the_exported_classifier_needs_no_graph(options, tmp_path):
    model, head = made(**options)
    save_file(head.train().export(), tmp_path / "classifier.safetensors")
    loaded = load_file(tmp_path / "classifier.safetensors")
    assert sorted(loaded) == sorted(
        ["text", "cache", "labels", "tau", "visual_scale", "fusion", "mean_over_rows", "fuse_logits"]
    )
    torch.testing.assert_close(classify(loaded, Z), scores(model.eval())[2], atol=1e-13, rtol=0)
    assert (classify(loaded, Z) - scores(model.train())[2]).abs().max() > 1e-5, "the export is of training"
    assert torch.equal(classify(loaded, Z).argmax(1), classify(loaded, 3 * Z).argmax(1))


def test_an_adapter_directory_holds_the_weights_alone_and_loads(tmp_path):
    model, head = made()
    with torch.no_grad():
        head.W_v.add_(0.1)
    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 3 and all(t.shape == (D, D) for t in saved.values())
    again = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(scores(again)[2], scores(model)[2])
    with again.disable_adapter():
        assert torch.equal(again(image_features=Z).logits, base()(image_features=Z).logits)


def test_it_attaches_to_a_bank_that_is_not_there_yet():
    """As `--check` does, which reads no features."""
    model, head = made(model=base().to("meta"), learned=True, search=True)
    assert {p.device.type for p in head.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * D * D + 6


def test_two_adapters_keep_their_own_weights_and_options():
    model, _ = made()
    first = scores(model.eval())[2]
    model.add_adapter("other", HeGraphConfig(gamma=0.0, drop=["pp"]))
    model.set_adapter("other")
    second = scores(model)[2]
    model.set_adapter("default")
    assert torch.equal(scores(model)[2], first) and not torch.equal(first, second)
