"""Corners of peft and torch that people reach with a model of their own: each ends in a sentence, not in internals."""

import warnings

import peft
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

import mmpeft_ds
from mmpeft_ds import methods
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites.condition import Condition, conditioned
from tests.helpers import plain_methods
from tests.helpers.models import tiny_feature_model

CONFIGS = ["RoutedLoraConfig", "PAdapterConfig", "BitFitConfig"]


SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def bert() -> BertModel:
    return BertModel(BertConfig(vocab_size=9, **SIZES))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mixed_model_is_refused_in_pefts_own_words(name):
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(bert(), getattr(mmpeft_ds, name)(), mixed=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_weighted_sum_of_adapters_is_refused_with_what_to_do(name):
    config = getattr(mmpeft_ds, name)
    model = peft.get_peft_model(bert(), config())
    model.add_adapter("b", config())
    with pytest.raises(BadInput, match="set_adapter"):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c")


def test_merging_looks_at_the_adapters_that_are_named_and_not_only_at_the_active_one():
    model = peft.get_peft_model(bert(), mmpeft_ds.RoutedLoraConfig(r=2, route="none"))
    model.add_adapter("routed", mmpeft_ds.RoutedLoraConfig(r=2, route="mul"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for verb in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(BadInput, match="'routed' cannot be merged: it routes by 'mul'"):
            verb(adapter_names=["default", "routed"])
        with pytest.raises(BadInput, match="no adapter 'other'. Known: default, routed"):
            verb(adapter_names=["other"])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.set_adapter("routed")
    assert not hasattr(model.merge_and_unload(adapter_names=["default"]), "peft_config")


@pytest.mark.parametrize("taken", ["layer", "0", "weight", "a.b"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_named_as_a_part_of_the_model_is_refused(name, taken):
    """peft writes an empty file for every other adapter of the model."""
    config = getattr(mmpeft_ds, name)
    with pytest.raises(BadInput, match=f"adapter_name: '{taken}' .* Choose another"):
        peft.get_peft_model(bert(), config(), adapter_name=taken)
    model = peft.get_peft_model(bert(), config(), adapter_name="german")
    with pytest.raises(BadInput, match=f"adapter_name: '{taken}' "):
        model.add_adapter(taken, config())
    assert list(model.peft_config) == ["german"]


def test_stock_peft_loses_the_other_adapters_of_such_a_name():
    """A fact about peft: the check above may go when this fails."""
    config = peft.LoraConfig(target_modules=["query"])
    model = peft.get_peft_model(bert(), config, adapter_name="layer")
    model.add_adapter("second", config)
    assert not peft.get_peft_model_state_dict(model, adapter_name="second")


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_for_each_row_is_refused_where_peft_would_run_the_active_one_for_all(name):
    config = getattr(mmpeft_ds, name)
    model = peft.get_peft_model(bert(), config()).eval()
    model.add_adapter("b", config())
    with pytest.raises(BadInput, match=r"adapter_names: .* set_adapter\(name\)"):
        model(input_ids=torch.ones(2, 3, dtype=torch.long), adapter_names=["default", "b"])


@pytest.mark.parametrize("name", CONFIGS)
def test_casting_an_attached_model_to_half_precision_warns_and_says_the_order(name):
    """p and m of p_adapter, and every small update, need float32."""
    config = getattr(mmpeft_ds, name)
    model = peft.get_peft_model(bert(), config())
    with pytest.warns(UserWarning, match=r"base\.to\(torch\.bfloat16\), then peft\.get_peft_model"):
        model.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.get_peft_model(bert().to(torch.bfloat16), config())
        model.to("cpu")
        model.float()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_head_on_a_model_without_features_is_told_where_it_belongs_without_a_recipe():
    with pytest.raises(BadInput, match="FeatureModel"):
        peft.get_peft_model(bert(), mmpeft_ds.GaNetConfig())
    assert peft.get_peft_model(tiny_feature_model.model(), mmpeft_ds.TaskResConfig())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_whole_module_that_the_model_does_not_have_is_refused(name):
    """Stock peft trains nothing there and says nothing."""
    config = getattr(mmpeft_ds, name)
    with pytest.raises(BadInput, match=r"modules_to_save: .*'poolr'.* Did you mean 'pooler'"):
        peft.get_peft_model(bert(), config(modules_to_save=["poolr"]))
    model = peft.get_peft_model(bert(), config(modules_to_save=["pooler"]))
    assert any("modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)
    model.add_adapter("b", config(modules_to_save=["pooler"]))


def test_names_that_peft_adds_for_a_task_type_need_not_all_be_there():
    base = BertForSequenceClassification(BertConfig(vocab_size=9, **SIZES))
    model = peft.get_peft_model(base, mmpeft_ds.BitFitConfig(task_type="SEQ_CLS"))
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]


@pytest.mark.parametrize("name", [*CONFIGS, "AuroraConfig"])
def test_a_model_of_an_unknown_family_is_refused_with_those_that_are_known(name):
    with pytest.raises(BadInput, match="Known: .*bert.*vit.*docs/extending.md"):
        peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), getattr(mmpeft_ds, name)())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tokens": torch.zeros(2, 32)}, r"tokens=.*\(2, 32\).*conditioning tokens, width.*unsqueeze\(1\)"),
        ({"mask": torch.zeros(2)}, r"mask=.*\(2,\)"),
        ({"tokens": torch.zeros(2, 3, 4), "mask": torch.zeros(2, 4)}, r"mask of shape \(2, 4\).*expected \(2, 3\)"),
        ({"encoder": torch.zeros(2, 3, 4), "encoder_mask": torch.zeros(3, 3)}, r"expected \(2, 3\)"),
    ],
)
def test_a_condition_of_the_wrong_shape_is_refused_where_it_is_made(given, says):
    with pytest.raises(ValueError, match=says):
        Condition(**given)


@pytest.mark.parametrize("given", [{"tokens": [[[1.0]]]}, {"tokens": "image"}, {"kinds": torch.zeros(2, 3).numpy()}])
def test_a_condition_that_is_no_tensor_is_refused_where_it_is_made(given):
    with pytest.raises(TypeError, match=rf"Condition\({next(iter(given))}=...\): expected a tensor, got a"):
        Condition(**given)


def test_a_bare_tensor_is_no_condition():
    with pytest.raises(TypeError, match=r"expected a Condition, got a Tensor: Condition\(tokens=x\)"):
        with conditioned(torch.zeros(2, 1, 16)):
            pass


def test_every_method_of_ours_has_a_type_that_peft_can_name():
    names = [name for name in plain_methods.names() if name not in ("lora", "ia3")]
    assert names
    for name in names:
        kind = methods.get(name).Config().peft_type
        assert kind == kind.value == str(kind)
