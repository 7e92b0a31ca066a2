"""A saved adapter fits the model or is refused, for every method; names of older layouts are read, damage is named."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmpeft_ds import backbones, methods, registry
from mmpeft_ds.adapter_files import CONFIG, WEIGHTS
from mmpeft_ds.engine.assembly import saved_adapter
from mmpeft_ds.engine.assembly.saved_adapter import attach_saved
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.components import Section
from mmpeft_ds.recipe.parse import Origin
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.feature_site import calibrated_buffers
from tests.helpers import plain_methods
from tests.helpers.models import tiny_feature_model, tiny_mllm, tiny_prompted_encoder
from tests.helpers.models.tiny_zoo import ZOO

# options besides the defaults that bring further tensors: searched factors, trained keys, a probe that is solved
OPTIONS = {
    "hegraph": [{}, {"search": True}, {"learned": True}],
    "coop": [{"context": 4}],
    "mmrl": [{"first_layer": 2, "width": 4}],
    "tip_adapter": [{}, {"train_keys": True}],
    "linear_probe": [{}, {"solver": "gradient"}],
    "routed_lora": [{"route": "none"}, {"route": "none", "train_norms": True, "train_bias": True}],
    "lora": [{}, {"use_dora": True}, {"modules_to_save": ["pooler"]}, {"bias": "lora_only"}],
    "p_adapter": [{}, {"modules_to_save": ["pooler"]}],
}
# `moka` attaches to no encoder; tests/methods/test_method_verbs.py saves and loads it
CASES = [(name, o) for name in plain_methods.names() if name != "moka" for o in OPTIONS.get(name, [{}])]
CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (lambda w: dict(list(w.items())[1:]), "1 of the {n} tensors that this model trains are missing"),
    "renamed": (lambda w: {k.replace("base_model.model.", "base_model.model.x."): v for k, v in w.items()}, "missing"),
    "reshaped": (lambda w: {k: torch.cat([v.reshape(-1), v.reshape(-1)]) for k, v in w.items()}, "another shape"),
    "foreign": (lambda w: w | {"base_model.model.x": torch.zeros(1)}, "belong to nothing here"),
}


@pytest.fixture(scope="module")
def prompted(tmp_path_factory) -> nn.Module:
    section = tiny_prompted_encoder.write(tmp_path_factory.mktemp("prompted"), "bert")
    return tiny_prompted_encoder.model(section)


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *case[1]]))
def saved(request, prompted, tmp_path) -> tuple[Path, Section, nn.Module, dict[str, Tensor]]:
    """An adapter that is not at its initial values: its directory, its method, a fresh base, and its tensors."""
    name, options = request.param
    if name in ("coop", "mmrl"):
        base = copy.deepcopy(prompted)
    else:
        base = tiny_feature_model.model() if methods.options(name).scores_features else ZOO["bert"].build()
    section = Section.read(methods, {"name": name, **options}, "method", Origin())
    method, fresh = section.entry, copy.deepcopy(base)
    config = method.prepare(method.config(section.options, section.origin), base, find_sites(base))
    model = peft.get_peft_model(base, config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad} | calibrated_buffers(model)
    with torch.no_grad():
        for tensor in trained.values():
            tensor.add_(torch.ones_like(tensor))
    trained = {n: t.detach().clone() for n, t in trained.items()}
    model.save_pretrained(tmp_path / "adapter", state_dict=dict(trained), save_embedding_layers=False)
    return tmp_path / "adapter", section, fresh, trained


def test_an_adapter_loads_to_the_bit(saved):
    directory, section, base, trained = saved
    loaded = attach_saved(directory, base, section)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} <= trained.keys()


@pytest.mark.parametrize("saved", [("lora", {})], indirect=True, ids=["lora"])
@pytest.mark.parametrize("renames", [("peft.utils.gone", "x"), (saved_adapter.RENAMES[0], "gone")])
def test_a_peft_that_gives_no_other_names_is_as_good(saved, monkeypatch, renames):
    monkeypatch.setattr(saved_adapter, "RENAMES", renames)
    test_an_adapter_loads_to_the_bit(saved)


def test_an_adapter_that_does_not_fit_is_refused(saved):
    directory, section, base, trained = saved
    whole = load_file(directory / WEIGHTS)
    for change, (make, message) in CHANGES.items():
        if not trained and change != "foreign":
            continue
        save_file({k: v.clone() for k, v in make(whole).items()}, directory / WEIGHTS)
        with pytest.raises(BadInput, match=message.format(n=len(trained))) as refused:
            attach_saved(directory, copy.deepcopy(base), section)
        assert "\n" not in str(refused.value)
        if section.entry.Tuner is not None:  # of ours; stock peft refuses no file of its own methods
            whose = message.format(n=len(trained)) + "|pooler"  # a whole module is missed by peft itself
            with pytest.raises((BadInput, KeyError), match=whose):
                peft.PeftModel.from_pretrained(copy.deepcopy(base), directory)


def scaled(tmp_path: Path, **options: object) -> tuple[Path, Section, nn.Module, PeftModel]:
    """A LoRA whose layers have scales of their own, as a run saves it: directory, method, a fresh base, model."""
    base = ZOO["bert"].build()
    section = Section.read(methods, {"name": "lora", "r": 4, "lora_alpha": 6, **options}, "method", Origin())
    method = section.entry
    config = method.prepare(method.config(section.options, section.origin), base, find_sites(base))
    model = method.attach(config, copy.deepcopy(base))
    if options["init_lora_weights"] == "eva":
        layers = [n for n, p in model.named_parameters() if ".lora_A." in n]
        method.restart(model, {name: (3 + number % 3, 16) for number, name in enumerate(layers)})
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    saved = method.saved_tensors(model, trained)
    model.save_pretrained(tmp_path / "adapter", state_dict=dict(saved), save_embedding_layers=False)
    written = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(written | method.saved_fields(config)))
    return tmp_path / "adapter", section, base, model


OWN_SCALES = {
    "eva": {"init_lora_weights": "eva"},
    "eva without": {"init_lora_weights": "eva", "eva_config": {"adjust_scaling_factors": False}},
    "pissa": {"init_lora_weights": "pissa", "alpha_pattern": {"query": 3.0}, "use_rslora": True},
    "recipe": {"init_lora_weights": True, "alpha_pattern": {"query": 3}},
}


@pytest.mark.parametrize("options", OWN_SCALES.values(), ids=OWN_SCALES)
def test_scales_of_single_layers_are_those_of_the_run_or_are_refused(tmp_path, options):
    directory, section, base, model = scaled(tmp_path, **options)
    loaded = attach_saved(directory, copy.deepcopy(base), section)
    expected, scales = (
        {name: layer.scaling["default"] for name, layer in made.named_modules() if isinstance(layer, LoraLayer)}
        for made in (model, loaded)
    )
    assert scales == pytest.approx(expected) and scales
    right = json.loads((directory / CONFIG).read_text())["alpha_pattern"]
    assert right or options.get("eva_config"), "the case has scales of its own"
    twice = {name: 2 * alpha for name, alpha in right.items()}
    for wrong in ({}, twice, right | {"value": 1}, right | {"value": "1"}):
        if wrong == right:
            continue
        edited(alpha_pattern=wrong)(directory)
        with pytest.raises(BadInput, match="alpha_pattern is .* in the recipe beside it"):
            attach_saved(directory, copy.deepcopy(base), section)


def test_other_tokens_than_those_that_were_trained_are_refused(tmp_path):
    directory, section, base, _ = scaled(tmp_path, init_lora_weights=True, trainable_token_indices=[1, 2])
    attach_saved(directory, copy.deepcopy(base), section)
    edited(trainable_token_indices=[1, 3])(directory)
    with pytest.raises(BadInput, match=r"trainable_token_indices is \[1, 3\], but \[1, 2\] in the recipe"):
        attach_saved(directory, copy.deepcopy(base), section)


# Names of modules before transformers 4.52, by those of today.
BEFORE_4_52 = {
    "llava": {
        "model.language_model.layers": "language_model.model.layers",
        "model.vision_tower.encoder": "vision_tower.vision_model.encoder",
    },
    "qwen2_vl": {"model.language_model.layers": "model.layers", "model.visual.blocks": "visual.blocks"},
}


@pytest.fixture(scope="module", params=BEFORE_4_52)
def language_model(request, tmp_path_factory) -> tuple[Path, Section, nn.Module, str]:
    """A LoRA of both towers of a multimodal language model, its method, a fresh base, and the family."""
    folder = tmp_path_factory.mktemp(request.param)
    entry = registry.load(backbones, "mllm", "backbone.name")
    base = entry(entry.Options(tiny_mllm.write(folder / "base", request.param)), None).build()
    paths = [s.q.path for s in find_sites(base).attention if s.layer < 2]
    section = Section.read(methods, {"name": "lora", "target_modules": paths}, "method", Origin())
    method = section.entry
    model = peft.get_peft_model(copy.deepcopy(base), method.config(section.options, section.origin))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter", section, base, request.param


def old(name: str, family: str) -> str:
    for now, then in BEFORE_4_52[family].items():
        name = name.replace(now, then)
    return name


def test_an_adapter_from_before_transformers_4_52_is_read_under_the_present_names(language_model, tmp_path, caplog):
    directory, section, base, family = language_model
    right = load_file(directory / WEIGHTS)
    copied = Path(shutil.copytree(directory, tmp_path / "old"))
    renamed = {old(name, family): tensor for name, tensor in right.items()}
    assert not renamed.keys() & right.keys()
    save_file(renamed, copied / WEIGHTS)
    config = json.loads((copied / CONFIG).read_text())
    config["target_modules"] = [old(name, family) for name in config["target_modules"]]
    (copied / CONFIG).write_text(json.dumps(config))
    loaded = attach_saved(copied, copy.deepcopy(base), section)
    state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert state.keys() == right.keys() and all(torch.equal(state[name], right[name]) for name in right)
    assert [record.getMessage() for record in caplog.records if "is read as" in record.getMessage()]


@pytest.mark.parametrize(
    "as_there", [lambda n: n.replace(".weight", ".default.weight"), lambda n: n.removeprefix("base_model.model.")]
)
def test_a_plain_state_dict_is_read_under_the_names_of_peft(language_model, tmp_path, as_there):
    directory, section, base, _ = language_model
    right = load_file(directory / WEIGHTS)
    copied = Path(shutil.copytree(directory, tmp_path / "plain"))
    save_file({as_there(name): tensor for name, tensor in right.items()}, copied / WEIGHTS)
    loaded = attach_saved(copied, copy.deepcopy(base), section)
    state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert state.keys() == right.keys() and all(torch.equal(state[name], right[name]) for name in right)


def edited(**values: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(config | values))

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut configuration": (lambda d: (d / CONFIG).write_bytes((d / CONFIG).read_bytes()[:200]), "cannot be read"),
    "no configuration": (lambda d: (d / CONFIG).write_text("[]"), "holds a list"),
    "unknown type": (edited(peft_type="WONDER"), "peft_type is 'WONDER'"),
    "another method": (edited(peft_type="IA3"), "peft_type is 'IA3'"),
    "absurd rank": (edited(r=10**9), "r is 1000000000, but 8 in the recipe"),
    "another scale": (edited(lora_alpha=64), "lora_alpha is 64, but 8"),
    "scales of some": (edited(alpha_pattern={"q_proj": 64, "qkv": 64}), "alpha_pattern is .* but {} in the recipe"),
    "scales of another type": (edited(alpha_pattern=[1]), r"alpha_pattern is \[1\], but {} in the recipe"),
    "ranks of some": (edited(rank_pattern={"q_proj": 3, "qkv": 3}), "another shape"),
    "other modules": (edited(target_modules=["lm_head"]), "does not fit"),
    "no such modules": (edited(target_modules=["nowhere"]), "cannot be attached"),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), "cannot be read"),
    "cut weights": (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-9]), "cannot be read"),
    "pickle": (lambda d: torch.save({"x": torch.zeros(2)}, d / WEIGHTS), "cannot be read"),
    "no tensors": (lambda d: save_file({}, d / WEIGHTS), "are missing"),
    "integers": (lambda d: changed(d, torch.Tensor.long), "holds torch.int64"),
    "not a number": (lambda d: changed(d, lambda t: t * float("nan")), "not finite"),
}


def changed(directory: Path, change: Callable[[Tensor], Tensor]) -> None:
    save_file({n: change(t) for n, t in load_file(directory / WEIGHTS).items()}, directory / WEIGHTS)


@pytest.mark.parametrize("language_model", ["llava"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_one_line(language_model, tmp_path, damage):
    directory, section, base, _ = language_model
    copied = Path(shutil.copytree(directory, tmp_path / "damaged"))
    damaging, message = DAMAGE[damage]
    damaging(copied)
    with pytest.raises(BadInput, match=message) as refused:
        attach_saved(copied, copy.deepcopy(base), section)
    assert "\n" not in str(refused.value) and str(copied) in str(refused.value)
