"""The shipped recipes of the routing paper train exactly as many parameters as the published models, by kind."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, RobertaConfig, ViTConfig

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import plan
from mmpeft_ds.engine.assembly import resolve
from tests.helpers import ROOT

RECIPES = ROOT / "recipes"
SIZES = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
ROBERTA = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Configurations alone: nothing is loaded."""
    folder = tmp_path_factory.mktemp("configurations")
    for size, sizes in SIZES.items():
        ViTConfig(**sizes).save_pretrained(folder / f"vit-{size}")
        RobertaConfig(**sizes, **ROBERTA).save_pretrained(folder / f"roberta-{size}")
        GPT2Config(
            n_embd=sizes["hidden_size"], n_layer=sizes["num_hidden_layers"], n_head=sizes["num_attention_heads"]
        ).save_pretrained(folder / f"gpt2-{size}")
    return folder


def counted(towers, recipe, size, *changes):
    """Trainable parameters by kind of a shipped recipe, at real size and without storage."""
    text = "roberta" if "roberta" in recipe else "gpt2"
    names = [f"backbone.vision={towers / f'vit-{size}'}", f"backbone.text={towers / f'{text}-{size}'}"]
    head = ["backbone.num_labels=3129"] if text == "roberta" else []
    loaded = recipes.load(RECIPES / f"{recipe}.yaml", [*names, *head, *changes])
    backbone = resolve.make_backbone(recipes.components(loaded).backbone, loaded.engine, None)
    method, config = resolve.make_method(recipes.components(loaded).method)
    parts = SimpleNamespace(recipe=loaded, method=method, method_config=config)
    with torch.device("meta"):
        model = resolve.attach(parts, backbone.build(on_meta=True))
    counts = plan.trainable_by_kind(parts, model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    return counts


@pytest.mark.parametrize(
    ("recipe", "size", "changes", "published"),
    [
        ("routed_lora_vqav2_roberta", "large", (), (21_244_985, 12_582_912, 98_304, 49_152, 8_514_617)),
        ("routed_lora_vqav2_roberta", "large", ("method.r=64",), (14_953_529, 6_291_456, 98_304, 49_152, 8_514_617)),
        ("routed_adapter_vqav2_roberta", "large", (), (14_956_601, 6_343_680, 98_304, 0, 8_514_617)),
        ("routed_adapter_vqav2_roberta", "large", ("method.r=128",), (21_251_129, 12_638_208, 98_304, 0, 8_514_617)),
        (
            "routed_lora_vqav2_roberta",
            "large",
            ("method.variant=split", "method.train_bias=false"),
            (18_443_321, 9_830_400, 98_304, 0, 8_514_617),
        ),
        ("routed_lora_vqav2_roberta", "base", (), (10_767_417, 4_718_592, 36_864, 18_432, 5_993_529)),
        ("routed_adapter_vqav2_roberta", "base", (), (8_409_657, 2_379_264, 36_864, 0, 5_993_529)),
        ("routed_lora_coco_gpt2", "large", (), (12_754_944, 12_582_912, 98_304, 73_728, 0)),
        ("routed_adapter_coco_gpt2", "large", (), (6_417_408, 6_319_104, 98_304, 0, 0)),
        ("routed_lora_coco_gpt2", "base", (), (4_783_104, 4_718_592, 36_864, 27_648, 0)),
        ("routed_adapter_coco_gpt2", "base", (), (2_406_912, 2_370_048, 36_864, 0, 0)),
    ],
)
def test_a_shipped_recipe_trains_what_the_published_model_trains(towers, recipe, size, changes, published):
    counts = counted(towers, recipe, size, *changes)
    assert (sum(counts.values()), *(counts[kind] for kind in plan.KINDS)) == published


@pytest.mark.parametrize("recipe", ["routed_lora_coco_gpt2", "routed_adapter_coco_gpt2"])
def test_routing_itself_adds_no_parameters(towers, recipe):
    assert counted(towers, recipe, "base", "method.route=none") == counted(towers, recipe, "base")
