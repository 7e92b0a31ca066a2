"""Losses and generated or picked texts of one batch: `engine.assembly.forward.answer`."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from mmpeft_ds.backbones.common.stand_in import stand_in
from mmpeft_ds.engine.assembly import forward as module
from mmpeft_ds.engine.assembly.forward import answer, forward
from mmpeft_ds.sites import find_sites
from tests.helpers import method_table

GENERATING = ["vision_text_decoder", "clip_bart", "blip captioner", "blip vqa", "mllm LLaVA", "mllm Qwen2-VL"]
GENERATION = {"num_beams": 2, "max_new_tokens": 3}
RANKING = {"answers": ["red", "a blue circle", "is it"]}


def vision_tower(column):
    return next(
        column.model.get_submodule(p) for p, kind in find_sites(column.model).towers.items() if kind == "image"
    )


@pytest.mark.parametrize("name", GENERATING)
@torch.no_grad()
def test_the_vision_tower_runs_once_for_the_loss_and_the_answer(name, tmp_path):
    column = method_table.Column.make(name, tmp_path)
    backbone, model, batch = column.backbone, column.model, column.batch
    tower, runs = vision_tower(column), Counter()
    for part in tower.modules():
        if part is not tower:
            part.register_forward_pre_hook(lambda module, _: runs.update([module]))
    forward(model, backbone, batch)
    once = Counter(runs)
    tasks = [SimpleNamespace(generation=GENERATION, ranking=None)]
    tasks += [SimpleNamespace(generation=None, ranking=RANKING)] if backbone.ranks_answers else []
    for task in tasks:
        expected = (
            backbone.generate(model, batch, **GENERATION)
            if task.generation
            else backbone.rank(model, batch, **RANKING)
        )
        runs.clear()
        outputs = answer(model, backbone, task, batch, scores=True)
        assert runs == once and sum(once.values())
        assert outputs.generated == expected
        torch.testing.assert_close(torch.stack(list(outputs.token_losses()), 1), column.said)
    assert "forward" not in vars(tower)


@torch.no_grad()
def test_other_images_are_looked_at_anew(tmp_path):
    column = method_table.Column.make("blip vqa", tmp_path)
    tower, pixels = vision_tower(column), torch.rand(1, 3, 8, 8)
    with module._images_seen_once(column.model):
        first = tower(pixel_values=pixels).last_hidden_state
        again = tower(pixel_values=pixels.clone()).last_hidden_state
        other = tower(pixel_values=pixels + 1).last_hidden_state
    assert again is first and not torch.equal(other, first)
    torch.testing.assert_close(tower(pixel_values=pixels + 1).last_hidden_state, other)


def test_what_a_stand_in_stands_for_decides():
    def tree(content: torch.Tensor) -> tuple:
        return [stand_in(content, (2, 3), torch.float32)], "structure"

    pixels = torch.arange(6, dtype=torch.uint8)
    assert module.equal_trees(tree(pixels), tree(pixels.clone()))
    assert not module.equal_trees(tree(pixels), tree(pixels + 1))
    assert tree(pixels)[0][0].isnan().all()
