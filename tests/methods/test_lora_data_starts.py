"""LoRA that starts from training data by covariances (CorDA) or gradients (LoRA-GA)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

from mmpeft_ds import adapter, merging
from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.batch import Sample
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import streams
from mmpeft_ds.engine.assembly import build, resolve
from mmpeft_ds.engine.assembly.build import start_data
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.engine.zero import fingerprint
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.layers import kept_buffers
from tests.helpers.runs import tiny_adapters, tiny_classifier

COUNT = 6
STARTS: dict[str, dict[str, Any]] = {
    "corda": {"init_lora_weights": "corda"},
    "corda kpm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "lora_ga alternating": {
        "init_lora_weights": "lora_ga",
        "lora_ga_config": {"direction": "ArBr", "scale": "gd_scale"},
    },
}
TASK = tiny_classifier.TinyTask()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data_starts")
    tiny_classifier.make_towers(path)
    return path


def made(folder: Path, named: str = "lora", dtype: str = "float32", **options):
    options = {"r": 3, "lora_alpha": 6, "start_batches": COUNT, **options}
    method = {"name": "lora", **options} if named == "lora" else {"name": "peft", "type": "lora", "options": options}
    recipe = tiny_classifier.make_recipe(folder, method=method, engine__dtype=dtype)
    recipes.components(recipe).method.options.check_training(dtype, 0)
    resolved = tiny_classifier.make_resolved(recipes.filled(recipe), TASK)
    torch.manual_seed(0)
    return resolved, resolve.attach(resolved, resolved.backbone.build())


def batches(backbone, single: bool = False):
    """One text each if `single`, since peft's hook for CorDA takes the rows of one sample alone."""
    for step in itertools.count():
        slots = tiny_classifier.global_slots(step % COUNT, backbone)
        if single:
            one = next(s for s in slots if s.texts)
            text = {"texts": one.texts[:1], "targets": one.targets[:1]}
            slots = [Sample(sample_id=one.sample_id, weight=1.0, images=one.images, **text)]
        yield tiny_classifier.pack_slots(slots, backbone, TASK)


def started(folder: Path, name: str, single: bool = False, **more):
    resolved, model = made(folder, **STARTS[name], **more)
    assert resolved.method.reads_batches(resolved.method_config)
    data = start_data(resolved, model, ((TASK, batch) for batch in batches(resolved.backbone, single)))
    resolved.method.start(model, data)
    return resolved, model


def said(model, backbone) -> torch.Tensor:
    return merging.outputs(model.eval(), backbone, merging.probe(backbone))[0]


def products(model) -> dict[str, torch.Tensor]:
    """scale * up_0 down_0 of each layer."""
    layers = {path: m for path, m in model.named_modules() if hasattr(m, "lora_A")}
    return {
        p: m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight for p, m in layers.items()
    }


def pefts(folder: Path, name: str):
    """The same start by peft's own preprocessing, which changes the base."""
    resolved, ours = made(folder, **STARTS[name])
    base, backbone = resolved.backbone.build(), resolved.backbone
    targets = {path.removeprefix("base_model.model.") for path in products(ours)}
    common = {"r": 3, "lora_alpha": 6, "target_modules": targets}
    given = list(itertools.islice(batches(backbone, single=True), COUNT))
    torch.manual_seed(0)
    if name.startswith("corda"):
        of_corda = CordaConfig(**STARTS[name].get("corda_config", {}))
        config = LoraConfig(init_lora_weights="corda", corda_config=of_corda, **common)
        preprocess_corda(base, config, run_model=lambda: [forward(base, backbone, batch) for batch in given])
    else:
        of_ga = LoraGAConfig(**STARTS[name].get("lora_ga_config", {}))
        config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=of_ga, **common)
        base.train = lambda mode=True: base  # there is dropout, which would draw other numbers

        def step() -> None:
            for batch in given:
                (TASK.loss(forward(base, backbone, batch), batch) / TASK.weight(batch)).backward()

        preprocess_loraga(base, config, step)
    return get_peft_model(base, config)


def exact_svd(matrix: torch.Tensor, q: int, niter: int = 2):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :q], s[:q], v[:q].T


@pytest.mark.parametrize("name", STARTS)
def test_the_start_is_pefts(folder, name, monkeypatch):
    # What peft calls draws numbers, on which the signs of vectors depend.
    monkeypatch.setattr(torch, "svd_lowrank", exact_svd)
    theirs, found = products(pefts(folder, name)), products(started(folder, name, single=True)[1])
    assert theirs.keys() == found.keys()
    for path, expected in theirs.items():
        assert expected.any()
        torch.testing.assert_close(found[path], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("named", ["lora", "peft"])
@pytest.mark.parametrize("name", STARTS)
def test_it_leaves_the_base_and_its_outputs_alone_and_is_the_same_each_time(folder, name, named):
    resolved, plain = made(folder, named, init_lora_weights=True, start_batches=16)
    _, model = started(folder, name, named=named)
    prints = [fingerprint.frozen_fingerprint(fingerprint.frozen_tensors(m)) for m in (plain, model)]
    assert prints[0] == prints[1]
    torch.testing.assert_close(said(model, resolved.backbone), said(plain, resolved.backbone), rtol=0, atol=1e-5)
    again = products(started(folder, name, named=named)[1])
    assert all(torch.equal(again[path], product) for path, product in products(model).items())
    assert all(p.requires_grad == ("lora_" in n or "modules_to_save" in n) for n, p in model.named_parameters())


def train(model, backbone, steps: int = 2) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(steps):
        forward(model, backbone, merging.probe(backbone)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["corda kpm", "lora_ga"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_trained_is_what_the_adapter_says_to_us_and_to_peft(folder, tmp_path, name, dtype):
    resolved, model = started(folder, name, dtype=dtype)
    backbone = resolved.backbone
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    fresh_outputs = said(model, backbone)
    train(model, backbone)
    trained = said(model, backbone)
    resolved.train = resolved.validation = []
    export_adapter(tmp_path / "adapter", model, resolved, {})
    loaded = adapter.load(tmp_path / "adapter")
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    torch.testing.assert_close(said(loaded.model, backbone), trained, rtol=0, atol=tolerance)
    base = backbone.build()
    resolve.float32_heads(base)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(said(theirs, backbone), trained, rtol=0, atol=tolerance)
    assert (trained - fresh_outputs).abs().max() > 5 * tolerance  # negative control


@pytest.mark.parametrize("name", ["corda", "lora_ga"])
def test_a_run_that_goes_on_finds_its_start_in_the_checkpoint_alone(folder, name):
    _, first = started(folder, name)
    resolved, second = made(folder, **STARTS[name])
    trained = {n: p for n, p in first.named_parameters() if p.requires_grad}
    resolved.method.restart(second, {n: list(p.shape) for n, p in trained.items()})
    assert any(not torch.equal(b, kept_buffers(second)[n]) for n, b in kept_buffers(first).items())  # control
    train(first, resolved.backbone)
    second.load_state_dict({n: p.detach() for n, p in trained.items()}, strict=False)
    for n, buffer in kept_buffers(first).items():
        kept_buffers(second)[n].copy_(buffer)
    assert torch.equal(said(first, resolved.backbone), said(second, resolved.backbone))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"init_lora_weights": "corda", "lora_ga_config": {"scale": "unit"}}, "lora_ga_config: is of .*lora_ga, not"),
        ({"init_lora_weights": "corda", "corda_config": {"cache_file": "x"}}, "corda_config: cache_file is not offer"),
        ({"init_lora_weights": "lora_ga", "use_dora": True}, "use_dora: does not go with init_lora_weights: lora_ga"),
        ({"init_lora_weights": "pissa", "start_batches": 3}, "start_batches: is of init_lora_weights: corda and"),
        ({"init_lora_weights": "corda", "start_batches": 0}, "start_batches: must be 1 or more"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "up"}}, "lora_ga_config.direction"),
        ({"init_lora_weights": "loftq"}, "loftq starts from what quantised weights have lost"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}}, "loftq_config: is not offered"),
        ({"init_lora_weights": "corda", "r": 40}, "r: 40 is more than the 16 singular values"),
        ({"init_lora_weights": "lora_ga", "r": 9}, "r: 9, and .* twice as many singular vectors, .* Use 8 or less"),
        ({"init_lora_weights": "corda", "lora_alpha": 0}, "lora_alpha: 0 leaves the low-rank term out"),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, "lora_alpha: 0 leaves the low-rank term out"),
        ({"init_lora_weights": "corda", "target_modules": ["word_embeddings"]}, r"cannot start at .* \(Embedding\)"),
        ({"init_lora_weights": "lora_ga", "target_modules": ["word_embeddings"]}, r"cannot start at .* \(Embedding\)"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": 0}}, "stable_gamma must be above 0"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": -4.0}}, "stable_gamma must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, options, told):
    with pytest.raises(BadInput, match=told) as refused:
        resolved, model = made(folder, **{"start_batches": 16, **options})
        data = start_data(resolved, model, ((TASK, batch) for batch in batches(resolved.backbone)))
        resolved.method.start(model, data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["corda", "lora_ga", "loftq"])
def test_stage_3_is_refused_with_the_reason(name):
    options = recipes.components(
        recipes.Recipe(run_dir="x", backbone={"name": "features"}, method={"name": "lora", "init_lora_weights": name})
    ).method.options
    with pytest.raises(BadInput, match=f"{name}' is not offered at ZeRO stage 3: it runs the model before DeepSpeed"):
        options.check_training("float32", 3)


def test_data_that_reaches_no_layer_ends_in_one_line(folder):
    resolved, model = made(folder, **STARTS["lora_ga"])
    with pytest.raises(BadInput, match="no batch at the beginning of the data reached"):
        resolved.method.start(model, start_data(resolved, model, iter(())))


def test_a_start_from_gradients_leaves_queue_steps_and_teacher_of_a_contrastive_loss_as_they_were(tmp_path):
    given = recipes.to_dict(tiny_adapters.recipe(tmp_path, "retrieval with blip"))
    given["backbone"] |= {"queue": 16, "momentum": 0.9}
    given["method"] = {"name": "lora", "r": 2, "init_lora_weights": "lora_ga", "start_batches": 2}
    resolved = resolve.resolve(recipes.from_dict(given))
    base = resolved.backbone.build()
    before = {name: tensor.clone() for name, tensor in base.training_state().items()}
    ranks, lost = Ranks(0, 1, 0, 1, torch.device("cpu")), []
    batches = list(itertools.islice(streams.first_batches(resolved, ranks), 2))

    def seen():
        for batch in batches:
            yield batch
            lost.append(base.queue.pointer)  # where the loss of this batch has left it

    model = build.adapted(resolved, base, seen)
    assert all(len(m.lora_A["default"].start.unique()) > 1 for m in model.modules() if hasattr(m, "lora_A"))
    after = base.training_state()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert lost and all(pointer == len(batches[0][1].sample_id) for pointer in lost)  # control: losses do move it
