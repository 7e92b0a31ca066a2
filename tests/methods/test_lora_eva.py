"""LoRA that starts from activations of the training data (EVA)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft import PeftModel, initialize_lora_eva_weights

from mmpeft_ds import adapter, merging
from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.assembly.build import start_data
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.lora import eva
from tests.helpers.runs import tiny_classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("eva")
    tiny_classifier.make_towers(path)
    return path


def made(folder: Path, dtype: str = "float32", **more):
    method = {"name": "lora", "r": 3, "init_lora_weights": "eva", **more}
    recipe = tiny_classifier.make_recipe(folder, method=method, engine__dtype=dtype)
    recipes.components(recipe).method.options.check_training(dtype, 0)
    resolved = tiny_classifier.make_resolved(recipes.filled(recipe), tiny_classifier.TinyTask())
    torch.manual_seed(0)
    return resolved, resolve.attach(resolved, resolved.backbone.build())


def batches(backbone):
    for step in itertools.count():
        yield tiny_classifier.pack_slots(
            tiny_classifier.global_slots(step % 5, backbone), backbone, tiny_classifier.TinyTask()
        )


def started(folder: Path, dtype: str = "float32", **more):
    resolved, model = made(folder, dtype, **more)
    backbone = resolved.backbone
    assert resolved.method.reads_batches(resolved.method_config)
    resolved.method.start(model, start_data(resolved, model, ((None, batch) for batch in batches(backbone))))
    return resolved, model


def factors(model: torch.nn.Module, part: str) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if f".{part}." in name}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_down_begins_as_directions_up_as_zero_and_ranks_move_with_their_sum_kept(folder, dtype):
    _, plain = made(folder, dtype)
    _, model = started(folder, dtype)
    downs = factors(model, "lora_A")
    assert sum(len(down) for down in downs.values()) == sum(len(down) for down in factors(plain, "lora_A").values())
    assert len({len(down) for down in downs.values()}) > 1, "no layer got another rank"
    for down in downs.values():
        assert down.dtype == torch.float32
        torch.testing.assert_close(down @ down.T, torch.eye(len(down)), rtol=0, atol=2e-2)
    assert not any(up.any() for up in factors(model, "lora_B").values())


def test_the_start_is_pefts_and_the_same_each_time(folder):
    one, other = (factors(started(folder)[1], "lora_A") for _ in range(2))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    resolved, model = made(folder)
    initialize_lora_eva_weights(
        model,
        # peft begins a list again after it has looked at its first batch
        list(itertools.islice(batches(resolved.backbone), 1, 61)),
        forward_fn=lambda m, batch: forward(m, resolved.backbone, batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    theirs = factors(model, "lora_A")
    assert theirs.keys() == one.keys() and all(torch.equal(theirs[name], down) for name, down in one.items())


def test_what_was_trained_is_what_the_adapter_says_to_us_and_to_peft(folder, tmp_path):
    resolved, model = started(folder)
    backbone = resolved.backbone
    trainables = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainables, 0.05)
    for _ in range(2):
        forward(model, backbone, merging.probe(backbone)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = merging.outputs(model.eval(), backbone, merging.probe(backbone))[0]
    resolved.train = resolved.validation = []
    export_adapter(tmp_path / "adapter", model, resolved, {})
    loaded = adapter.load(tmp_path / "adapter")
    assert torch.equal(merging.outputs(loaded.model, backbone, merging.probe(backbone))[0], trained)
    fresh = backbone.build()
    resolve.float32_heads(fresh)
    theirs = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(merging.outputs(theirs, backbone, merging.probe(backbone))[0], trained)


def test_directions_that_never_settle_end_in_one_line(folder, monkeypatch):
    monkeypatch.setattr(eva, "MOST_BATCHES", 2)
    with pytest.raises(BadInput, match="eva has not settled after 2 batches"):
        started(folder)


@pytest.mark.parametrize("named", ["lora", "peft"])
def test_the_ranks_of_a_checkpoint_are_taken_and_a_layer_of_none_is_taken_off(folder, named):
    _, trained = started(folder)
    state = {name: p.detach() for name, p in trained.named_parameters() if p.requires_grad}
    resolved, model = fresh(folder, named)
    resolved.method.restart(model, {name: list(tensor.shape) for name, tensor in state.items()})
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in found.items()} == {name: p.shape for name, p in state.items()}
    assert {p.dtype for p in found.values()} == {torch.float32}
    model.load_state_dict(state, strict=False)
    batch = merging.probe(resolved.backbone)
    outputs = [merging.outputs(m.eval(), resolved.backbone, batch)[0] for m in (model, trained)]
    assert torch.equal(*outputs)
    gone = next(name for name in state if ".lora_A." in name).partition(".lora_A.")[0]
    resolved, model = fresh(folder, named)
    resolved.method.restart(model, {n: list(t.shape) for n, t in state.items() if not n.startswith(f"{gone}.")})
    assert type(model.get_submodule(gone)) is torch.nn.Linear
    assert len(factors(model, "lora_A")) == len(factors(trained, "lora_A")) - 1


def fresh(folder: Path, named: str):
    if named == "lora":
        return made(folder)
    method = {"name": "peft", "type": "lora", "options": {"r": 3, "init_lora_weights": "eva"}}
    recipe = tiny_classifier.make_recipe(folder, method=method)
    resolved = tiny_classifier.make_resolved(recipes.filled(recipe), tiny_classifier.TinyTask())
    return resolved, resolve.attach(resolved, resolved.backbone.build())
