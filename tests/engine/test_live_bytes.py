"""What a step holds is gone when the next one begins: tensors do not add up over training or over an evaluation."""

import pytest
import torch

from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import streams
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.evaluator import evaluate
from tests.helpers.allocations import live_bytes
from tests.helpers.runs import tiny_adapters

KINDS = ("answering", "captioning through a projection")
pytestmark = pytest.mark.slow  # every object of the process is looked at before each step
RANKS = Ranks(0, 1, 0, 1, torch.device("cpu"))
SLACK = 512  # bytes that batches of other lengths may differ by; the outputs of a step take more


def parts(folder, kind):
    recipe = tiny_adapters.recipe(folder, kind)
    recipe.data.global_batch, recipe.data.workers = 2, 0
    resolved = resolve.resolve(recipe)
    return resolved, resolve.attach(resolved, tiny_adapters.built(resolved))


def watched(steps, held):
    """`steps`; `held` gets the bytes of live tensors before each."""
    for step in steps:
        held.append(live_bytes())
        yield step


def keeping(predict, keep):
    return lambda outputs, batch: (keep.append(outputs), predict(outputs, batch))[1]


def held_in_evaluation(resolved, model, keep=None):
    source, held = resolved.train[0], []
    for epoch in range(2):
        stream = streams.make_stream(resolved, resolved.train, RANKS, train=False)
        with pytest.MonkeyPatch.context() as patch:
            if keep is not None:
                patch.setattr(source.task, "predict", keeping(source.task.predict, keep))
            evaluate(model, resolved.backbone, source.task, watched(stream.epoch(epoch), held), "cpu")
        stream.close()
    return held


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_do_not_add_up_over_an_evaluation(tmp_path, kind):
    resolved, model = parts(tmp_path, kind)
    held = held_in_evaluation(resolved, model)
    half = len(held) // 2
    assert half >= 4 and max(held[half:]) <= max(held[2:half]) + SLACK
    leaking = held_in_evaluation(resolved, model, keep=[])  # a control: what is kept shows
    assert leaking[-1] > max(held) + SLACK


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_do_not_add_up_over_training(tmp_path, kind):
    resolved, model = parts(tmp_path, kind)
    task = resolved.train[0].task
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    held = []
    for epoch in range(3):
        stream = streams.make_stream(resolved, resolved.train, RANKS, train=True)
        for step in watched(stream.epoch(epoch), held):
            (batch,) = step.micro
            task.loss(forward(model, resolved.backbone, batch), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        stream.close()
    third = len(held) // 3
    assert third >= 4 and max(held[2 * third :]) <= max(held[2 : 2 * third]) + SLACK
