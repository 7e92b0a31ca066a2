"""A run that starts from an adapter of HF Trainer with peft, or of ms-swift: what is read, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from mmpeft_ds import methods
from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import plan
from mmpeft_ds.engine.assembly import resolve, start_from
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.engine.study import plan as study_plan
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.components import Section
from mmpeft_ds.recipe.parse import Origin
from mmpeft_ds.recipe.study import Study
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.feature_site import calibrated_buffers
from tests.helpers import foreign_adapters, peft_alone
from tests.helpers.models import tiny_feature_model, tiny_prompted_encoder
from tests.helpers.models.tiny_stock import fill
from tests.helpers.runs import tiny_talk, tiny_vqa

METHOD = "method={name: lora, r: 2, lora_alpha: 4}"
INPUTS = {"input_ids": torch.tensor([[5, 3, 6, 7, 5, 4], [9, 4, 5, 3, 2, 8]])}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """FOLDER/trainer and FOLDER/swift, made by other programs."""
    path = tmp_path_factory.mktemp("foreign")
    tiny_talk.write(path)
    foreign_adapters.make(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """FOLDER/trainer/checkpoint-3 as stock peft writes it, in this process."""
    path = tmp_path_factory.mktemp("made")
    tiny_talk.write(path)
    stock = Qwen2VLForConditionalGeneration.from_pretrained(path / "model")
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(stock, config).save_pretrained(path / "trainer" / "checkpoint-3")
    return path


def resolved_with(folder: Path, adapter: Path, *changes: str):
    recipe = recipes.load(tiny_talk.recipe(folder, "run"), [METHOD, f"start_from={adapter}", *changes])
    return resolve.resolve(recipe)


def read(folder: Path, adapter: Path, *changes: str, whole: bool = False):
    resolved = resolved_with(folder, adapter, *changes)
    with torch.device("cpu" if whole else "meta"):
        model = resolve.attach(resolved, resolved.backbone.build(on_meta=not whole)).eval()
    return model, start_from.read(resolved, model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "swift"])
def test_the_weights_are_those_of_the_directory_and_the_model_says_what_stock_peft_says(trained, tmp_path, kind):
    adapter = trained / kind / "checkpoint-3"
    model, values = read(trained, adapter, whole=True)
    assert values.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    written = load_file(adapter / "adapter_model.safetensors")
    assert len(values) == len(written) and all(
        torch.equal(values[name.replace(".weight", ".default.weight")], tensor) for name, tensor in written.items()
    )
    stock = Qwen2VLForConditionalGeneration.from_pretrained(trained / "model").eval()
    peft_alone.write_base(tmp_path, "qwen", stock, INPUTS)
    shutil.copytree(adapter, tmp_path / "lora-qwen-foreign")
    expected = peft_alone.ask(tmp_path)["qwen-foreign"]

    @torch.no_grad()
    def said() -> torch.Tensor:
        return Qwen2VLForConditionalGeneration.forward(model.get_base_model(), **INPUTS).logits

    before = said()
    model.load_state_dict(values, strict=False)
    torch.testing.assert_close(said(), expected, rtol=0, atol=1e-5)
    assert (before - expected).abs().max() > 1e-2  # negative control


def test_a_check_without_weights_reads_it_too(folder):
    adapter = folder / "trainer" / "checkpoint-3"
    plan.make(resolved_with(folder, adapter))
    with pytest.raises(BadInput, match="start_from: .* does not fit this recipe"):
        plan.make(resolved_with(folder, adapter, "method.r=3", "method.lora_alpha=6"))


def test_a_check_refuses_names_that_fit_nothing_before_a_new_run_alone_also_of_a_study(folder, tmp_path):
    recipe = tiny_talk.recipe(folder, "run")
    lora = "method={name: lora, r: 2, target_modules: [q_proj, v_prj]}"
    changes = [lora, f"run_dir={tmp_path / 'run'}", "engine.deepspeed=ds_configs/zero1.json"]
    single = resolve.resolve(recipes.load(recipe, changes))
    study = Study.load(recipe, changes, ["optim.lr=0.01,0.02"])
    for check in (lambda: plan.make(single), lambda: study_plan.make(study)):
        with pytest.raises(BadInput, match="method.target_modules: 'v_prj' fits no module. Did you mean 'v_proj'"):
            check()
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    plan.on_meta(single)
    gone = resolve.resolve(recipes.load(recipe, [*changes, f"start_from={tmp_path / 'gone'}"]))
    plan.on_meta(gone)  # which a run reads once, when it begins


def changed(folder: Path, tmp_path: Path, **fields) -> Path:
    """A copy of the Trainer's adapter with other fields in its configuration."""
    copy = shutil.copytree(folder / "trainer" / "checkpoint-3", tmp_path / "changed")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | fields))
    return copy


@pytest.mark.parametrize(
    ("fields", "changes", "told"),
    [
        ({}, ["method.lora_alpha=8"], r"scaled by 2 \(lora_alpha 4, r 2\), and by 4 in this recipe"),
        ({"use_rslora": True}, [], r"scaled by 2.82843 \(lora_alpha 4, r 2, use_rslora\), and by 2"),
        ({"alpha_pattern": {"v_proj": 2}}, [], r"v_proj is scaled by 1 \(lora_alpha 2"),
        ({}, ["method.r=3", "method.lora_alpha=6"], "8 have another shape .*: 2x32 in the file, 3x32 here"),
        ({}, ["method.target_modules=[q_proj]"], "4 of the 8 in the file belong to nothing here"),
        (
            {},
            ["method.target_modules=[q_proj, v_proj, o_proj]"],
            "4 of the 12 tensors that this model trains",
        ),
        ({"use_dora": True}, [], "use_dora is True, and False in this recipe"),
        ({"peft_type": "LOHA"}, [], "peft_type is 'LOHA', and 'LORA' is that of method"),
        ({"init_lora_weights": "pissa_niter_4"}, [], "pissa_niter_4 has changed the base in peft"),
        ({}, ["method.init_lora_weights=olora"], "start_from: gives the factors, and method.init_lora_weights would"),
        ({"lora_alpha": "many"}, [], "ranks and scales cannot be read"),
        ({"r": 0}, [], "adapter_config.json: (ranks and scales )?cannot be read"),
        ({"rank_pattern": [1]}, [], "ranks and scales cannot be read"),
        ({"lora_alpha": float("nan")}, [], "scaled by nan .*, and by 2 in this recipe"),
        # what computes something else from equal tensors, though its value is a list or a mapping
        ({"alora_invocation_tokens": [5, 6]}, [], r"alora_invocation_tokens is \[5, 6\], and None in this recipe"),
        ({"layer_replication": [[0, 1], [0, 1]]}, [], "layer_replication is .*, and None in this recipe"),
        ({"use_bdlora": {"nblocks": 2}}, [], "use_bdlora is .*, and None in this recipe"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_with_both_sides(folder, tmp_path, fields, changes, told):
    with pytest.raises(BadInput, match=told) as refused:
        read(folder, changed(folder, tmp_path, **fields), *changes)
    assert "\n" not in str(refused.value) and "start_from" in str(refused.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.9}},
        {"loftq_config": {"loftq_bits": 4}},
        {"exclude_modules": ["lm_head"], "layers_to_transform": [0, 1]},
    ],
)
def test_how_it_started_and_how_places_were_named_does_not_matter(folder, tmp_path, fields):
    assert read(folder, changed(folder, tmp_path, **fields))[1]


def test_trained_tokens_are_those_of_the_directory(folder, tmp_path):
    stock = Qwen2VLForConditionalGeneration.from_pretrained(folder / "model")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], trainable_token_indices=[3, 4])
    peft.get_peft_model(stock, config).save_pretrained(tmp_path)
    assert read(folder, tmp_path, "method.trainable_token_indices=[3, 4]")[1]
    with pytest.raises(BadInput, match=r"trainable_token_indices is \[3, 4\], and \[5, 6\] in this recipe"):
        read(folder, tmp_path, "method.trainable_token_indices=[5, 6]")


Q_AND_V = ["q_proj", "v_proj"]
WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize(
    ("fields", "saved", "changes", "told"),
    [
        (WHOLE, False, ["method.modules_to_save=[embed_tokens, lm_head]"], None),
        (WHOLE, False, ["method.modules_to_save=[embed_tokens]"], "lm_head.weight does not train here and has other"),
        (WHOLE, False, [], "does not train here and has other values there. Name it in method.modules_to_save"),
        ({}, True, [], None),
        (
            {"target_modules": [*Q_AND_V, "embed_tokens"]},
            "auto",
            ["method.target_modules=[q_proj, v_proj, embed_tokens]"],
            None,
        ),
        (
            {"trainable_token_indices": {"embed_tokens": [3, 4]}},
            False,
            ["method.trainable_token_indices={embed_tokens: [3, 4]}"],
            None,
        ),
        (
            {"trainable_token_indices": [3, 4]},
            False,
            [],
            r"trainable_token_indices is \[3, 4\], and None in this recipe",
        ),
    ],
)
@torch.no_grad()
def test_embeddings_that_were_trained_or_saved_beside_an_adapter(folder, tmp_path, fields, saved, changes, told):
    stock = Qwen2VLForConditionalGeneration.from_pretrained(folder / "model")
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": Q_AND_V} | fields)
    theirs = fill(peft.get_peft_model(stock, config), scale=0.2).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=saved)
    if told is not None:
        for whole in (True, False):  # when a run starts, and by --check
            with pytest.raises(BadInput, match=told) as refused:
                read(folder, tmp_path, *changes, whole=whole)
            assert "\n" not in str(refused.value)
        return
    assert saved is False or any("embed_tokens" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    read(folder, tmp_path, *changes)
    model, values = read(folder, tmp_path, *changes, whole=True)
    model.load_state_dict(values, strict=False)
    said = Qwen2VLForConditionalGeneration.forward(model.get_base_model(), **INPUTS).logits
    torch.testing.assert_close(said, theirs(**INPUTS).logits, rtol=0, atol=1e-5)


def test_embeddings_of_another_base_beside_an_adapter_are_refused(folder, tmp_path):
    path = changed(folder, tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    stock = Qwen2VLForConditionalGeneration.from_pretrained(folder / "model")
    tensors["base_model.model.model.language_model.embed_tokens.weight"] = stock.get_input_embeddings().weight + 1e-3
    save_file(tensors, path)
    told = "embed_tokens.weight does not train here and has other values there"
    with pytest.raises(BadInput, match=told):
        read(folder, path.parent, whole=True)
    tensors["base_model.model.model.language_model.embed_tokens.weight"] = stock.get_input_embeddings().weight[1:]
    save_file(tensors, path)
    for whole in (True, False):  # when a run starts, and by --check
        with pytest.raises(BadInput, match=told):
            read(folder, path.parent, whole=whole)


@pytest.mark.parametrize("difference", [0, 1e-3])
def test_embeddings_beside_an_adapter_may_be_stored_with_fewer_digits_than_the_base(folder, tmp_path, difference):
    """As after tuning in bfloat16, while this run holds the base in float32."""
    path = changed(folder, tmp_path) / "adapter_model.safetensors"
    table = Qwen2VLForConditionalGeneration.from_pretrained(folder / "model").get_input_embeddings().weight.detach()
    assert table.dtype == torch.float32 and not torch.equal(table.bfloat16().float(), table)
    name = "base_model.model.model.language_model.embed_tokens.weight"
    save_file(load_file(path) | {name: (table + difference).bfloat16()}, path)
    if difference:
        with pytest.raises(BadInput, match="does not train here and has other values there"):
            read(folder, path.parent, whole=True)
    else:
        assert read(folder, path.parent, whole=True)[1]


@pytest.mark.parametrize(("factor", "dtype", "fits"), [(1, "float8_e4m3fn", True), (1e300, "float64", False)])
def test_numbers_of_any_float_type_are_read_if_they_are_finite_in_float32(folder, tmp_path, factor, dtype, fits):
    path = changed(folder, tmp_path) / "adapter_model.safetensors"
    stored = {name: (tensor.double() * factor).to(getattr(torch, dtype)) for name, tensor in load_file(path).items()}
    save_file(stored, path)
    if not fits:
        with pytest.raises(BadInput, match="numbers that are not finite"):
            read(folder, path.parent)
        return
    values = read(folder, path.parent)[1]
    assert {value.dtype for value in values.values()} == {torch.float32}


def test_directories_without_an_adapter_are_refused_with_the_way_to_one(folder, tmp_path):
    with pytest.raises(BadInput, match="start_from: .* holds no adapter itself. Did you mean .*checkpoint-3"):
        read(folder, folder / "trainer")
    with pytest.raises(BadInput, match="no adapter directory, adapter_config.json is missing"):
        read(folder, folder / "model")
    pickled = changed(folder, tmp_path)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(BadInput, match="adapter_model.bin is a pickle"):
        read(folder, pickled)
    (pickled / "adapter_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(BadInput, match="adapter_model.safetensors: cannot be read"):
        read(folder, pickled)


OURS = [
    METHOD,
    "method={name: peft, type: loha, options: {r: 2, alpha: 4}}",
    "method={name: peft, type: vera, options: {r: 4}}",  # whose file holds what is drawn besides
    "method={name: p_adapter}",
]


@pytest.mark.parametrize("method", OURS)
def test_a_directory_of_ours_is_taken_and_refused_over_another_base(folder, tmp_path, method):
    written = resolved_with(folder, tmp_path / "ours", method)
    made = fill(resolve.attach(written, written.backbone.build()), scale=0.2)
    written.train = written.validation = []
    export_adapter(tmp_path / "ours", made, written, {})
    trained = {name: p for name, p in made.named_parameters() if p.requires_grad}
    resolved = resolved_with(folder, tmp_path / "ours", method)
    model = resolve.attach(resolved, resolved.backbone.build())
    fresh = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    start_from.begin(resolved, model)
    begun = dict(model.named_parameters())
    assert all(
        torch.equal(begun[name], value) and not torch.equal(fresh[name], value) for name, value in trained.items()
    )
    with torch.no_grad():
        next(p for n, p in begun.items() if "base_layer" in n or n.endswith("mlp.down_proj.weight")).view(-1)[0] += 1
    with pytest.raises(BadInput, match="The base model has changed"):
        start_from.begin(resolved, model)


@pytest.mark.parametrize(
    ("method", "buffers"),
    [
        ({"name": "mmrl", "first_layer": 2, "width": 4}, {}),
        ({"name": "ga_net"}, {}),
        ({"name": "ga_net", "train": "head"}, {"down.weight"}),
        ({"name": "tip_adapter", "train_keys": True}, {"alpha"}),
        ({"name": "linear_probe"}, {"weight"}),
    ],
)
def test_heads_begin_with_what_they_keep_beside_their_weights_unless_it_follows_from_the_data(
    tmp_path, method, buffers
):
    section = Section.read(methods, dict(method), "method", Origin())
    if method["name"] == "mmrl":
        base = tiny_prompted_encoder.model(tiny_prompted_encoder.write(tmp_path / "base", "bert"))
    else:
        base = tiny_feature_model.model()

    def attached():
        fresh = copy.deepcopy(base)
        config = section.entry.config(section.options, section.origin)
        return peft.get_peft_model(fresh, section.entry.prepare(config, fresh, find_sites(fresh)))

    made = attached()
    kept = {n: p for n, p in made.named_parameters() if p.requires_grad} | calibrated_buffers(made)
    kept = {name: tensor.detach() + 1 for name, tensor in kept.items()}
    made.save_pretrained(tmp_path / "adapter", state_dict=dict(kept), save_embedding_layers=False)
    recipe = recipes.Recipe(run_dir="x", backbone={"name": "features"}, method=method)
    recipe.start_from = str(tmp_path / "adapter")
    model = attached()
    before = {name: buffer.clone() for name, buffer in calibrated_buffers(model).items()}
    start_from.begin(SimpleNamespace(recipe=recipe, method=section.entry, labels=None), model)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if p.requires_grad)
    for name, buffer in calibrated_buffers(model).items():
        anew = name.endswith((".tau_choice", ".trained_classes"))
        assert torch.equal(buffer.float(), (before if anew else kept)[name].float())
    assert all(any(name.endswith(f".{end}") for name in before) for end in buffers)


@pytest.mark.parametrize(("order", "told"), [([0, 1, 2, 3], None), ([1, 2, 3, 0], "class 0 is 'red', and 'blue' in")])
def test_a_head_with_a_row_for_each_class_is_refused_where_classes_stand_in_another_order(tmp_path, order, told):
    tiny_vqa.prepare(tmp_path)
    resolved = resolve.resolve(tiny_vqa.recipe(tmp_path))
    model = resolve.attach(resolved, resolved.backbone.build())
    sources, labels = (resolved.train, resolved.validation), resolved.labels
    resolved.train = resolved.validation = []
    export_adapter(tmp_path / "ours", model, resolved, {})
    resolved.train, resolved.validation = sources
    resolved.recipe.start_from, resolved.labels = str(tmp_path / "ours"), [labels[i] for i in order]
    if told is None:
        assert start_from.read(resolved, model)
        return
    with pytest.raises(BadInput, match=told):
        start_from.read(resolved, model)
