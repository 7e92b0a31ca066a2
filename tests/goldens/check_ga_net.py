"""Networks of GA-Net (ganet/model_*, dist_reference, train_steps_*) through `FeatureModel` and `get_peft_model`."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from tests.helpers.goldens import Golden, checks
from tests.helpers.models.tiny_ga_net import NAMES, Model, dense

TAU = {"v1": 0.7, "v2": 0.4}


def graph_options(golden: Golden, variant: str) -> dict[str, float]:
    """Threshold and neighbours, where a file says other ones."""
    options = {"tau": golden.number("tau") if "tau" in golden else TAU[variant]}
    return options | ({"k": int(golden.number("k"))} if "k" in golden else {})


@checks("ganet/model_v*")
def network(golden: Golden) -> None:
    variant = "v2" if "v2" in golden.name else "v1"
    model = Model.of(golden, variant=variant, train="all", **graph_options(golden, variant))
    seen = {}
    for key, part in {"Z": model.head.down, "H": model.head.conv, "U": model.head.up}.items():
        part.register_forward_hook(lambda module, args, out, key=key: seen.update({key: out}))
    x, labels = golden.tensor("X", True), golden.tensor("labels")
    out = model(x)
    loss = cross_entropy(out.logits, labels)
    loss.backward()
    golden.same("A", dense(out.graph))
    for key in ("Z", "H", "U"):
        golden.same(key, seen[key])
    golden.same("logits", out.logits)
    golden.same("loss", loss)
    golden.same("dX", x.grad)
    for key in ("Wd", "bd", "W1", "b1", "Wu", "bu", "W2", "b2"):
        golden.same(f"d{key}", model.parameter(key).grad)
    if "fus_T" in golden:
        fusion_path(golden, model)


def fusion_path(golden: Golden, model: Model) -> None:
    """Logits of the released Fisher pass: the classifier on fused features, the bottleneck skipped."""
    model.peft.zero_grad()
    text, image, seen = golden.tensor("fus_T", True), golden.tensor("fus_V", True), []
    model.head.fusion.register_forward_hook(lambda module, args, out: seen.append(out))
    with model.head.estimating_fisher():
        out = model(torch.cat([text, image], 1))
    loss = cross_entropy(out.logits, golden.tensor("labels"))
    loss.backward()
    golden.same("fus_out", seen[0])
    golden.same("fus_logits", out.logits)
    golden.same("fus_loss", loss)
    golden.same("fus_dT", text.grad)
    golden.same("fus_dV", image.grad)
    for key in NAMES:
        if f"fus_d{key}" in golden:
            golden.same(f"fus_d{key}", model.parameter(key).grad)
        else:
            assert model.parameter(key).grad is None or not model.parameter(key).grad.any(), key


@checks("ganet/dist_reference")
def one_rank(golden: Golden) -> None:
    labels = golden.tensor("labels")
    for prefix, activation in (("linear", "none"), ("relu", "relu")):
        options = {"variant": "v1", "train": "all", "activation": activation, "tau": golden.number("tau")}
        model = Model.of(golden, **options)
        x = golden.tensor("X", True)
        out = model(x)
        losses = cross_entropy(out.logits, labels, reduction="none")
        losses.mean().backward()
        golden.same("A", dense(out.graph))
        golden.same(f"{prefix}_logits", out.logits)
        golden.same(f"{prefix}_per_sample_loss", losses)
        golden.same(f"{prefix}_loss", losses.mean())
        golden.same(f"{prefix}_dX", x.grad)
        for key in ("Wd", "bd", "W1", "b1", "Wu", "bu", "W2", "b2"):
            golden.same(f"{prefix}_d{key}", model.parameter(key).grad)


@checks("ganet/train_steps_v*")
def released_training(golden: Golden) -> None:
    """Adam on what the release gave its optimiser: the classifier alone."""
    variant = "v2" if "v2" in golden.name else "v1"
    model = Model.of(golden, "_0", variant=variant, **graph_options(golden, variant))
    trained = {key: name for key, name in NAMES.items() if key in ("W2", "b2")}
    parameters = dict(model.peft.named_parameters())
    optimised = [p for p in parameters.values() if p.requires_grad]
    assert {id(model.parameter(key)) for key in trained} <= {id(p) for p in optimised}
    optimizer = torch.optim.Adam(optimised, lr=golden.number("lr") if "lr" in golden else 1e-3)
    x, labels = golden.tensor("X"), golden.tensor("labels")
    starts = golden.array("batch_start").reshape(-1)
    lengths = np.broadcast_to(golden.array("batch_len"), starts.shape)
    losses = []
    for step, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True), 1):
        rows = slice(start, start + length)
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]).logits, labels[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        for key in trained:
            golden.same(f"{key}_{step}", model.parameter(key))
    golden.same("losses", torch.stack(losses))
    for key in NAMES:
        if f"{key}_0" in golden and key not in trained:
            golden.same(f"{key}_0", model.head.state_dict()[NAMES[key]], 0.0)
