"""What few-shot baselines find on validation: factors of caches, and linear probes that are solved."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mmpeft_ds import methods, recipe
from mmpeft_ds.engine.assembly.checks import check_validation
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.sites.feature_site import Features, Labelled
from tests.helpers.models import tiny_feature_model
from tests.helpers.models.few_shot_heads import ALL, C, D, attach, say


def split(count: int, seed: int, noise: float = 0.8, holes: bool = False) -> Labelled:
    """Rows near class centres that are the texts of the tiny bank; with `holes` every third row does not count."""
    centres = tiny_feature_model.model().features.bank.positive.mean(1)
    labels = torch.arange(count) % C
    made = torch.Generator().manual_seed(seed)
    image = centres[labels] + noise * torch.randn(count, D, generator=made)
    valid = torch.ones(count, dtype=torch.bool)
    if holes:
        valid[::3] = False
        image[::3] = 1e6
    return Labelled(Features(image, None, valid, torch.arange(count)), labels)


def accuracy(wrapped: nn.Module, rows: Labelled) -> float:
    valid = rows.features.valid
    right = say(wrapped, rows.features).argmax(1) == rows.labels
    return right[valid].double().mean().item()


@pytest.mark.parametrize("case", ["tip_adapter", "tip_adapter_alone", "tip_adapter_f"])
def test_alpha_and_beta_are_the_best_of_the_grid_on_validation(case):
    wrapped = attach(case, alpha_steps=4, beta_steps=5)
    head, validation = head_of(wrapped), split(40, 1, 1.5, holes=True)
    told = head.calibrate(split(15, 0), validation)
    found = float(head.beta), float(head.alpha)
    assert told["validation_accuracy"] == pytest.approx(accuracy(wrapped, validation))
    assert (told["beta"], told["alpha"]) == found
    alphas = [1.17] if case == "tip_adapter_alone" else [0.1 + i * 2.9 / 4 for i in range(4)]
    best, want = 0.0, None
    for beta in [0.1 + i * 6.9 / 5 for i in range(5)]:
        for alpha in alphas:
            head.beta.fill_(beta)
            head.alpha.fill_(alpha)
            if (now := accuracy(wrapped, validation)) > best:
                best, want = now, (beta, alpha)
    assert found == pytest.approx(want)


def test_the_search_sees_validation_and_nothing_else():
    first, second = attach("tip_adapter"), attach("tip_adapter")
    validation = split(30, 1, 1.5)
    head_of(first).calibrate(split(15, 0), validation)
    other = split(15, 9)
    other.labels = other.labels.flip(0)
    head_of(second).calibrate(other, validation)
    assert torch.equal(say(first), say(second))


def test_the_linear_probe_is_the_regression_with_the_strength_that_validation_prefers():
    wrapped = attach("linear_probe_lbfgs", halvings=2)
    train, validation = split(25, 0, 1.2, holes=True), split(40, 1, 1.2, holes=True)
    assert not say(wrapped).any()
    told = head_of(wrapped).calibrate(train, validation)
    assert told["validation_accuracy"] == pytest.approx(accuracy(wrapped, validation))
    assert accuracy(wrapped, train) > 0.9
    for strength in (1e6, 1e2, 1.0, 1e-2, 1e-6):
        other = attach("linear_probe_lbfgs", strength=strength)
        assert head_of(other).calibrate(train, None) == {"strength": strength}
        assert accuracy(other, validation) <= told["validation_accuracy"]
    fixed = attach("linear_probe_lbfgs", strength=told["strength"])
    head_of(fixed).calibrate(train, None)
    assert torch.equal(say(fixed), say(wrapped))


def test_a_linear_probe_reads_the_image_the_caption_or_both_and_says_what_is_missing():
    rows = split(30, 3, 1.2)
    rows.features.text = torch.randn(30, D, generator=torch.Generator().manual_seed(4))
    shown = {}
    for inputs in ("image", "text", "both"):
        head = head_of(attach("linear_probe_lbfgs", inputs=inputs, strength=1.0))
        head.calibrate(rows, None)
        shown[inputs] = head(rows.features).logits
        assert head.weight.shape[1] == (2 * D if inputs == "both" else D)
    alone = head_of(attach("linear_probe_lbfgs", strength=1.0))
    alone.calibrate(
        Labelled(Features(rows.features.text, None, rows.features.valid, rows.features.key), rows.labels), None
    )
    torch.testing.assert_close(
        shown["text"], alone(Features(rows.features.text, None, *[rows.features.valid] * 2)).logits
    )
    assert not torch.equal(shown["both"], shown["image"])
    rows.features.text = None
    with pytest.raises(BadInput, match="captions"):
        head(rows.features)
    with pytest.raises(BadInput, match="text features"):
        attach("linear_probe_lbfgs", tiny_feature_model.model(text_width=0), inputs="both")


def test_solved_and_trained_linear_probes_agree():
    train, c = split(40, 0, 1.2), 0.05
    solved = attach("linear_probe_lbfgs", strength=c)
    head_of(solved).calibrate(train, None)
    trained = attach("linear_probe")
    optimizer = torch.optim.LBFGS(head_of(trained).parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = trained(image_features=train.features.image).logits
        loss = cross_entropy(logits, train.labels, reduction="sum")
        loss = loss + head_of(trained).weight.square().sum() / (2 * c)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(say(trained).softmax(1), say(solved).softmax(1), atol=1e-3, rtol=0)
    assert head_of(trained).calibrate(train, None) == {}


@pytest.mark.parametrize("case", ["linear_probe_lbfgs", "tip_adapter"])
def test_a_search_without_validation_is_refused_and_can_be_switched_off(case):
    with pytest.raises(BadInput, match="data.validation") as caught:
        head_of(attach(case)).calibrate(split(15, 0), None)
    assert "\n" not in str(caught.value)
    off = {"search": False} if case == "tip_adapter" else {"strength": 1.0}
    head_of(attach(case, **off)).calibrate(split(15, 0), None)
    # a recipe is refused before anything has trained
    name = ALL[case][0]
    raw = {"run_dir": "runs/x", "backbone": {"name": "features"}, "method": {"name": name}}
    with pytest.raises(BadInput, match=f"data.validation: empty, but {name} searches"):
        check_validation(recipe.from_dict(raw), methods.get(name).Config())
    check_validation(recipe.from_dict(raw), methods.get(name).Config(**off))
    check_validation(recipe.from_dict({**raw, "data": {"validation": [{"dir": "d"}]}}), methods.get(name).Config())
