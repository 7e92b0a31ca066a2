"""The checkpoints that recipes name on the hub, as tiny models with random weights below a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.helpers.models import tiny_blip, tiny_clip, tiny_clip_bart, tiny_mllm, tiny_towers

MAKERS: dict[str, Callable[[Path], str]] = {
    "google/vit-base-patch16-224": lambda folder: tiny_towers.write_vision(folder, "vit"),
    "google/vit-base-patch16-224-in21k": lambda folder: tiny_towers.write_vision(folder, "vit"),
    "openai/clip-vit-base-patch16": lambda folder: tiny_clip.write(folder, "clip"),
    "openai/clip-vit-base-patch32": lambda folder: tiny_towers.write_vision(folder, "clip"),
    "roberta-base": lambda folder: tiny_towers.write_text(folder, "roberta"),
    "bert-base-uncased": lambda folder: tiny_towers.write_text(folder, "bert"),
    "gpt2": lambda folder: tiny_towers.write_decoder(folder),
    "facebook/bart-base": lambda folder: tiny_clip_bart.write_bart(folder),
    "Salesforce/blip-image-captioning-base": lambda folder: tiny_blip.write(folder, "captioner"),
    "Salesforce/blip-image-captioning-large": lambda folder: tiny_blip.write(folder, "captioner"),
    "Salesforce/blip-vqa-base": lambda folder: tiny_blip.write(folder, "vqa"),
    "Salesforce/blip-itm-base-coco": lambda folder: tiny_blip.write(folder, "retrieval"),
    "llava-hf/llava-1.5-7b-hf": lambda folder: tiny_mllm.write(folder, "llava"),
    "Qwen/Qwen2-VL-2B-Instruct": lambda folder: tiny_mllm.write(folder, "qwen2_vl"),
}


def local(name: str, folder: Path) -> str:
    """The directory of the tiny model in place of `name`, made at first use; other names as they are."""
    if name not in MAKERS:
        return name
    path = folder / name.replace("/", "--")
    return str(path) if path.is_dir() else MAKERS[name](path)
