"""Adapters written as plain LoRA: stock peft, in a process without this package, gives their outputs."""

import json

import peft
import pytest
import torch
from transformers import LlavaForConditionalGeneration, Qwen2VLForConditionalGeneration

from mmpeft_ds import AuroraConfig, GraphLoraConfig, RoutedLoraConfig, TensLoraConfig, lora_export, methods
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.export import export_adapter
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.lora.method import Lora
from mmpeft_ds.sites import find_sites
from tests.helpers import peft_alone, serving_table
from tests.helpers.models import tiny_mllm
from tests.helpers.models.tiny_stock import fill
from tests.helpers.models.tiny_zoo import ZOO, output
from tests.helpers.runs import tiny_adapters

ALL = ["q", "k", "v", "out"]
CONFIGS = {
    "aurora": lambda: AuroraConfig(r=3, image_targets=ALL, text_targets=ALL, gates=False, scale=0.7, scale_all=True),
    "aurora-ffn": lambda: AuroraConfig(r=3, text_targets=[*ALL, "fc1", "fc2"], gates=False),
    "aurora-cp": lambda: AuroraConfig(r=3, form="cp", image_targets=["q"], text_targets=["q", "v"], gates=False),
    "graph_lora": lambda: GraphLoraConfig(r=2, targets=["q", "v"]),
    "tens_lora": lambda: TensLoraConfig(r=3, targets=ALL, scale=0.5, dropout=0.1),
    "tens_lora-heads": lambda: TensLoraConfig(r=[4, 3, 2, 2], modes=["heads", "layers"]),
    "tens_lora-cp": lambda: TensLoraConfig(r=3, form="cp", modes=["heads", "projections", "layers"]),
    "routed_lora": lambda: RoutedLoraConfig(r=2, alpha=8, route="none", targets=["q", "v"]),
    "lora": lambda: peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, rank_pattern={r"\.0\..*": 2}, lora_dropout=0.1
    ),
    "lora-pissa": lambda: peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights="pissa"),
}
# What cannot be attached: Aurora's chunks to gated blocks, peft's PiSSA to Conv1D.
UNATTACHABLE = {("aurora-ffn", "llama"), ("aurora-ffn", "llava"), ("lora-pissa", "gpt2")}
MODELS = ("gpt2", "bert", "llama")


def attached(kind, make, double=False):
    model = ZOO[kind].build() if isinstance(kind, str) else kind
    model = model.double() if double else model
    config, sites = make(), find_sites(model)
    method = methods.of(config)
    method.check(config, sites, 16)
    torch.manual_seed(5)
    wrapped = method.attach(method.prepare(config, model, sites), model)
    return fill(wrapped, scale=0.2).eval()


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    tiny_mllm.write(folder, "llava")
    return folder


def llava_inputs(model):
    side = model.config.vision_config.image_size
    tokens = (side // model.config.vision_config.patch_size) ** 2
    tokens += model.config.vision_feature_select_strategy == "full"
    ids = torch.tensor([[3, *[model.config.image_token_id] * tokens, 9, 4, 8]])
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize(
    "kinds", [("bert", "llava"), pytest.param((*MODELS, "llava"), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_stock_peft_without_this_package_gives_the_outputs_of_every_exported_adapter(tmp_path, llava, kinds):
    want, plain = {}, {}
    for kind in kinds:
        made = ZOO[kind].build if kind in ZOO else lambda: LlavaForConditionalGeneration.from_pretrained(llava).eval()
        base = made()
        inputs = llava_inputs(base) if kind == "llava" else ZOO[kind].inputs()
        peft_alone.write_base(tmp_path, kind, base, inputs)
        plain[kind] = peft_alone.said(base, inputs)
        for name, make in CONFIGS.items():
            if (name, kind) in UNATTACHABLE:
                continue
            model = attached(made(), make)
            folder = tmp_path / f"lora-{kind}-{name}"
            folder.mkdir()
            lora_export.write(model, folder)
            want[kind, name] = peft_alone.said(model, inputs)
    alone = peft_alone.ask(tmp_path)
    assert len(want) == len(CONFIGS) * len(kinds) - sum(kind in kinds for _, kind in UNATTACHABLE)
    for (kind, name), expected in want.items():
        got = alone[f"{kind}-{name}"]
        scale = expected.abs().max()
        assert (expected - plain[kind]).abs().max() > 1e-3 * scale, (kind, name, "changes nothing")
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, scale), (kind, name)  # float32


@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith("lora")])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_change_of_a_weight_is_what_merging_adds_to_float64_rounding(kind, name):
    model = attached(kind, CONFIGS[name], double=True)
    layers = {p: m for p, m in model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)}
    changes = {p: m.get_delta_weight("default") for p, m in layers.items()}
    before = {p: m.get_base_layer().weight.detach().clone() for p, m in layers.items()}
    model.merge_adapter()
    for path, layer in layers.items():
        added = layer.get_base_layer().weight - before[path]
        assert added.abs().max() > 1e-3
        assert (added - changes[path]).abs().max() < 1e-12, path


@pytest.mark.parametrize("name", ["aurora", "tens_lora", "graph_lora", "routed_lora"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_verb_save_as_lora_of_peft_works_and_is_exact_at_the_rank_of_the_change(kind, name, tmp_path):
    model = attached(kind, CONFIGS[name])
    assert model.supports_lora_conversion()
    rank = 6 if kind == "gpt2" else 3  # parts of a fused projection have ranks of their own
    want = output(model, ZOO[kind])
    peft.save_as_lora(tmp_path, model, rank=rank)
    again = peft.PeftModel.from_pretrained(ZOO[kind].build(), tmp_path).eval()
    assert (output(again, ZOO[kind]) - want).abs().max() < 1e-5


def test_a_shared_factor_counts_once_in_the_rank_and_own_ones_add_up(tmp_path):
    model = attached("gpt2", CONFIGS["aurora"])
    assert {len(down) for down, _ in methods.of(AuroraConfig()).lora_pairs(model, "default").values()} == {3}
    model = attached("gpt2", CONFIGS["graph_lora"])
    assert {len(down) for down, _ in methods.of(GraphLoraConfig()).lora_pairs(model, "default").values()} == {4}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (RoutedLoraConfig(route="mul"), "routes by 'mul'"),
        (RoutedLoraConfig(route="none", train_bias=True), "train_bias"),
        (RoutedLoraConfig(route="none", train_norms=True), "train_norms"),
        (peft.LoraConfig(use_dora=True), "use_dora"),
        (peft.LoraConfig(bias="lora_only"), "bias: lora_only"),
        (peft.IA3Config(target_modules=["query"], feedforward_modules=[]), "no product"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_lora_is_refused_with_the_reason(config, reason, tmp_path):
    model = attached("bert", lambda: config)
    with pytest.raises(BadInput, match=reason):
        lora_export.write(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_gates_that_the_model_has_are_refused_by_the_layer_that_holds_them_and_by_peft(tmp_path):
    model = attached("bert_decoder", lambda: AuroraConfig(r=2))
    with pytest.raises(BadInput, match=r"LayerNorm: a AttentionEnd is no low-rank change"):
        lora_export.write(model, tmp_path)
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=4)


def test_modules_trained_whole_are_written_beside_it_and_read_by_peft(tmp_path):
    def make():
        return TensLoraConfig(r=2, modules_to_save=["lm_head"])

    model = attached("llama", make)
    told = lora_export.write(model, tmp_path)
    assert told["whole_modules"] == ["lm_head"]
    again = lora_export.load(ZOO["llama"].build(), tmp_path)
    assert (output(again, ZOO["llama"]) - output(model, ZOO["llama"])).abs().max() < 1e-5
    bare = lora_export.bare(model)
    assert torch.equal(output(bare, ZOO["llama"]), output(ZOO["llama"].build(), ZOO["llama"]))


def test_every_method_says_whether_it_can_be_written_as_a_lora():
    exact = {"aurora", "graph_lora", "lora", "tens_lora"}
    assert {
        n for n in methods.names() if n != "peft" and methods.get(n).no_lora(methods.get(n).Config()) is None
    } == exact
    assert Lora.no_lora(peft.LoraConfig()) is None


def test_an_adapter_directory_is_written_compared_and_refused_as_a_whole(tmp_path):
    recipe = tiny_adapters.recipe(tmp_path, "instruction")
    recipe.method = {"name": "tens_lora", "r": 2, "modules_to_save": ["lm_head"]}
    resolved = resolve.resolve(recipe)
    model = fill(resolve.attach(resolved, resolved.backbone.build()), scale=0.1).eval()
    export_adapter(tmp_path / "adapter", model, resolved, {})
    told = lora_export.export(tmp_path / "adapter", tmp_path / "lora")
    assert told["largest_difference"] < 1e-5
    stock = Qwen2VLForConditionalGeneration.from_pretrained(recipe.backbone["model"])
    assert lora_export.load(stock, tmp_path / "lora").peft_config["default"].target_modules  # every key in its place
    assert told["base_class"] == "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLForConditionalGeneration"
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["modules_to_save"] == ["lm_head"]
    assert str(tmp_path) not in (tmp_path / "lora" / "exported.json").read_text()
    with pytest.raises(BadInput, match="exists"):
        lora_export.export(tmp_path / "adapter", tmp_path / "lora")


def test_the_page_on_serving_says_what_the_methods_say():
    page = serving_table.PAGE.read_text("utf-8")
    assert serving_table.written(page) == page, "stale: run python -m tests.helpers.serving_table"
