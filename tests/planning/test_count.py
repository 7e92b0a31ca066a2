"""A step that is counted by shapes has the operations of one that runs with numbers."""

import dataclasses
from types import SimpleNamespace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from mmpeft_ds import methods
from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine.assembly import resolve as resolving
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput
from mmpeft_ds.planning import count, microbatch
from tests.helpers.device import matrix
from tests.helpers.runs import tiny_pairs, tiny_talk

SIZE, FILLING = microbatch.Size(3), microbatch.Filling(texts=2, words=5, image_size=(9, 9))
LORA = {"name": "lora", "r": 2}


def parts_of(name, folder):
    """A backbone with a method and a task: of `tiny_pairs`, or of a column of `matrix`."""
    of_pairs = name if name == "clip_bart" else "dual_encoder"
    sections = tiny_pairs.write_backbones(folder / "pairs", {of_pairs})
    parts = tiny_pairs.resolved({"backbone": of_pairs, "method": LORA}, sections, folder)
    if of_pairs == name:
        return parts
    with matrix.column(name, folder) as made:
        parts = dataclasses.replace(parts, backbone=made.backbone, train=[SimpleNamespace(task=made.task)])
    if not made.backbone.reads_bank:
        return parts
    method = methods.get("clip_adapter")
    return dataclasses.replace(parts, method=method, method_config=method.Config())


@pytest.mark.parametrize("name", ["clip_bart", "blip retrieval, losses", "clip, losses", "heads, stored features"])
def test_operations_are_those_of_a_real_step(name, tmp_path):
    parts = parts_of(name, tmp_path)
    backbone, task = parts.backbone, parts.train[0].task
    backbone.attention = "eager"  # torch does not count the kernel that sdpa takes on a CPU
    batch = microbatch.fill(backbone, task, SIZE, FILLING)
    foreseen = count.count(parts, batch, False)
    model = resolving.attach(parts, backbone.build()).eval()
    with FlopCounterMode(display=False) as real:
        task.loss(forward(model, backbone, batch, scores=True), batch).backward()
    assert real.get_total_flops() > 1000 and foreseen.peak > 0
    # Visits are recorded with inputs that need a gradient, as ZeRO-3 has them: more to differentiate in a first layer.
    assert sum(foreseen.flops.values()) == pytest.approx(real.get_total_flops(), rel=0.1)


def test_videos_add_what_their_tokens_and_patches_cost(tmp_path):
    tiny_talk.write(tmp_path)
    parts = resolving.resolve(recipes.load(tiny_talk.recipe(tmp_path, "run")))
    backbone, task = parts.backbone, parts.train[0].task
    counted = []
    for videos in (0, 1, 2):
        filling = dataclasses.replace(FILLING, videos=videos, frames=4)
        batch = microbatch.fill(backbone, task, microbatch.Size(2), filling)
        assert len(batch.video_owner) == 2 * videos
        flops = sum(count.count(parts, batch, False).flops.values())
        counted.append((microbatch.tokens(backbone, filling), flops))
    assert counted[0] < counted[1] < counted[2] and counted[0][1] < counted[1][1] < counted[2][1]


def test_videos_of_a_backbone_that_reads_none_are_refused(tmp_path):
    parts = parts_of("clip_bart", tmp_path)
    with pytest.raises(BadInput, match="--videos-per-sample"):
        microbatch.fill(parts.backbone, parts.train[0].task, SIZE, dataclasses.replace(FILLING, videos=1))
