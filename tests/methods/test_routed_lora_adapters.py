"""The verbs of peft on routed LoRA: disable, switch, delete, merge, save, load."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file

from mmpeft_ds import RoutedLoraConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites.condition import Condition, conditioned
from tests.helpers import launch
from tests.helpers.models.tiny_stock import IDS, bert, fill, gpt2, image, output, wrap

EVERYTHING = {"train_bias": True, "train_norms": True}
BUILD = {"bert": bert, "gpt2": gpt2}


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("kind", ["none", "mul", "matmul1"])
def test_disabling_restores_the_frozen_output_to_the_bit(name, kind):
    model = BUILD[name]()
    before = output(model)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    wrapped = wrap(model, route=kind, **EVERYTHING)
    changed = output(wrapped)
    assert not torch.equal(changed, before)
    with wrapped.disable_adapter():
        assert torch.equal(output(wrapped), before)
    assert torch.equal(output(wrapped), changed)
    base = {n.replace(".base_layer", ""): p for n, p in wrapped.get_base_model().named_parameters()}
    assert all(torch.equal(base[n], p) for n, p in frozen.items()), "a base tensor changed"


def test_disabled_layers_need_no_condition():
    wrapped = wrap(bert())
    with pytest.raises(BadInput, match="none was published"):
        wrapped(IDS)
    with wrapped.disable_adapter():
        wrapped(IDS)


def test_two_adapters_switch_and_are_what_they_are_alone():
    first = {"route": "mul", "train_bias": True, "train_norms": True, "layers": [0]}
    second = {"route": "matmul1", "r": 8, "targets": ["k", "out"], "train_bias": True}
    alone = [output(fill(wrap(bert(), filled=False, **o), seed=s)) for s, o in ((3, first), (4, second))]

    wrapped = fill(wrap(bert(), filled=False, **first), seed=3)
    torch.manual_seed(7)  # as `wrap` does
    wrapped.add_adapter("other", RoutedLoraConfig(**{"alpha": 8, **second}))
    assert torch.equal(output(wrapped), alone[0]), "adding an adapter must not change the active one"
    wrapped.set_adapter("other")
    names = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert names and all(".other." in n for n in names)
    fill(wrapped, seed=4)
    assert torch.equal(output(wrapped), alone[1])
    wrapped.set_adapter("default")
    assert torch.equal(output(wrapped), alone[0])

    wrapped.delete_adapter("other")
    assert not any(".other" in n for n, _ in wrapped.named_parameters())
    assert torch.equal(output(wrapped), alone[0])
    with pytest.raises(ValueError):
        wrapped.set_adapter("other")


def test_unloading_gives_the_base_back():
    model = bert()
    before = output(model)
    assert torch.equal(output(wrap(model, **EVERYTHING).unload()), before)


@pytest.mark.parametrize("name", BUILD)
def test_plain_lora_merges_and_unmerges(name):
    wrapped = wrap(BUILD[name](), route="none", **EVERYTHING)
    kept = output(wrapped)
    with wrapped.disable_adapter():
        before = output(wrapped)
    wrapped.merge_adapter(safe_merge=True)
    torch.testing.assert_close(output(wrapped), kept, rtol=0, atol=1e-6)
    wrapped.unmerge_adapter()
    assert torch.equal(output(wrapped), kept)
    wrapped.merge_adapter()
    with wrapped.disable_adapter():
        assert torch.equal(output(wrapped), before)
    merged = wrapped.merge_and_unload()
    assert not any("routed_lora" in n for n, _ in merged.named_parameters())
    torch.testing.assert_close(output(merged), kept, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["mul", "matmul1"])
def test_merging_a_routed_adapter_is_refused(kind):
    wrapped = wrap(bert(), route=kind)
    kept = output(wrapped)
    for verb in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(BadInput, match="cannot be merged"):
            verb()
    assert torch.equal(output(wrapped), kept)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("variant", ["plain", "split_merge_ln"])
def test_saving_and_loading_is_equal_to_the_bit(tmp_path, name, variant):
    wrapped = wrap(BUILD[name](), route="matmul1", variant=variant, **EVERYTHING)
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("default" in n or "frozen_bias" in n or "base_layer" in n for n in saved)
    trained = {n.replace(".default", "") for n, p in wrapped.named_parameters() if p.requires_grad}
    assert set(saved) == trained
    again = peft.PeftModel.from_pretrained(BUILD[name](), tmp_path)
    assert torch.equal(output(again), output(wrapped))
    assert not any(p.requires_grad for p in again.parameters())
    lazy = peft.PeftModel.from_pretrained(BUILD[name](), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(output(lazy), output(wrapped))
    assert sum(p.requires_grad for p in lazy.parameters()) == len(saved)


def test_the_head_is_saved_beside_the_adapter(tmp_path):
    def pooled(model):
        with conditioned(Condition(image())):
            return model(IDS).pooler_output

    wrapped = wrap(bert(), modules_to_save=["pooler"])
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(pooled(again), pooled(wrapped))
    with wrapped.disable_adapter():
        with torch.no_grad():
            assert torch.equal(pooled(wrapped), pooled(bert()))


SCRIPT = """
import sys, torch, peft, mmpeft_ds
from tests.helpers.models.tiny_stock import bert, output
model = peft.PeftModel.from_pretrained(bert(), {adapter!r})
torch.save(output(model).detach(), {adapter!r} + "/out.pt")
assert "deepspeed" not in sys.modules, "importing mmpeft_ds imports deepspeed"
"""


def test_a_fresh_process_with_peft_and_mmpeft_ds_alone_gives_the_same_bits(tmp_path):
    wrapped = wrap(bert(), route="matmul1", **EVERYTHING)
    wrapped.save_pretrained(tmp_path)
    code = SCRIPT.format(adapter=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=launch.environment())
    assert torch.equal(torch.load(tmp_path / "out.pt"), output(wrapped))


def test_the_saved_config_is_the_given_one(tmp_path):
    wrap(bert(), route="add", layers=[1], pool="mean").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["route"], saved["layers"], saved["pool"]) == ("ROUTED_LORA", "add", [1], "mean")
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, RoutedLoraConfig) and loaded.route == "add"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"route": "mull"}, "route"),
        ({"targets": ["q", "w"]}, "targets"),
        ({"targets": []}, "at least one"),
        ({"targets": ["q", "q"]}, "each once"),
        ({"variant": "splitt"}, "variant"),
        ({"variant": "split", "r": 6}, "multiple of 4"),
        ({"variant": "split", "route": "none"}, "routed"),
        ({"r": 0}, "1 or more"),
        ({"dropout": 1.0}, "dropout"),
        ({"layers": [0, 7]}, "layers"),
        ({"layers": []}, "no layer"),
        ({"tower": "vision"}, "no tower"),
        ({"train_norms": ["*.nothing"]}, "matches no norm"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(options, says):
    with pytest.raises(BadInput, match=says) as refused:
        wrap(bert(), **options)
    assert "\n" not in str(refused.value)


def test_a_condition_of_another_width_is_refused_by_the_layer():
    wrapped = wrap(bert())
    with pytest.raises(BadInput, match="equal width"), conditioned(Condition(torch.zeros(2, 1, 8))):
        wrapped(IDS)
