"""Tasks of generative models train and are evaluated by scores of the labels, with the numbers of all logits."""

from __future__ import annotations

import pytest
import torch

from mmpeft_ds import registry, tasks
from mmpeft_ds.data.batch import Sample, pack
from mmpeft_ds.data.stream import Step
from mmpeft_ds.engine.assembly import forward as forwarding
from mmpeft_ds.engine.assembly import resolve as resolving
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.evaluator import evaluate
from mmpeft_ds.ops.token_scores import labelled
from mmpeft_ds.sites.unread import LastLayer
from tests.helpers.runs import tiny_pairs

ANSWERS = ["red"] * 4 + ["a circle"] * 3 + ["blue"] * 3
RECORD = {
    "questions": [{"question": f"what color is circle {i}?", "answers": ANSWERS} for i in range(2)],
    "captions": ["a red circle", "a circle"],
    "conversations": [{"from": "human", "value": "<image>what is it?"}, {"from": "gpt", "value": "a big circle"}],
}
TASKS = [
    ("vqa_generative", "clip_bart", {}),
    ("vqa_generative", "clip_bart", {"smoothing": 0.1}),
    ("captioning", "clip_bart", {"smoothing": 0.1}),
    ("captioning", "clip_bart", {"loss": "caption"}),
    ("answering", "clip_bart", {"score_weight": True}),
    ("instruction", "mllm", {}),
    ("instruction", "mllm", {"loss": "conversation"}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    sections = tiny_pairs.write_backbones(folder, {"clip_bart", "mllm"})
    made = {}
    for name in sections:
        method = {"name": "lora", "r": 2, "init_lora_weights": False}
        parts = tiny_pairs.resolved({"backbone": name, "method": method}, sections, folder)
        torch.manual_seed(0)
        made[name] = (resolving.attach(parts, parts.backbone.build()).eval().double(), parts.backbone)
    return made


def task_of(name: str, options: dict):
    made = registry.options(tasks, name, "task.name")(**options)
    return registry.load(tasks, name, "task.name")(made, ["red", "blue", "a circle"])


def batch_of(task, backbone, first: int = 0):
    """Two samples of different weights, and padding."""
    generator, transform = torch.Generator().manual_seed(first), backbone.image_transform(True)
    samples = [Sample()]
    for number, weight in enumerate((1.0, 0.5)):
        image = transform(torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=generator), generator)
        texts, targets = task.read(RECORD, generator)
        samples.append(Sample(f"t/{first + number}", weight, [image], texts, targets, RECORD))
    return pack(samples, backbone.collate_images, backbone.collate_texts, task.collate)


@pytest.mark.parametrize("name, backbone, options", TASKS)
def test_the_loss_of_a_task_and_its_gradients_are_those_of_logits(models, name, backbone, options):
    model, backbone = models[backbone]
    task = task_of(name, options)
    batch, results = batch_of(task, backbone), []
    last = LastLayer(model.get_base_model())
    for scores, leave_out in ((False, None), (True, None), (True, last)):
        outputs = forward(model, backbone, batch, scores=scores, last=leave_out)
        assert (outputs.logits is None) == scores
        model.zero_grad()
        loss = task.loss(outputs, batch)
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    expected, gradients = results[0]
    for loss, others in results[1:]:
        torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(others[parameter], gradient, atol=1e-12, rtol=1e-9, msg=parameter)
    assert loss > 1 and max(g.abs().max() for g in gradients.values()) > 1e-3


def rows_of_last(model, backbone, batch, last) -> tuple[list[int], torch.Tensor, list[torch.Tensor]]:
    """Positions that the narrowing map of the last feed-forward block is called with, the loss, and gradients."""
    down, rows = model.get_base_model().get_decoder().layers[-1].mlp.down_proj, []
    handle = down.register_forward_hook(lambda module, args, out: rows.append(args[0].flatten(0, -2).shape[0]))
    outputs = forward(model, backbone, batch, scores=True, last=last)
    loss = task_of("instruction", {"max_new_tokens": 0}).loss(outputs, batch)
    model.zero_grad()
    loss.backward()
    handle.remove()
    return rows, loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_layer_finishes_only_positions_that_predict_a_label(models, packed):
    model, backbone = models["mllm"]
    batch = batch_of(task_of("instruction", {"max_new_tokens": 0}), backbone)
    batch.padding_free = packed
    last = LastLayer(model.get_base_model())
    (all_rows,), expected, gradients = rows_of_last(model, backbone, batch, None)
    (rows,), loss, others = rows_of_last(model, backbone, batch, last)
    assert rows == int((batch.texts["labels"][:, 1:] != -100).sum()) < all_rows
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, atol=1e-12, rtol=1e-9)
    with torch.no_grad():  # what is evaluated stays as it is, bit for bit
        with_last, without = (
            forward(model, backbone, batch, scores=True, last=choice).scores.nll for choice in (last, None)
        )
    assert torch.equal(with_last, without)


def test_a_position_that_is_left_out_though_it_predicts_a_label_changes_the_loss(models, monkeypatch):
    model, backbone = models["mllm"]
    batch = batch_of(task_of("instruction", {"max_new_tokens": 0}), backbone)
    _, expected, _ = rows_of_last(model, backbone, batch, None)
    monkeypatch.setattr(forwarding, "labelled", lambda labels: labelled(labels)[1:])
    _, loss, _ = rows_of_last(model, backbone, batch, LastLayer(model.get_base_model()))
    assert abs(loss - expected) > 1e-6


def test_a_last_layer_that_is_computed_again_or_whose_adapters_ask_for_the_row_is_computed_whole(models, tmp_path):
    model, backbone = models["mllm"]
    batch, base = batch_of(task_of("instruction", {"max_new_tokens": 0}), backbone), model.get_base_model()
    whole = rows_of_last(model, backbone, batch, None)[0]
    last = LastLayer(base)
    layer = base.get_decoder().layers[-1]
    layer.gradient_checkpointing, layer.training = True, True
    assert not last.may_leave_out()
    layer.gradient_checkpointing, layer.training = False, False
    assert last.may_leave_out()
    query = layer.self_attn.q_proj
    query.rowless = False
    try:
        assert rows_of_last(model, backbone, batch, last)[0] == whole
    finally:
        del query.rowless


def test_a_last_layer_with_an_adapter_of_peft_that_weighs_by_all_tokens_is_computed_whole(tmp_path):
    """Lily's router takes the mean over the tokens that it is given."""
    sections = tiny_pairs.write_backbones(tmp_path, {"mllm"})
    method = {"name": "peft", "type": "lily", "targets": ["up", "down"], "options": {"r": 2}}
    parts = tiny_pairs.resolved({"backbone": "mllm", "method": method}, sections, tmp_path)
    model, backbone = resolving.attach(parts, parts.backbone.build()).eval().double(), parts.backbone
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    batch = batch_of(task_of("instruction", {"max_new_tokens": 0}), backbone)
    last = LastLayer(model.get_base_model())
    losses = [forward(model, backbone, batch, scores=True, last=choice).token_losses()[0] for choice in (None, last)]
    assert last.parts and not last.may_leave_out() and torch.equal(*losses)
    assert "all tokens of a batch" in parts.method.unpackable(parts.method_config, "sdpa")


def test_evaluation_reads_loss_and_predictions_of_one_forward_pass(models):
    model, backbone = models["mllm"]
    task = task_of("instruction", {"max_new_tokens": 0})
    steps = [Step(0, i, [batch_of(task, backbone, 2 * i)]) for i in range(3)]
    base = model.get_base_model()
    calls = []
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: calls.append(name))
        for name, module in (("model", base), ("head", base.get_output_embeddings()))
    ]
    found = evaluate(model, backbone, task, steps, "cpu")
    for handle in handles:
        handle.remove()
    assert sorted(calls) == ["head"] * 3 + ["model"] * 3
    rows, loss, weight = [], 0.0, 0.0
    with torch.no_grad():
        for step in steps:
            outputs = forward(model, backbone, step.micro[0])
            rows += task.predict(outputs, step.micro[0])
            loss += float(task.loss(outputs, step.micro[0]))
            weight += task.weight(step.micro[0])
    assert [row["tokens_right"] for row in found.rows] == [row["tokens_right"] for row in rows]
    assert [row["nll"] for row in found.rows] == pytest.approx([row["nll"] for row in rows], rel=1e-12)
    assert found.scores["loss"] == pytest.approx(loss / weight, rel=1e-12)
