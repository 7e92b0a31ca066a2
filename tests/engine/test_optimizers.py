"""Optimisers and their checkpoints in one process, against torch's; ZeRO stages are in test_checkpoint_ranks.py."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmpeft_ds.engine import calibrate, checkpoint, checkpoint_files
from mmpeft_ds.engine.assembly.checks import check_schedule, check_values
from mmpeft_ds.engine.ewc import Pull
from mmpeft_ds.engine.optim import optimizers
from mmpeft_ds.engine.zero import gradients
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import sha256
from mmpeft_ds.recipe.options import MuonOptions, OptimOptions
from tests.helpers.runs.optim_recipe import recipe

NAMES = list(optimizers.MOMENTS)


D, STEPS = 5, 5


def options(name: str, **given) -> OptimOptions:
    return OptimOptions(name=name, lr=0.05, weight_decay=0.1, **given)


def theirs(name: str, parameters):
    """The same optimisers as torch's own calls."""
    common = {"lr": 0.05, "weight_decay": 0.1}
    if name == "muon":
        return MuonBesideAdamW(list(parameters), **common)
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **common)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](parameters, **common)


class MuonBesideAdamW:
    """torch's two optimisers over matrices and vectors, as its documentation shows them."""

    def __init__(self, parameters, lr: float, weight_decay: float, **rule):
        rule = {"adjust_lr_fn": "match_rms_adamw", **rule}
        matrices = [p for p in parameters if p.dim() == 2]
        vectors = [p for p in parameters if p.dim() != 2]
        self.both = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **rule),
            torch.optim.AdamW(vectors, lr=lr, weight_decay=weight_decay),
        ]

    def zero_grad(self):
        for optimizer in self.both:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.both:
            optimizer.step()

    @property
    def state(self):
        return {**self.both[0].state, **self.both[1].state}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3))


def engine_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> SimpleNamespace:
    """What DeepSpeed's engine is to a checkpoint where nothing is split."""
    return SimpleNamespace(
        module=module, optimizer=optimizer, device=torch.device("cpu"), zero_optimization_stage=lambda: 0
    )


def ours(name: str, seed: int = 0) -> SimpleNamespace:
    module = model(seed)
    return engine_of(module, optimizers.make(groups_of(name, module.parameters()), options(name)))


def groups_of(name: str, parameters) -> list[dict]:
    named = {str(i): p for i, p in enumerate(parameters)}
    # Decay of vectors as well, as torch's optimisers have it.
    return optimizers.parameter_groups(named, recipe(name=name, weight_decay=0.1), decays=lambda name: True)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, D, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def save(folder, engine, step):
    state = checkpoint.TrainState(step=step)
    trainables = dict(engine.module.named_parameters())
    folder.mkdir(exist_ok=True)
    return checkpoint.save(folder, engine, trainables, state, recipe={}, fingerprint={}, keep_last=2)


def load(path, engine):
    return checkpoint.load(path, engine, dict(engine.module.named_parameters()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_run_saved_and_resumed_at_any_step_is_torchs_uninterrupted_one(tmp_path, name, at):
    plain = model()
    optimizer = theirs(name, plain.parameters())
    train(plain, optimizer, 0, STEPS)
    whole = ours(name)
    train(whole.module, whole.optimizer, 0, at)
    path = save(tmp_path, whole, at)  # at step 0 this makes the state before the first step
    train(whole.module, whole.optimizer, at, STEPS)
    resumed = ours(name, seed=1)
    train(resumed.module, resumed.optimizer, 10, 12)  # other weights, moments and step: the checkpoint alone decides
    assert load(path, resumed).step == at
    train(resumed.module, resumed.optimizer, at, STEPS)
    for expected, a, b in zip(plain.parameters(), whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, expected) and torch.equal(b, expected)
        for key in optimizers.moments(whole.optimizer, a):
            assert torch.equal(resumed.optimizer.state[b][key], optimizer.state[expected][key])


@pytest.mark.parametrize("name", NAMES)
def test_the_moments_of_a_checkpoint_matter(tmp_path, name):
    """Negative control: with the weights alone, the run would go on elsewhere."""
    engine, forgetful = ours(name), ours(name)
    train(engine.module, engine.optimizer, 0, 3)
    load(save(tmp_path, engine, 3), forgetful)
    for state in forgetful.optimizer.state.values():
        for value in state.values():
            value.zero_()
    train(engine.module, engine.optimizer, 3, STEPS)
    train(forgetful.module, forgetful.optimizer, 3, STEPS)
    assert not torch.allclose(engine.module[0].weight, forgetful.module[0].weight, atol=1e-4)


def test_decay_is_in_the_gradient_of_adam_and_sgd_and_beside_that_of_adamw():
    moved = {}
    for name in ("adamw", "adam", "sgd"):
        p = nn.Parameter(torch.tensor([2.0, -1.0]))
        p.grad = torch.zeros(2)
        optimizers.make([{"params": [p], "weight_decay": 0.1}], options(name)).step()
        moved[name] = (p.detach() - torch.tensor([2.0, -1.0])).tolist()
    assert moved["adamw"] == pytest.approx([-0.05 * 0.1 * 2.0, 0.05 * 0.1 * 1.0], abs=1e-6)
    assert moved["sgd"] == pytest.approx(moved["adamw"], abs=1e-6)  # the first step, without a gradient
    assert moved["adam"] == pytest.approx([-0.05, 0.05], abs=1e-6)  # Adam divides the decay by its own size


def test_what_is_saved_is_named_after_the_state_of_the_optimiser(tmp_path):
    from safetensors import safe_open

    for name, expected in (("adamw", {"exp_avg", "exp_avg_sq"}), ("sgd", {"momentum_buffer"})):
        path = save(tmp_path / name, ours(name), 0)
        with safe_open(path / "optimizer.safetensors", "pt") as file:
            assert {key.rsplit(".", 1)[1] for key in file.keys()} == expected  # noqa: SIM118
        assert checkpoint_files.read_json(path, "state")["optimizer"] == name


@pytest.mark.parametrize(("written", "here"), list(itertools.permutations(NAMES, 2)))
def test_a_checkpoint_of_another_optimiser_is_refused_in_one_line(tmp_path, written, here):
    path = save(tmp_path, ours(written), 0)
    engine = ours(here, seed=1)
    before = [p.detach().clone() for p in engine.module.parameters()]
    with pytest.raises(BadInput, match=f"written with optim.name: {written}, and this run has {here}") as refused:
        load(path, engine)
    assert "\n" not in str(refused.value)
    assert all(map(torch.equal, before, engine.module.parameters()))


def test_a_checkpoint_that_names_no_optimiser_is_adamws(tmp_path):
    engine = ours("adamw")
    train(engine.module, engine.optimizer, 0, 2)
    path = save(tmp_path, engine, 2)
    header = checkpoint_files.read_json(path, "state")
    assert header.pop("optimizer") == "adamw"
    (path / "state.json").write_text(json.dumps(header))
    sums = json.loads((path / "checksums.json").read_text())
    (path / "checksums.json").write_text(json.dumps(sums | {"state.json": sha256(path / "state.json")}))
    other = ours("adamw", seed=1)
    load(path, other)
    assert all(map(torch.equal, engine.module.parameters(), other.module.parameters()))
    with pytest.raises(BadInput, match="optim.name: adamw, and this run has sgd"):
        load(path, ours("sgd"))


def test_an_optimiser_that_no_recipe_can_name_has_no_checkpoint(tmp_path):
    module = model()
    with pytest.raises(TypeError, match="adamw, adam, sgd, muon, not of Adagrad"):
        save(tmp_path, engine_of(module, torch.optim.Adagrad(module.parameters())), 0)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_a_head_has_found_begin_with_fresh_moments(monkeypatch, name):
    engine = ours(name)
    train(engine.module, engine.optimizer, 0, 2)

    def find(train, validation):
        with torch.no_grad():
            engine.module[0].weight.fill_(0.5)
        return {"found": 1.0}

    engine.module.calibrate = find
    monkeypatch.setattr(calibrate, "head", lambda model: engine.module)
    assert calibrate.run(SimpleNamespace(model=engine.module, engine=engine), None, None) == {"found": 1.0}
    changed, kept = engine.module[0].weight, engine.module[2].weight
    assert (changed == 0.5).all()
    for key in optimizers.moments(engine.optimizer, changed):
        assert not engine.optimizer.state[changed][key].any() and engine.optimizer.state[kept][key].any()


@pytest.mark.parametrize("name", NAMES)
def test_ewc_with_any_optimiser_is_its_penalty_in_the_loss(name):
    strength, pulled, plain = 3.0, ours(name), model()
    torch.manual_seed(3)
    fisher = [torch.rand_like(p) for p in plain.parameters()]
    anchor = [torch.randn_like(p) for p in plain.parameters()]
    pull = Pull(strength)
    for p, f, a in zip(pulled.module.parameters(), fisher, anchor, strict=True):
        pull.hold(p, f, a)
    optimizer = theirs(name, plain.parameters())
    for step in range(STEPS):
        x = torch.randn(8, D, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        penalty = sum((f * (p - a) ** 2).sum() for p, f, a in zip(plain.parameters(), fisher, anchor, strict=True))
        (plain(x).square().mean() + strength * penalty).backward()
        optimizer.step()
        pulled.optimizer.zero_grad()
        pulled.module(x).square().mean().backward()
        assert pull.add(gradients.shards(pulled)).item() == pytest.approx(strength * penalty.item(), rel=1e-4)
        pulled.optimizer.step()
    for a, b in zip(pulled.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "optim",
    [
        {"name": "sgd", "momentum": 0.5},
        {"name": "sgd", "betas": [0.9, 0.999], "eps": 1e-8},  # spelled out, but what it would be anyway
        {"name": "adam", "eps": 1e-4},
        {"name": "muon", "eps": 1e-4, "muon": {"ns_steps": 3, "nesterov": False, "adjust_lr_fn": "original"}},
        {"schedule": "cosine_epoch", "warmup_lr": 1e-4, "epochs": 2},
    ],
)
def test_what_is_read_is_accepted(optim):
    check_values(recipe(**optim))


@pytest.mark.parametrize(
    ("optim", "told"),
    [
        ({"name": "adam", "momentum": 0.8}, "optim.momentum: optim.name: adam does not read it"),
        ({"momentum": 0.0}, "optim.momentum: optim.name: adamw does not read it"),
        ({"name": "sgd", "betas": [0.5, 0.9]}, "optim.betas: optim.name: sgd"),
        ({"name": "sgd", "eps": 1e-4}, "optim.eps: optim.name: sgd"),
        ({"schedule": "cosine_epoch", "warmup": 0.0}, "optim.warmup: optim.schedule: cosine_epoch"),
        ({"schedule": "cosine", "warmup_lr": 1e-4}, "optim.warmup_lr: optim.schedule: cosine does not read"),
        ({"name": "muon", "momentum": 0.8}, "optim.momentum: optim.name: muon.*optim.muon.momentum"),
        ({"muon": {"ns_steps": 4}}, "optim.muon: optim.name: adamw does not read it"),
        ({"name": "muon", "muon": {"ns_steps": 100}}, r"optim.muon.ns_steps: must lie in \[1, 99\]"),
        ({"name": "muon", "muon": {"momentum": 1.0}}, r"optim.muon.momentum: must lie in \[0, 1\)"),
        ({"name": "muon", "muon": {"adamw_lr": 0.0}}, "optim.muon.adamw_lr: must be above 0"),
        ({"groups": {"*": {"optimizer": "muon"}}}, r"optim.groups: '\*' names an optimizer, which optim.name: adamw"),
        ({"name": "sgd", "momentum": 1.0}, r"optim.momentum: must lie in \[0, 1\)"),
        ({"schedule": "cosine_epoch", "warmup_lr": -1.0}, "optim.warmup_lr: must be 0 or more"),
    ],
)
def test_what_would_not_be_read_is_refused_in_one_line(optim, told):
    with pytest.raises(BadInput, match=told) as refused:
        check_values(recipe(**optim))
    assert "\n" not in str(refused.value)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(BadInput, match="optim.name.*adamw.*adam.*sgd.*muon"):
        recipe(name="adagrad")


def test_a_run_by_epochs_must_outlast_its_warm_up():
    by_epoch = recipe(schedule="cosine_epoch")
    with pytest.raises(BadInput, match=r"first epoch \(7 steps\).*the run has 7 steps"):
        check_schedule(by_epoch, 7, 7)
    check_schedule(by_epoch, 8, 7)
    check_schedule(by_epoch, 0, 7)  # nothing is trained step by step
    check_schedule(recipe(schedule="cosine"), 7, 7)


# ---------------------------------------------------------------------------------------------------------- muon


@pytest.mark.parametrize(
    "rule", [{}, {"momentum": 0.5, "nesterov": False}, {"ns_steps": 2, "adjust_lr_fn": "original"}]
)
def test_muon_with_any_options_is_torchs_to_the_bit(rule):
    plain, engine = model(), engine_of(model(), None)
    reference = MuonBesideAdamW(list(plain.parameters()), lr=0.05, weight_decay=0.1, **rule)
    muon = MuonOptions(**rule)
    engine.optimizer = optimizers.make(groups_of("muon", engine.module.parameters()), options("muon", muon=muon))
    train(plain, reference, 0, STEPS)
    train(engine.module, engine.optimizer, 0, STEPS)
    assert all(map(torch.equal, plain.parameters(), engine.module.parameters()))
    other = model()
    train(other, MuonBesideAdamW(list(other.parameters()), lr=0.05, weight_decay=0.1, momentum=0.7), 0, STEPS)
    assert not torch.allclose(other[0].weight, plain[0].weight, atol=1e-4)  # negative control


def test_the_planned_moments_are_those_that_the_optimiser_holds():
    engine = ours("muon")
    train(engine.module, engine.optimizer, 0, 1)
    state = engine.optimizer.state
    held = sum(t.numel() for p in engine.module.parameters() for t in state[p].values() if t.dim())
    total = sum(p.numel() for p in engine.module.parameters())
    groups = groups_of("muon", engine.module.parameters())
    assert optimizers.mean_moments(groups, "muon") * total == pytest.approx(held)
    assert optimizers.mean_moments(groups_of("adamw", engine.module.parameters()), "adamw") == 2
