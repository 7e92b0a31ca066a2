"""Few-shot heads on a model of features, with their optimizers: GraphAdapter, TaskRes, CLIP-Adapter, Tip-Adapter."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from mmpeft_ds.backbones.features.backbone import FeatureConfig, FeatureModel
from mmpeft_ds.methods import get
from mmpeft_ds.methods.common.head import Head, head_of
from mmpeft_ds.sites.feature_site import Bank, Labelled
from tests.helpers.goldens import Golden, checks

LOGITS, VALUES = 5e-5, 2e-6  # float32 on both sides; logits reach 100
STEPPED = 2e-5  # Adam divides small gradients by themselves, rounding and all


def model(method: str, bank: Bank, scale: float, **options: object) -> tuple[peft.PeftModel, Head]:
    """The frozen model of features with that head."""
    width = (bank.positive if bank.positive.numel() else bank.support).shape[-1]
    config = FeatureConfig(image_width=width, num_classes=bank.num_classes, logit_scale=scale)
    base = FeatureModel(config, bank).requires_grad_(False)
    wrapped = peft.get_peft_model(base, get(method).Config(**options))
    return wrapped, head_of(wrapped)


def put(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def loss_of(golden: Golden, wrapped: nn.Module, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = wrapped(image_features=z).logits
    return logits, cross_entropy(logits, y)


@checks("hegraph/graphadapter_*")
def graph_adapter(golden: Golden) -> None:
    text, visual = golden.tensor("text"), golden.tensor("visual")
    classes = len(text)
    bank = Bank(classes, text[:, None], support=visual[:, None], support_labels=torch.arange(classes))
    options = {key: golden.number(key) for key in ("alpha", "beta")}
    wrapped, head = model(
        "graph_adapter", bank, golden.number("scale"), groups=int(golden.number("groups")), **options
    )
    names = {"w_tt": "weight_text", "b_tt": "bias_text", "w_it": "weight_image", "b_it": "bias_image"}
    for key, name in names.items():
        put(getattr(head, name), golden.tensor(key))
    logits, loss = loss_of(golden, wrapped, golden.tensor("z"), golden.tensor("y"))
    loss.backward()
    golden.same("text_out", head.text, VALUES)
    golden.same("logits", logits, LOGITS)
    golden.same("loss", loss, LOGITS)
    for key, name in names.items():
        golden.same(f"g_{key}", getattr(head, name).grad, VALUES)
    for key, graph in zip(("adj_raw_q_group0", "adj_norm_q_group0"), head.graphs("text"), strict=True):
        golden.same(key, graph, VALUES)


@checks("hegraph/taskres*")
def task_res(golden: Golden) -> None:
    text = golden.tensor("text")
    wrapped, head = model(
        "task_res", Bank(len(text), text[:, None]), golden.number("scale"), alpha=golden.number("alpha")
    )
    optimizer = torch.optim.Adam(
        [head.residual], golden.number("lr"), weight_decay=golden.number("weight_decay"), betas=(0.9, 0.999), eps=1e-8
    )
    for step, (z, y) in enumerate(zip(golden.tensor("z"), golden.tensor("y"), strict=True)):
        logits, loss = loss_of(golden, wrapped, z, y)
        optimizer.zero_grad()
        loss.backward()
        golden.same(f"logits_{step}", logits, LOGITS)
        golden.same(f"loss_{step}", loss, LOGITS)
        golden.same(f"grad_{step}", head.residual.grad, VALUES)
        optimizer.step()
        golden.same(f"x_{step}", head.residual, STEPPED)


@checks("hegraph/clip_adapter*")
def clip_adapter(golden: Golden) -> None:
    text, down = golden.tensor("text"), golden.tensor("w_down_init")
    options = {"ratio": golden.number("ratio"), "reduction": text.shape[1] // len(down)}
    wrapped, head = model("clip_adapter", Bank(len(text), text[:, None]), golden.number("scale"), **options)
    weights = {"down": head.down.weight, "up": head.up.weight}
    for key, weight in weights.items():
        put(weight, golden.tensor(f"w_{key}_init"))
    optimizer = torch.optim.SGD(weights.values(), golden.number("lr"))
    for step, (z, y) in enumerate(zip(golden.tensor("z"), golden.tensor("y"), strict=True)):
        logits, loss = loss_of(golden, wrapped, z, y)
        optimizer.zero_grad()
        loss.backward()
        golden.same(f"logits_{step}", logits, LOGITS)
        golden.same(f"loss_{step}", loss, LOGITS)
        for key, weight in weights.items():
            golden.same(f"g_{key}_{step}", weight.grad, VALUES)
        optimizer.step()
        for key, weight in weights.items():
            golden.same(f"w_{key}_{step}", weight, VALUES)


@checks("hegraph/tip_adapter*")
def tip_adapter(golden: Golden) -> None:
    prompts, labels = golden.tensor("prompts"), golden.tensor("support_labels")
    classes = len(prompts)
    order = torch.argsort(labels, stable=True)
    back = torch.argsort(order)
    support = golden.tensor("support_views").transpose(0, 1)[order]
    steps = golden.array("search_step").tolist()
    ends = golden.array("search_scale").tolist()
    options = {
        "alpha": golden.number("init_alpha"),
        "beta": golden.number("init_beta"),
        "max_beta": ends[0],
        "max_alpha": ends[1],
        "beta_steps": steps[0],
        "alpha_steps": steps[1],
    }

    def made(train_keys: bool) -> tuple[peft.PeftModel, Head]:
        bank = Bank(classes, prompts, support=support, support_labels=labels[order])
        return model("tip_adapter", bank, 100.0, train_keys=train_keys, **options)

    wrapped, head = made(False)
    exported = head.export()
    golden.same("clip_weights", exported["text"].T, VALUES)
    golden.same("cache_keys", exported["keys"][back].T, VALUES)
    golden.same("cache_values", one_hot(exported["labels"][back], classes).float())
    test = golden.tensor("test_x")
    golden.same("tip_test_logits", wrapped(image_features=test).logits, LOGITS)
    rows = wrapped(image_features=golden.tensor("val_x")).features
    head.calibrate(Labelled(rows, golden.tensor("val_y")), Labelled(rows, golden.tensor("val_y")))
    golden.same("search_alpha", head.alpha)
    golden.same("search_beta", head.beta)
    golden.same("tip_test_logits_searched", wrapped(image_features=test).logits, LOGITS)
    assert golden.tensor("test_y").max() < classes  # nothing that the file expects depends on it
    _trained_keys(golden, *made(True), back)


def _trained_keys(golden: Golden, wrapped: peft.PeftModel, head: Head, back: Tensor) -> None:
    settings = {key: golden.number(key) for key in ("lr", "eps", "weight_decay")}
    optimizer = torch.optim.AdamW([head.keys], **settings)
    x, y = golden.tensor("train_x"), golden.tensor("train_y")
    steps = len(golden.array("train_losses"))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    said, losses = [], []
    for step in range(steps):
        logits, loss = loss_of(golden, wrapped, x[step % len(x)], y[step % len(x)])
        optimizer.zero_grad()
        loss.backward()
        golden.same(f"keys_grad_{step}", head.keys.grad[back], VALUES)
        optimizer.step()
        schedule.step()
        golden.same(f"keys_after_{step}", head.keys[back], STEPPED)
        said.append(logits)
        losses.append(loss)
    golden.same("train_logits", torch.stack(said), LOGITS)
    golden.same("train_losses", torch.stack(losses), LOGITS)
