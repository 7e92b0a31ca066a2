"""A saved adapter fits the model or is refused, for every method: missing, renamed, foreign and reshaped tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmpeft_ds import methods
from mmpeft_ds.adapter_files import WEIGHTS
from mmpeft_ds.engine.assembly.saved_adapter import attach_saved
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.components import Section
from mmpeft_ds.recipe.parse import Origin
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.feature_site import calibrated_buffers
from tests.helpers.models import tiny_feature_model, tiny_prompted_encoder
from tests.helpers.models.tiny_zoo import ZOO

# options besides the defaults that bring further tensors: searched factors, trained keys, a probe that is solved
OPTIONS = {
    "hegraph": [{}, {"search": True}, {"learned": True}],
    "coop": [{"context": 4}],
    "tip_adapter": [{}, {"train_keys": True}],
    "linear_probe": [{}, {"solver": "gradient"}],
    "routed_lora": [{"route": "none"}, {"route": "none", "train_norms": True, "train_bias": True}],
    "lora": [{}, {"use_dora": True}, {"modules_to_save": ["pooler"]}, {"bias": "lora_only"}],
    "p_adapter": [{}, {"modules_to_save": ["pooler"]}],
}
CASES = [(name, options) for name in methods.names() for options in OPTIONS.get(name, [{}])]
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
    if name == "coop":
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
    assert not any(p.requires_grad for p in loaded.parameters())


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
