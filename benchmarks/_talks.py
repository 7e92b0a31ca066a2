"""Instruction data and tiny models for `trainer.py --instruction`: lengths of LLaVA's mixture, words without meaning.

Numbers of tokens are those of `packing.py`, divided by `shorter` where attention would else be most of what so narrow
a model computes. How many of them the assistant says is assumed, in `ANSWERED`.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
)

from benchmarks import packing
from mmpeft_ds.data.writer import PARTS, RawSample, write_manifest, write_shard

# part of the mixture: share of its text that the assistant says
ANSWERED = {
    "LLaVA-Instruct": 0.7,
    "ShareGPT": 0.75,
    "VQAv2": 0.1,
    "GQA": 0.1,
    "OKVQA": 0.1,
    "OCR-VQA": 0.15,
    "A-OKVQA": 0.1,
    "TextCaps": 0.3,
    "RefCOCO": 0.4,
    "Visual Genome": 0.4,
}
KINDS = {"llava": "fixed", "qwen2_vl": "resolutions", "qwen3_vl": "resolutions"}  # model type: mixture of packing.py
TURN = 60  # tokens of a question with its answer
FRAME = {"llava": 3, "qwen2_vl": 8, "qwen3_vl": 8}  # tokens of the template around a question with its answer, about
PHOTO = (640, 480)
VOCABULARY = 2048
SPECIAL = ["[PAD]", "[UNK]", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>", "<|vision_start|>"]
SPECIAL += ["<|vision_end|>", "<|video_pad|>"]
# as its processor asks the tokenizer for them
NAMED = {"image_token": "<image>", "video_token": "<|video_pad|>"}
NAMED |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=344,
    max_position_embeddings=4096,
)
VICUNA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "{{ '<image> ' }}{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ '</s> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|vision_start|> <image> <|vision_end|> ' }}{% else %}{{ c['text'] + ' ' }}"
    "{% endif %}{% endfor %}{{ '<|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


@dataclass(frozen=True)
class Setting:
    """What is trained on: the model type, and by how much lengths are divided (a square: 1, 4 or 9)."""

    family: str
    shorter: int

    @property
    def patch(self) -> int:
        """Pixels of a patch's side, so that an image gives as many tokens as is said."""
        return 14 * math.isqrt(self.shorter)


def write(folder: Path, setting: Setting, samples: int) -> list[int]:
    """FOLDER/model and FOLDER/data; returns the tokens of every sample, about, for a sampler that groups by them."""
    _write_model(folder / "model", setting)
    drawn = packing.mixture(KINDS[setting.family], samples)
    photo = Image.fromarray(_photo())
    image = np.maximum(drawn.image // setting.shorter, drawn.image > 0).astype(int)
    text = (drawn.text // setting.shorter).astype(int)
    raw = []
    for i in range(samples):
        words = _conversation(i, setting, list(packing.PARTS)[drawn.part[i]], int(text[i]), bool(image[i]))
        files = [("jpg", _jpeg(photo, setting, int(image[i])))] if image[i] else []
        raw.append(RawSample(f"talk {i}", files, {"number": i, "conversations": words}))
    data = folder / "data"
    (data / PARTS).mkdir(parents=True)
    parts = [write_shard(data, "talks", "train", i, first, raw[first : first + 64]) for i, first in _shards(samples)]
    write_manifest(data, "talks", "CC0-1.0", {"name": "talks"}, 64, {"train": parts}, None, "train")
    return (text + image).tolist()


def _shards(samples: int) -> list[tuple[int, int]]:
    return list(enumerate(range(0, samples, 64)))


def _conversation(i: int, setting: Setting, part: str, tokens: int, image: bool) -> list[dict[str, str]]:
    draw = random.Random(i)
    turns = max(1, min(tokens // TURN, 6))
    turns = [tokens // turns + (k < tokens % turns) for k in range(turns)]
    told = []
    for k, length in enumerate(turns):
        length = max(2, length - FRAME[setting.family])
        answer = min(length - 1, max(1, round(ANSWERED[part] * length)))
        mark = "<image>\n" if image and k == 0 else ""
        told += [
            {"from": "human", "value": mark + _words(draw, length - answer)},
            {"from": "gpt", "value": _words(draw, answer)},
        ]
    return told


def _words(draw: random.Random, number: int) -> str:
    return " ".join(f"w{draw.randrange(VOCABULARY - 100)}" for _ in range(number))


def _photo() -> np.ndarray:
    draw = np.random.default_rng(0)
    y, x = np.mgrid[: PHOTO[1], : PHOTO[0]]
    waves = [np.sin(x * a + y * b + c) for a, b, c in draw.uniform(-0.15, 0.15, (3, 3))]
    return (128 + 90 * np.stack(waves, -1) + draw.normal(0, 4, (PHOTO[1], PHOTO[0], 3))).clip(0, 255).astype(np.uint8)


def _jpeg(photo: Image.Image, setting: Setting, tokens: int) -> bytes:
    """LLaVA's images are photos of one size; Qwen's as large as their tokens say."""
    if setting.family != "llava":
        side = 2 * setting.patch
        rows = max(1, round(math.sqrt(tokens * 0.75)))
        photo = photo.resize((side * max(1, round(tokens / rows)), side * rows))
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG")
    return buffer.getvalue()


def _write_model(folder: Path, setting: Setting) -> None:
    words = [*SPECIAL, "USER:", "ASSISTANT:", "user", "assistant"]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = WhitespaceSplit()
    llava = setting.family == "llava"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="</s>" if llava else "<|im_end|>",
        additional_special_tokens=SPECIAL[4:],
        **({"extra_special_tokens": NAMED} if setting.family == "qwen3_vl" else {}),
    )
    tokenizer.chat_template = VICUNA if llava else CHATML
    tokenizer.save_pretrained(folder)
    _processor(setting).save_pretrained(folder)
    config = _config(setting, vocabulary)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)


def _processor(setting: Setting) -> Any:
    if setting.family == "llava":
        return CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    side = 2 * setting.patch
    limits = {"shortest_edge": side**2, "longest_edge": 1280 * side**2}
    return Qwen2VLImageProcessorPil(patch_size=setting.patch, temporal_patch_size=2, merge_size=2, size=limits)


def _config(setting: Setting, vocabulary: dict[str, int]) -> PretrainedConfig:
    text = {**TEXT, "pad_token_id": 0}
    if setting.family == "llava":
        vision = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256)
        vision |= dict(model_type="clip_vision_model", image_size=336, patch_size=setting.patch)
        text |= dict(model_type="llama")
        return LlavaConfig(vision_config=vision, text_config=text, image_token_id=vocabulary["<image>"])
    ids = dict(
        image_token_id="<image>", vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"
    )
    ids = {name: vocabulary[token] for name, token in ids.items()} | {"video_token_id": vocabulary["<|video_pad|>"]}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    text |= dict(num_key_value_heads=2, rope_parameters=rope)
    vision = dict(depth=4, num_heads=2, patch_size=setting.patch, temporal_patch_size=2, spatial_merge_size=2)
    if setting.family == "qwen3_vl":
        text |= dict(head_dim=32)
        vision |= dict(hidden_size=64, intermediate_size=256, out_hidden_size=128, deepstack_visual_indexes=[0, 1, 2])
        return Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    vision |= dict(embed_dim=64, hidden_size=128, mlp_ratio=4)
    return Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
