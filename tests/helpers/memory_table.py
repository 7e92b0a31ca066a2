"""The table of docs/memory.md: parameters and bytes per rank of the shipped recipes, at the size of the named models.

`python -m tests.helpers.memory_table` regenerates it. Nothing is loaded: each model is built from its configuration on
the meta device, as `launchers/train.py --check` does, and the same formula counts the bytes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BartConfig,
    BlipConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    RobertaConfig,
    ViTConfig,
)

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine import plan
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.optim import optimizers
from mmpeft_ds.engine.zero.config import check_ds_config
from tests.helpers import ROOT
from tests.helpers.models import tiny_mllm

PAGE = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
RANKS = (1, 8, 64)
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
VQAV2 = "backbone.num_labels=3129"
# recipe -> key of the backbone -> the configuration of the model that it names, and further changes
MODELS: dict[str, dict[str, str]] = {
    **{f"routed_{m}_vqav2_roberta": {"vision": "vit", "text": "roberta"} for m in ("lora", "adapter")},
    **{f"routed_{m}_coco_gpt2": {"vision": "vit", "text": "gpt2"} for m in ("lora", "adapter")},
    **{f"clip_bart_multitask_{m}": {"text": "bart"} for m in ("lora", "adapter")},
    **{f"p_adapter_blip_{d}": {"model": "blip"} for d in ("vqav2", "snli_ve", "coco")},
    **dict.fromkeys(
        ("aurora_vqav2", "aurora_msrvtt_qa", "aurora_flickr30k", "aurora_didemo", "captioning_own"), {"model": "blip"}
    ),
    **dict.fromkeys(
        ("answering_easy_vqa", "captioning_openclipart", "captioning_own_packaged"),
        {"vision": "dinov2", "text": "smollm2"},
    ),
    "lora_llava15_instruct": {"model": "llava"},
    **dict.fromkeys(("lora_qwen2vl_instruct", "lora_qwen2vl_videos"), {"model": "qwen2_vl"}),
}


def configurations(folder: Path) -> dict[str, Path]:
    """Directories with the published configurations, and a tokenizer where the backbone looks into it."""
    layers = {"encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12, "decoder_attention_heads": 12}
    made = {
        "vit": ViTConfig(**BASE),
        "roberta": RobertaConfig(**BASE, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
        "gpt2": GPT2Config(),
        "dinov2": Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518),
        "smollm2": LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        "bart": BartConfig(d_model=768, encoder_ffn_dim=3072, decoder_ffn_dim=3072, **layers),
        "blip": BlipConfig(
            text_config={**BASE, "vocab_size": 30_524, "encoder_hidden_size": 768},
            vision_config={"image_size": 384, "patch_size": 16},
            image_text_hidden_size=256,
        ),
    }
    paths = {}
    for name, config in made.items():
        paths[name] = folder / name
        config.save_pretrained(paths[name])
    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])}
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(paths["blip"])
    for family, config in (("llava", _llava()), ("qwen2_vl", _qwen2_vl())):
        paths[family] = tiny_mllm.write(folder / family, family)
        config.save_pretrained(paths[family])
    size = {"height": 336, "width": 336}
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=size).save_pretrained(paths["llava"])
    Qwen2VLImageProcessorPil().save_pretrained(paths["qwen2_vl"])
    return paths


def _llava() -> LlavaConfig:
    """llava-hf/llava-1.5-7b-hf."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064), image_token_id=tiny_mllm.IMAGE)


def _qwen2_vl() -> Qwen2VLConfig:
    """Qwen/Qwen2-VL-2B-Instruct."""
    text = dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    )  # fmt: skip
    vision = dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4)
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tiny_mllm.QWEN_IDS)


def row(name: str, paths: dict[str, Path]) -> dict[str, Any]:
    """What the plan of a shipped recipe says of it."""
    changes = [f"backbone.{key}={paths[model]}" for key, model in MODELS[name].items()]
    recipe = recipes.load(ROOT / "recipes" / f"{name}.yaml", [*changes, *([VQAV2] if "roberta" in name else [])])
    components = recipes.components(recipe)
    backbone = resolve.make_backbone(components.backbone, recipe.engine, None)
    method, config = resolve.make_method(components.method)
    parts = SimpleNamespace(recipe=recipe, method=method, method_config=config)
    with torch.device("meta"):
        model = resolve.attach(parts, backbone.build(on_meta=True))
    sizes = plan.Sizes.of(model, len(optimizers.MOMENTS[recipe.optim.name]))
    ds_config = check_ds_config(recipe)
    return {
        "total": sizes.total,
        "trained": sizes.trained,
        "dtype": recipe.engine.dtype,
        "config": Path(recipe.engine.deepspeed).name,
        "own": [plan.zero_bytes(sizes, ds_config, recipe, n) for n in RANKS],
        "zero1": plan.zero_bytes(sizes, plan.ZERO_1, recipe, 8),
    }


def table(folder: Path, names: list[str] | None = None) -> list[str]:
    """Lines of the table, for some recipes or all."""
    paths = configurations(folder)
    ranks = " | ".join(f"{n} rank{'s' * (n > 1)}" for n in RANKS)
    lines = [f"| recipe | parameters | trained | base | ZeRO | {ranks} | ZeRO-1, 8 ranks |"]
    lines.append("|---" * (6 + len(RANKS)) + "|")
    for name in names or sorted(MODELS):
        r = row(name, paths)
        cells = [f"`{name}`", f"{r['total']:,}", f"{r['trained']:,}", r["dtype"], f"`{r['config']}`"]
        lines.append("| " + " | ".join([*cells, *map(_gib, r["own"]), _gib(r["zero1"])]) + " |")
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def written() -> list[str]:
    """The lines that the page has."""
    return PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0].strip().splitlines()


def main() -> None:
    """Write the table into the page."""
    with tempfile.TemporaryDirectory() as folder:
        lines = table(Path(folder))
    head, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
