"""Every method against its base classes: options, config, and hooks that the base documents."""

import dataclasses
import json
import typing

import peft
import pytest

import mmpeft_ds
from mmpeft_ds import methods
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import KINDS, MethodOptions, SiteMethod
from mmpeft_ds.methods.common.bottleneck import FUNCTIONS
from mmpeft_ds.methods.common.head import Head, HeadMethod
from mmpeft_ds.methods.common.options import ACTIVATIONS, HeadOptions, Route
from mmpeft_ds.ops.route import ROUTES
from mmpeft_ds.recipe import Origin, Section
from tests.helpers import plain_methods

PEFTS_OWN = ["ia3", "lora"]
OURS = [name for name in plain_methods.names() if name not in PEFTS_OWN]


def own_fields(config: type) -> dict[str, dataclasses.Field]:
    inherited = {f.name for f in dataclasses.fields(peft.PeftConfig)}
    return {f.name: f for f in dataclasses.fields(config) if f.name not in inherited}


@pytest.mark.parametrize("name", methods.names())
def test_an_entry_has_its_options_and_no_hook_that_the_base_does_not_document(name):
    method, options = methods.get(name), methods.options(name)
    assert issubclass(method, SiteMethod) and issubclass(options, MethodOptions)
    assert method.Options is options and options.__name__.removesuffix("Options") + "Config" == method.Config.__name__
    assert options.scores_features == issubclass(method, HeadMethod) == issubclass(options, HeadOptions)
    own = {hook for hook in vars(method) if not hook.startswith("_")}
    assert own <= {*dir(SiteMethod), *SiteMethod.__annotations__}
    assert all(getattr(SiteMethod, hook).__doc__ for hook in own if callable(getattr(SiteMethod, hook, None)))


def test_the_check_of_hooks_sees_one_that_is_not_documented():
    class Stray(SiteMethod):
        def unheard_of(self):
            pass

    assert not set(vars(Stray)) & {"unheard_of"} <= {*dir(SiteMethod)}


@pytest.mark.parametrize("name", methods.names())
def test_every_option_has_its_help_and_every_hook_of_a_head_comes_from_the_base(name):
    options = methods.options(name)
    assert [n for n, f in options.own_fields().items() if not f.metadata.get("help")] == []
    tuner = methods.get(name).Tuner
    if head := getattr(tuner, "head_class", None):
        assert issubclass(head, Head)


@pytest.mark.parametrize("name", OURS)
def test_a_config_is_its_options_and_the_fields_of_peft(name):
    method = methods.get(name)
    options, config = method.Options(), method.Config()
    assert issubclass(method.Config, method.Options)
    assert set(own_fields(method.Config)) == set(method.Options.own_fields()) == set(vars(options))
    assert all(getattr(config, field) == value for field, value in vars(options).items())
    assert config.peft_type == method.peft_type and str(config.peft_type) in peft.PEFT_TYPE_TO_CONFIG_MAPPING
    assert method.config(options, Origin()) == config


@pytest.mark.parametrize("name", PEFTS_OWN)
def test_options_of_a_method_of_peft_are_its_fields_with_its_defaults(name):
    method = methods.get(name)
    added = {"start_batches"} if name == "lora" else set()  # how much data is read belongs to no adapter
    theirs, ours = own_fields(method.Config), method.Options.own_fields().keys() - added
    assert set(theirs) == set(ours), "this release of peft has other fields"
    given, config = method.Options(), method.Config()
    for field in sorted(set(ours) - {"runtime_config"}):  # theirs is an object, ours its mapping
        assert getattr(given, field) == getattr(config, field), field
    assert method.config(given, Origin()) == config


def test_options_of_peft_that_are_objects_are_given_as_mappings():
    given = {"name": "lora", "r": 4, "init_lora_weights": "eva", "eva_config": {"rho": 3.0}, "rank_pattern": {"q": 2}}
    section = Section.read(methods, given, "method", Origin("r.yaml"))
    config = section.entry.config(section.options, section.origin)
    assert isinstance(config.eva_config, peft.EvaConfig) and config.eva_config.rho == 3.0
    assert (config.r, config.rank_pattern, config.lora_alpha) == (4, {"q": 2}, 8)
    section = Section.read(methods, {**given, "eva_config": {"rho": "high"}}, "method", Origin("r.yaml"))
    with pytest.raises(BadInput, match="r.yaml: method"):
        section.entry.config(section.options, section.origin)


@pytest.mark.parametrize(
    ("keyword", "words"),
    [
        ("target_modules", ["RoutedLoraConfig", "'target_modules'", "chosen by 'targets'"]),
        ("lora_alpha", ["Did you mean 'alpha'"]),
        ("xyz", ["Known: ", "tower, layers, r, route"]),
        ("PEFT_TYPE", ["unexpected"]),
    ],
)
def test_a_keyword_that_a_config_does_not_have_is_refused_with_the_right_one(keyword, words):
    for kind in (BadInput, TypeError):  # whoever knows peft expects the one, our commands the other
        with pytest.raises(kind) as refused:
            mmpeft_ds.RoutedLoraConfig(**{keyword: ["q"]})
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)


def test_a_config_file_of_a_newer_version_still_loads(tmp_path):
    mmpeft_ds.PAdapterConfig(r=4).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_next_year": 1}))
    with pytest.warns(UserWarning, match="of_next_year"):
        assert peft.PeftConfig.from_pretrained(tmp_path) == mmpeft_ds.PAdapterConfig(r=4)


def test_names_in_options_are_those_of_the_numerics():
    assert typing.get_args(Route) == ROUTES and tuple(FUNCTIONS) == ACTIVATIONS


def test_hooks_have_the_defaults_that_the_base_documents():
    options = methods.options("lora")()
    assert not (options.couples_samples or options.gradient_free or options.needs_validation or options.reads_captions)
    lora = methods.get("lora")
    assert (
        lora.unmergeable(lora.Config()) is None and not lora.decays(lora.Config(), "x") and lora.bank_parts(None) == ()
    )
    assert set(lora.kinds(["a.lora_A.default.weight", "a.modules_to_save.default.bias", "b.base_layer.bias"])) == {
        *KINDS
    }
    assert lora.kinds(["a.lora_A.default.weight"])["peft"] and lora.kinds(["q.base_layer.bias"])["bias"]
    assert lora.kinds(["head.modules_to_save.default.lora_A.weight"])["head"]
