"""HeGraphAdapter: class texts and a cache in the bank of a feature model, `get_peft_model`, weights by name."""

from __future__ import annotations

import peft
import torch
from golden_framework import Golden, checks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpeft_ds import HeGraphConfig
from mmpeft_ds.backbones.features import FeatureConfig, FeatureModel
from mmpeft_ds.methods._head import head_of
from mmpeft_ds.methods.hegraph import HeGraphHead
from mmpeft_ds.ops.class_graph import affinity, classify
from mmpeft_ds.sites.features import Bank

FACTORS = {
    "beta_pn": "h_b_pn",
    "beta_vn": "h_b_vn",
    "alpha_pp": "h_a_pp",
    "alpha_vp": "h_a_vp",
    "alpha_np": "h_a_np_train",
    "alpha_np_test": "h_a_np_test",
    "gamma": "h_gamma",
    "visual_loss": "h_lam",
    "fusion": "h_w",
}
WEIGHTS = {"W_n": "neg", "W_p": "pos", "W_v": "vis"}


@checks("hegraph/hegraph_spec_*")
def check(golden: Golden) -> None:
    options = {
        **{name: golden.number(key) for name, key in FACTORS.items()},
        "degree": str(golden.array("degree_mode")),
    }
    tau, z, labels = golden.number("h_scale"), golden.tensor("z"), golden.tensor("cache_label")
    # the bank keeps support rows sorted by label; `back` undoes it
    order = labels.argsort(stable=True)
    model = peft.get_peft_model(feature_model(golden, tau, order), HeGraphConfig(**options))
    head = head_of(model)
    back = order.argsort(stable=True)
    golden.same("vis_in", head.nodes().visual)
    load(golden, head)
    check_graph(golden, head)
    check_training(golden, model.train(), head, z, back)
    check_evaluation(golden, model.eval(), head, z)

    # the class for those who have tensors and no model
    degree = options.pop("degree")
    nodes = (golden.tensor(key) for key in ("pos_in", "neg_in", "vis_in", "cache_in"))
    alone = HeGraphHead(*nodes, labels, coeffs=options, tau=tau, degree=degree)
    load(golden, alone)
    text, visual = alone(z)
    golden.same("train_logits_text", text)
    golden.same("train_logits_visual", visual)
    golden.same("loss", alone.losses(z, golden.tensor("y")).mean())
    golden.same("train_prob", alone.predict(z))
    with torch.no_grad():
        golden.same("test_prob", alone.eval().predict(z))


def feature_model(golden: Golden, tau: float, order: Tensor) -> nn.Module:
    texts, negated = (golden.tensor(key)[:, None] for key in ("pos_in", "neg_in"))
    support = golden.tensor("cache_in")[order][:, None]
    bank = Bank(len(texts), texts, negated, support, golden.tensor("cache_label")[order])
    return FeatureModel(FeatureConfig(image_width=texts.shape[-1], num_classes=len(texts), logit_scale=tau), bank)


def load(golden: Golden, head: nn.Module) -> None:
    with torch.no_grad():
        for name, key in WEIGHTS.items():
            getattr(head, name).copy_(golden.tensor(f"w_{key}"))


def check_graph(golden: Golden, head: nn.Module) -> None:
    graph = head.graph()
    for name, edges in graph.edges.items():
        golden.same(f"train_A_{name}", edges)


def check_training(golden: Golden, model: nn.Module, head: nn.Module, z: Tensor, back: Tensor) -> None:
    y = golden.tensor("y")
    out = model(image_features=z)
    (one, text), (weight, visual) = out.terms
    assert one == 1.0
    golden.same("h_lam", torch.tensor(weight, dtype=torch.float64))
    golden.same("train_logits_text", text)
    golden.same("train_logits_visual", visual)
    golden.same("train_prob", out.logits.exp())
    refined = head.refined(training=True)
    for name in ("pn", "vn", "pp", "vp", "np"):
        golden.same(f"train_m_{name}", refined.messages[name])
    golden.same("train_neg", refined.negative)
    golden.same("train_pos", refined.text)
    golden.same("train_bias", refined.shift)
    moved = head._moved(refined, training=True)
    golden.same("train_cache", moved[back])
    golden.same("train_affinity", affinity(z, moved, head.nodes().labels, len(refined.text)))
    losses = [cross_entropy(x, y) for x in (text, visual)]
    golden.same("loss_text", losses[0])
    golden.same("loss_visual", losses[1])
    loss = losses[0] + weight * losses[1]
    golden.same("loss", loss)
    loss.backward()
    for name, key in WEIGHTS.items():
        golden.same(f"g_w_{key}", getattr(head, name).grad)


@torch.no_grad()
def check_evaluation(golden: Golden, model: nn.Module, head: nn.Module, z: Tensor) -> None:
    out = model(image_features=z)
    golden.same("test_logits_text", out.terms[0][1])
    golden.same("test_prob", out.logits.exp())
    refined = head.refined(training=False)
    golden.same("test_m_np", refined.messages["np"])
    golden.same("test_pos", refined.text)
    golden.same("test_prob", classify(head.export(), z).exp())
