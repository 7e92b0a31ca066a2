"""The verbs of peft on Aurora: disable, switch, delete, merge, save, load, copy."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from mmpeft_ds import AuroraConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.aurora.layer import Factors
from tests.helpers.models.tiny_aurora import answering, attach, blip, clip, fill, output


def factors(model):
    return [m for m in model.modules() if isinstance(m, Factors)]


@pytest.mark.parametrize("form", ["tucker", "cp"])
def test_disabling_restores_the_frozen_output_to_the_bit(form):
    model = blip()
    before = [output(model, m) for m in (True, False)]
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    wrapped = attach(model, form=form)
    changed = output(wrapped)
    assert not torch.equal(changed, before[0])
    with wrapped.disable_adapter():
        assert torch.equal(output(wrapped), before[0])
        assert torch.equal(output(wrapped, multimodal=False), before[1])
    assert torch.equal(output(wrapped), changed)
    base = {n.replace(".base_layer", ""): p for n, p in wrapped.get_base_model().named_parameters()}
    assert all(torch.equal(base[n], p) for n, p in frozen.items()), "a base tensor changed"


def test_two_adapters_switch_and_are_what_they_are_alone():
    first = {"layers": [0]}
    second = {"r": 3, "form": "cp", "gates": False, "image_targets": ["q", "fc2"], "text_targets": ["v", "out"]}
    alone = [output(fill(attach(blip(), filled=False, **o), seed=s)) for s, o in ((3, first), (4, second))]

    wrapped = fill(attach(blip(), filled=False, **first), seed=3)
    torch.manual_seed(7)  # as `attach` does
    wrapped.add_adapter("other", AuroraConfig(**{"r": 4, "dropout": 0.0, **second}))
    assert torch.equal(output(wrapped), alone[0]), "adding an adapter must not change the active one"
    assert len(factors(wrapped)) == 2
    wrapped.set_adapter("other")
    names = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert names and all(".other." in n for n in names)
    fill(wrapped, seed=4)
    assert torch.equal(output(wrapped), alone[1])
    wrapped.set_adapter("default")
    assert torch.equal(output(wrapped), alone[0])

    wrapped.delete_adapter("other")
    assert not any(".other" in n for n, _ in wrapped.named_parameters())
    assert len(factors(wrapped)) == 1
    assert torch.equal(output(wrapped), alone[0])
    with pytest.raises(ValueError):
        wrapped.set_adapter("other")


def test_deleting_the_first_adapter_leaves_the_second_whole():
    alone = output(fill(attach(blip(), filled=False, layers=[1]), seed=4))
    wrapped = attach(blip())
    torch.manual_seed(7)
    wrapped.add_adapter("other", AuroraConfig(r=4, dropout=0.0, layers=[1]))
    wrapped.set_adapter("other")
    fill(wrapped, seed=4)
    wrapped.delete_adapter("default")
    assert wrapped.active_adapters == ["other"]
    assert torch.equal(output(wrapped), alone)


def test_unloading_gives_the_base_back():
    model = blip()
    before = output(model)
    assert torch.equal(output(attach(model).unload()), before)


@pytest.mark.parametrize("form", ["tucker", "cp"])
@pytest.mark.parametrize("multimodal", [True, False])
def test_it_merges_with_its_gates_at_work_and_unmerges_to_the_bit(form, multimodal):
    wrapped = attach(blip(), form=form, text_targets=["q", "k", "v", "out", "fc1", "fc2"], scale=0.5)
    kept = output(wrapped, multimodal)
    with wrapped.disable_adapter():
        before = output(wrapped, multimodal)
    frozen = {n: p.clone() for n, p in wrapped.named_parameters() if "base_layer.weight" in n and "orm" not in n}
    wrapped.merge_adapter(safe_merge=True)
    torch.testing.assert_close(output(wrapped, multimodal), kept, rtol=0, atol=3e-6)
    assert not any(torch.equal(wrapped.get_parameter(n), p) for n, p in frozen.items()), "a map was not merged"
    wrapped.unmerge_adapter()
    assert torch.equal(output(wrapped, multimodal), kept)
    wrapped.merge_adapter()
    with wrapped.disable_adapter():
        assert torch.equal(output(wrapped, multimodal), before)
    assert torch.equal(output(wrapped, multimodal), kept)


def test_merging_is_exact():
    wrapped = attach(blip().double())
    kept = output(wrapped)
    wrapped.merge_adapter()
    torch.testing.assert_close(output(wrapped), kept, rtol=0, atol=1e-12)


def test_gates_cannot_leave_with_the_adapter():
    wrapped = attach(blip())
    kept = output(wrapped)
    with pytest.raises(BadInput, match="gates"):
        wrapped.merge_and_unload()
    assert torch.equal(output(wrapped), kept)
    plain = attach(blip(), gates=False)
    kept = output(plain)
    merged = plain.merge_and_unload()
    assert not any("aurora" in n for n, _ in merged.named_modules())
    torch.testing.assert_close(output(merged), kept, rtol=0, atol=3e-6)


@pytest.mark.parametrize("build", [blip, answering, clip])
@pytest.mark.parametrize("form", ["tucker", "cp"])
def test_saving_and_loading_is_equal_to_the_bit(tmp_path, build, form):
    def run(model):
        base = model.get_base_model()
        return base.text_model(torch.tensor([[5, 6, 2]]))[0] if build is clip else output(model)

    wrapped = attach(build(), form=form)
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = {n.replace(".default", ""): p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert set(saved) == set(trained)
    assert sum(n.endswith(".core") for n in saved) == 1, "what is shared is written once"
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in trained.values())
    again = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(run(again), run(wrapped))
    assert not any(p.requires_grad for p in again.parameters())
    lazy = peft.PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(run(lazy), run(wrapped))
    assert sum(p.requires_grad for p in lazy.parameters()) == len(saved)


def test_an_adapter_loads_beside_another(tmp_path):
    first, second = attach(blip()), fill(attach(blip(), filled=False, layers=[1]), seed=5)
    second.save_pretrained(tmp_path)
    first.load_adapter(str(tmp_path), "second")
    kept = output(first)
    first.set_adapter("second")
    assert torch.equal(output(first), output(second))
    first.set_adapter("default")
    assert torch.equal(output(first), kept)


def test_a_deep_copy_stands_on_its_own():
    wrapped = attach(blip())
    before = output(wrapped)
    twin = copy.deepcopy(wrapped)
    fill(wrapped, seed=9)
    assert torch.equal(output(twin), before)
    assert not torch.equal(output(wrapped), before)


def test_the_saved_config_is_the_given_one(tmp_path):
    attach(blip(), form="cp", layers=[1], gates=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["form"], saved["layers"]) == ("AURORA", "cp", [1])
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, AuroraConfig) and loaded.gates is False
