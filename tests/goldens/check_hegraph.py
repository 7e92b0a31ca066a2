"""HeGraphAdapter: class texts and a cache in the bank of a feature model, `get_peft_model`, weights by name."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpeft_ds import HeGraphConfig
from mmpeft_ds.backbones.features.backbone import FeatureConfig, FeatureModel
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.methods.hegraph.standalone import HeGraphHead
from mmpeft_ds.ops.class_graph import affinity, classify
from mmpeft_ds.sites.feature_site import Bank
from tests.helpers.goldens import Golden, checks

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
    options = {name: golden.number(key) for name, key in FACTORS.items()}
    degree, tau = str(golden.array("degree_mode")), golden.number("h_scale")
    labels, z = golden.tensor("cache_label"), golden.tensor("z")

    # the class for those who have tensors and no model
    nodes = (golden.tensor(key) for key in ("pos_in", "neg_in", "vis_in", "cache_in"))
    alone = HeGraphHead(*nodes, labels, coeffs=options, tau=tau, degree=degree)
    load(golden, alone)
    check_graph(golden, alone)
    heads = alone.train()(z)
    check_training(golden, alone, heads, alone.log_probabilities(*heads), torch.arange(len(labels)))
    golden.same("loss", alone.losses(z, golden.tensor("y")).mean())
    with torch.no_grad():
        check_evaluation(golden, alone.eval(), alone(z)[0], alone.predict(z))

    # The method, whose bank makes the class means itself and keeps support rows sorted by label; `back` undoes it.
    order = labels.argsort(stable=True)
    model = peft.get_peft_model(feature_model(golden, tau, order), HeGraphConfig(**options, degree=degree))
    head = head_of(model)
    golden.same("vis_in", head.nodes().visual)
    load(golden, head)
    check_graph(golden, head)
    out = model.train()(image_features=z)
    (one, text), (weight, visual) = out.terms
    assert one == 1.0
    golden.same("h_lam", torch.tensor(weight, dtype=torch.float64))
    check_training(golden, head, (text, visual), out.logits, order.argsort(stable=True))
    with torch.no_grad():
        out = model.eval()(image_features=z)
        check_evaluation(golden, head, out.terms[0][1], out.logits.exp())


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


def check_training(
    golden: Golden, head: nn.Module, logits: tuple[Tensor, Tensor], fused: Tensor, back: Tensor
) -> None:
    """`back`: rows of the file's cache in the order of the head's."""
    text, visual = logits
    golden.same("train_logits_text", text)
    golden.same("train_logits_visual", visual)
    golden.same("train_prob", fused.exp())
    refined = head.refined(training=True)
    for name in ("pn", "vn", "pp", "vp", "np"):
        golden.same(f"train_m_{name}", refined.messages[name])
    golden.same("train_neg", refined.negative)
    golden.same("train_pos", refined.text)
    golden.same("train_bias", refined.shift)
    moved = head._moved(refined, training=True)
    golden.same("train_cache", moved[back])
    near = affinity(golden.tensor("z"), moved, head.nodes().labels, len(refined.text))
    golden.same("train_affinity", near)
    losses = [cross_entropy(x, golden.tensor("y")) for x in (text, visual)]
    golden.same("loss_text", losses[0])
    golden.same("loss_visual", losses[1])
    loss = losses[0] + head.coefficients.visual_loss * losses[1]
    golden.same("loss", loss)
    loss.backward()
    for name, key in WEIGHTS.items():
        golden.same(f"g_w_{key}", getattr(head, name).grad)


def check_evaluation(golden: Golden, head: nn.Module, text: Tensor, prob: Tensor) -> None:
    golden.same("test_logits_text", text)
    golden.same("test_prob", prob)
    refined = head.refined(training=False)
    golden.same("test_m_np", refined.messages["np"])
    golden.same("test_pos", refined.text)
    golden.same("test_prob", classify(head.export(), golden.tensor("z")).exp())
