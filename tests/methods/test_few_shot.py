"""The few-shot baselines on a tiny bank: formulae, sizes, gradients, what travels, what is refused."""

import copy
import dataclasses
import re

import peft
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from mmpeft_ds import methods, recipe
from mmpeft_ds.engine.assembly.checks import check_values
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.sites import find_sites
from tests.helpers import ROOT
from tests.helpers.models import tiny_feature_model
from tests.helpers.models.few_shot_heads import ALL, FREE, TRAINED, C, D, K, attach, moved, say, unit


def defined(case: str, wrapped: peft.PeftModel, z: torch.Tensor) -> torch.Tensor:
    """The published formulae once more, plainly."""
    head, bank, tau = head_of(wrapped), head_of(wrapped).bank, 10.0
    raw, tip = bank.positive.mean(1), unit(unit(bank.positive).mean(1))
    if case == "zero_shot":
        return tau * unit(z) @ unit(raw).T
    if case.startswith("linear_probe"):
        return z @ head.weight.T + head.bias
    if case == "clip_adapter":
        h = torch.relu(torch.relu(z @ head.down.weight.T) @ head.up.weight.T)
        return tau * unit(0.2 * h + 0.8 * z) @ tip.T
    if case.startswith("tip_adapter"):
        keys = head.keys if "_f" in case else unit(bank.support.mean(1))
        onehot = torch.eye(C, dtype=z.dtype)[bank.support_labels]
        votes = torch.exp(-head.beta * (1 - unit(z) @ keys.T)).to(z.dtype) @ onehot
        return head.alpha.to(z.dtype) * votes + (0 if "alone" in case else tau * unit(z) @ tip.T)
    if case == "task_res":
        return tau * unit(z) @ unit(raw + 0.5 * head.residual).T
    assert case == "graph_adapter"
    visual = bank.prototypes
    out = torch.zeros_like(raw)
    for q in range(C):  # five classes: one group
        for share, bank_rows, weight, bias in (
            (0.7, raw, head.weight_text, head.bias_text),
            (0.3, visual, head.weight_image, head.bias_image),
        ):
            nodes = torch.cat([raw[q : q + 1], bank_rows])
            adjacency = (unit(nodes) @ unit(nodes).T).clamp(min=0) + torch.eye(len(nodes), dtype=z.dtype)
            scale = adjacency.sum(1).rsqrt()
            aggregated = (scale[:, None] * adjacency * scale)[0] @ nodes
            out[q] += share * torch.tanh(aggregated @ weight + bias[q])
    return tau * unit(z) @ unit(0.7 * raw + 0.3 * out).T


@pytest.mark.parametrize("case", ALL)
def test_logits_are_what_the_formula_says(case):
    base = tiny_feature_model.model(dtype=torch.float64)
    wrapped = moved(attach(case, base).double())
    z = tiny_feature_model.rows(dtype=torch.float64)
    torch.testing.assert_close(say(wrapped, z), defined(case, wrapped, z.image).detach(), atol=1e-12, rtol=1e-12)


def test_ensembles_of_templates():
    bank = tiny_feature_model.model().features.bank
    for ensemble, want in (("unit", unit(unit(bank.positive).mean(1))), ("raw", unit(bank.positive.mean(1)))):
        text = head_of(attach("zero_shot", ensemble=ensemble)).text
        torch.testing.assert_close(unit(text), want)
    raw, units = (say(attach("zero_shot", ensemble=e)) for e in ("raw", "unit"))
    assert (raw - units).abs().max() > 1e-2
    base = tiny_feature_model.model()
    assert torch.equal(say(attach("zero_shot", ensemble=None)), say(base))


# ------------------------------------------------------------------------------------- where they start, and sizes


@pytest.mark.parametrize("case", ALL)
def test_disabled_it_is_zero_shot_to_the_bit_also_after_training(case):
    base = tiny_feature_model.model()
    before, frozen = say(base), {n: b.clone() for n, b in base.named_buffers()}
    wrapped = moved(attach(case, base))
    assert not torch.equal(say(wrapped), before)
    with wrapped.disable_adapter():
        assert torch.equal(say(wrapped), before)
    assert all(torch.equal(b, frozen[n]) for n, b in wrapped.unload().named_buffers())


def test_a_residual_of_zero_is_zero_shot_to_the_bit():
    base = tiny_feature_model.model()
    base.features.ensemble = "raw"
    assert torch.equal(say(attach("task_res", copy.deepcopy(base))), say(base))


@pytest.mark.parametrize(
    ("case", "options"),
    [("clip_adapter", {"ratio": 0.0}), ("graph_adapter", {"beta": 1.0}), ("tip_adapter", {"alpha": 0.0})],
)
def test_the_share_that_switches_it_off_leaves_zero_shot(case, options):
    base = tiny_feature_model.model()
    base.features.ensemble = "unit" if case == "tip_adapter" else "raw"
    torch.testing.assert_close(say(attach(case, copy.deepcopy(base), **options)), say(base), atol=1e-5, rtol=1e-5)


def test_numbers_of_trained_parameters():
    width, classes, shots = 16, 6, 4
    base = tiny_feature_model.model(classes=classes, width=width, support=shots)
    want = {
        "linear_probe": classes * (width + 1),
        "clip_adapter": width * width // 2,
        "tip_adapter_f": classes * shots * width,
        "tip_adapter_f_alone": classes * shots * width,
        "task_res": classes * width,
        "graph_adapter": 2 * (width * width + classes * width),
    } | dict.fromkeys(FREE, 0)
    for case, count in want.items():
        wrapped = attach(case, copy.deepcopy(base))
        assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == count, case
        assert head_of(wrapped).config.gradient_free == (count == 0)


def test_starts_are_the_published_ones():
    head = head_of(attach("graph_adapter"))
    for weight, bias in ((head.weight_text, head.bias_text), (head.weight_image, head.bias_image)):
        assert not bias.any() and weight.abs().max() <= D**-0.5 and weight.std() > 0.4 * D**-0.5
    head = head_of(attach("tip_adapter_f"))
    torch.testing.assert_close(head.keys.detach(), unit(head.bank.support.mean(1)))
    assert (float(head.alpha), float(head.beta)) == (1.17, 1.0)


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("case", TRAINED)
def test_gradients_are_those_of_finite_differences(case):
    wrapped = moved(attach(case, tiny_feature_model.model(dtype=torch.float64)).double())
    head, rows = head_of(wrapped), tiny_feature_model.labelled(6, dtype=torch.float64)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in head.named_parameters()), strict=True)

    def loss(*parameters):
        scores = functional_call(head, dict(zip(names, parameters, strict=True)), (rows.features,))
        return cross_entropy(scores.logits, rows.labels)

    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("case", TRAINED)
def test_a_few_steps_lower_the_loss_and_leave_the_bank_alone(case):
    wrapped, rows = attach(case), tiny_feature_model.labelled(20)
    frozen = copy.deepcopy(head_of(wrapped).bank.state_dict())
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(20):
        loss = cross_entropy(wrapped(image_features=rows.features.image).logits, rows.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(b, frozen[n]) for n, b in head_of(wrapped).bank.state_dict().items())


@pytest.mark.parametrize("case", ALL)
def test_a_rank_without_rows_gives_no_rows_and_zero_gradients(case):
    wrapped = attach(case)
    logits = wrapped(image_features=torch.zeros(0, D)).logits
    assert logits.shape == (0, C)
    if case in TRAINED:
        logits.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in head_of(wrapped).parameters())


# --------------------------------------------------------------------------------------------------- what travels


@pytest.mark.parametrize("case", ALL)
def test_saving_and_loading_keeps_every_bit_also_of_what_was_found(case, tmp_path):
    wrapped = moved(attach(case))
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_feature_model.model(), tmp_path, adapter_name="renamed")
    assert torch.equal(say(again), say(wrapped))
    for name in head_of(wrapped).calibrated:
        assert torch.equal(getattr(head_of(again), name), getattr(head_of(wrapped), name))
    lazy = peft.PeftModel.from_pretrained(tiny_feature_model.model(), tmp_path, low_cpu_mem_usage=True)
    for name, tensor in head_of(wrapped).state_dict().items():
        assert torch.equal(head_of(lazy).state_dict()[name], tensor)
    # where a mapped file lies in memory, a matrix product may round otherwise
    torch.testing.assert_close(say(lazy), say(wrapped), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ALL)
def test_what_is_exported_is_the_classifier(case):
    wrapped, z = moved(attach(case)), tiny_feature_model.rows().image
    out = head_of(wrapped).export()
    assert not any(tensor.requires_grad for tensor in out.values())
    if case.startswith("linear_probe"):
        logits = z @ out["weight"].T + out["bias"]
    else:
        if case == "clip_adapter":
            h = torch.relu(torch.relu(z @ out["down"].T) @ out["up"].T)
            z = out["ratio"] * h + (1 - out["ratio"]) * z
        logits = out["scale"] * unit(z) @ unit(out["text"]).T if "text" in out else 0
        if "keys" in out:
            affinity = torch.exp(-out["beta"] * (1 - unit(z) @ out["keys"].T))
            logits = logits + out["alpha"] * affinity @ torch.eye(C)[out["labels"]]
    torch.testing.assert_close(logits, say(wrapped), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["zero_shot", "clip_adapter", "tip_adapter", "task_res", "graph_adapter"])
def test_what_is_remembered_of_the_bank_follows_it(case):
    wrapped = attach(case)
    before = say(wrapped)
    assert torch.equal(say(wrapped), before)
    bank = head_of(wrapped).bank
    other = tiny_feature_model.model(seed=7).features.bank
    bank.positive.copy_(other.positive)
    bank.support.copy_(other.support)
    assert not torch.equal(say(wrapped), before)
    fresh = tiny_feature_model.model()
    fresh.features.bank.load_state_dict(bank.state_dict())
    assert torch.equal(say(attach(case, fresh)), say(wrapped))


def test_what_was_remembered_without_gradients_serves_training():
    """The gradients after a forward in inference mode are those of a head that never had one."""
    z = tiny_feature_model.rows().image
    for case in TRAINED:
        found = []
        for looked in (False, True):
            wrapped = moved(attach(case))
            if looked:
                with torch.inference_mode():
                    wrapped(image_features=z)
            wrapped(image_features=z).logits.square().sum().backward()
            found.append([p.grad for p in wrapped.parameters() if p.requires_grad])
        assert found[0] and all(g is not None and g.any() for g in found[0]), case
        assert all(torch.equal(g, h) for g, h in zip(*found, strict=True)), case


def test_two_heads_share_a_bank():
    wrapped = moved(attach("task_res"))
    first = say(wrapped)
    wrapped.add_adapter("tip", methods.get("task_res").Config(alpha=1.0))
    assert torch.equal(say(wrapped), first)
    wrapped.set_adapter("tip")
    assert not torch.equal(say(wrapped), first)
    wrapped.set_adapter("default")
    assert torch.equal(say(wrapped), first)


# -------------------------------------------------------------------------------------------------- what is refused

NEEDS = {
    "zero_shot": ("text",),
    "linear_probe": (),
    "linear_probe_lbfgs": (),
    "clip_adapter": ("text",),
    "tip_adapter": ("text", "support"),
    "tip_adapter_f": ("text", "support"),
    "tip_adapter_alone": ("support",),
    "tip_adapter_f_alone": ("support",),
    "task_res": ("text",),
    "graph_adapter": ("text", "support"),
}


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("without", ["text", "support"])
def test_what_the_bank_lacks_is_refused_where_it_is_read_and_only_there(case, without):
    base = tiny_feature_model.model(**{"templates" if without == "text" else "support": 0})
    name, options = ALL[case]
    method = methods.get(name)
    if without not in NEEDS[case]:
        assert say(attach(case, base)).isfinite().all()
        return
    with pytest.raises(BadInput, match=f"{name}: needs") as caught:
        method.check(method.Config(**options), find_sites(base), None)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=f"{name}: needs"):
        attach(case, base)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("zero_shot", {"ensemble": "both"}, "ensemble: 'both' is unknown"),
        ("clip_adapter", {"ratio": 1.5}, "ratio: must lie in"),
        ("clip_adapter", {"reduction": 0}, "reduction: must be 1 or more"),
        ("task_res", {"alpha": -1.0}, "alpha: must be 0 or more"),
        ("graph_adapter", {"groups": 0}, "groups: must be 1 or more"),
        ("graph_adapter", {"beta": 2.0}, "beta: must lie in"),
        ("tip_adapter", {"max_beta": 0.0}, "max_beta: must be 0.1 or more"),
        ("tip_adapter", {"alpha_steps": 0}, "alpha_steps: must be 1 or more"),
        ("tip_adapter", {"beta": float("nan")}, "beta: must be 0 or more"),
        ("linear_probe", {"solver": "sgd"}, "solver: 'sgd' is unknown"),
        ("linear_probe", {"strength": 0.0}, "strength: must be above 0"),
        ("linear_probe", {"halvings": "many"}, "halvings: expected an integer"),
    ],
)
def test_values_that_cannot_work_are_refused(name, options, says):
    with pytest.raises(BadInput, match=says):
        methods.get(name).Config(**options)


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="reduction: 16 leaves nothing of 8"):
        attach("clip_adapter", reduction=16)
    base = tiny_feature_model.model()
    base.features.bank.support = torch.randn(C * K, 2, 6)
    with pytest.raises(BadInput, match="share a space"):
        attach("graph_adapter", base)


def test_a_class_without_images_and_a_single_class_stay_finite():
    base = tiny_feature_model.model()
    base.features.bank.support_labels[:K] = 1
    for case in ("tip_adapter", "tip_adapter_f", "graph_adapter"):
        assert say(attach(case, copy.deepcopy(base))).isfinite().all()
    for case in ALL:
        assert say(attach(case, tiny_feature_model.model(classes=1))).shape == (7, 1)


def test_configs_travel_as_json():
    for name, options in ALL.values():
        config = methods.get(name).Config(**options)
        assert type(config)(**{k: v for k, v in config.to_dict().items() if k != "peft_type"}) == dataclasses.replace(
            config
        )


def test_the_fragments_of_the_page_are_recipes():
    page = (ROOT / "docs" / "methods" / "few_shot_baselines.md").read_text("utf-8")
    fragments = [recipe.parse_yaml(text, "page") for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert {f["method"]["name"] for f in fragments} == {name for name, _ in ALL.values()}
    for fragment in fragments:
        method = dict(fragment["method"])
        config = methods.get(method.pop("name")).Config(**method)
        assert config.gradient_free == ("optim" not in fragment)
        typed = recipe.from_dict({"run_dir": "runs/page", "backbone": {"name": "features"}, **fragment})
        check_values(typed)
        assert ("cosine" in typed.optim.schedule) == ("optim" in fragment)
