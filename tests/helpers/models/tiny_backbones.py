"""One tiny backbone of every entry, with random weights, in a folder of its own."""

from __future__ import annotations

from mmpeft_ds import backbones, registry
from tests.helpers.models import tiny_blip, tiny_clip, tiny_clip_bart, tiny_mllm, tiny_text_only, tiny_towers

LABELS = ["yes", "no", "red", "blue"]


def make_vision_text_encoder(folder):
    entry = registry.load(backbones, "vision_text_encoder", "backbone.name")
    options = entry.Options(
        vision=tiny_towers.write_vision(folder / "vision", "vit"),
        text=tiny_towers.write_text(folder / "text", "roberta"),
        image_size=8,
    )
    return entry(options, LABELS)


def make_vision_text_decoder(folder):
    entry = registry.load(backbones, "vision_text_decoder", "backbone.name")
    options = entry.Options(
        vision=tiny_towers.write_vision(folder / "vision", "vit"),
        text=tiny_towers.write_decoder(folder / "text"),
        image_size=8,
        max_text_length=19,
    )
    return entry(options, None)


def make_text_only(folder):
    return tiny_text_only.ENTRY(tiny_text_only.Options(tiny_towers.write_text(folder, "bert")), LABELS)


def make_clip_bart(folder):
    return tiny_clip_bart.make(folder, vision="vit")


def make_clip(folder):
    entry = registry.load(backbones, "clip", "backbone.name")
    return entry(entry.Options(tiny_clip.write(folder, "clip")), None)


def make_dual_encoder(folder):
    entry = registry.load(backbones, "dual_encoder", "backbone.name")
    options = entry.Options(
        vision=tiny_towers.write_vision(folder / "vision", "dinov2"),
        text=tiny_towers.write_text(folder / "text", "bert"),
        image_size=8,
        max_text_length=19,
        projection="mlp",
        width=12,
    )
    return entry(options, None)


def make_blip(folder):
    entry = registry.load(backbones, "blip", "backbone.name")
    return entry(entry.Options(tiny_blip.write(folder, "captioner")), None)


def make_mllm(folder):
    entry = registry.load(backbones, "mllm", "backbone.name")
    return entry(entry.Options(tiny_mllm.write(folder, "qwen2_vl"), condition="pooled"), None)


MAKERS = {
    "vision_text_encoder": make_vision_text_encoder,
    "vision_text_decoder": make_vision_text_decoder,
    "clip": make_clip,
    "dual_encoder": make_dual_encoder,
    "clip_bart": make_clip_bart,
    "blip": make_blip,
    "mllm": make_mllm,
}
