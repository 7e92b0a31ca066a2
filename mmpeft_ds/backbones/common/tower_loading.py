"""Pretrained towers by name: which families fit, their configurations, their weights, their image statistics.

A name is a hub name, a local directory, or `packaged:NAME` (weights that come inside a Python package).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file, is_flash_attn_2_available
from transformers.utils.logging import set_tqdm_hook

from mmpeft_ds import network
from mmpeft_ds.backbones.common import packaged, partitioned_loading, quantised
from mmpeft_ds.errors import BadInput

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class VisionFamily:
    """Differences between vision towers of transformers.

    Attributes:
        final_norm: name of the LayerNorm after the last layer.
        normed_output: `last_hidden_state` has gone through it (CLIP applies it to the pooled vector only).
        summary_tokens: tokens before the patches, class token included.
        mean, std: of the pixels, where the checkpoint brings no preprocessor_config.json.
    """

    final_norm: str
    normed_output: bool
    summary_tokens: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


VISION = {
    "vit": VisionFamily("layernorm", True, 1, *HALF),
    "deit": VisionFamily("layernorm", True, 2, *IMAGENET),
    "dinov2": VisionFamily("layernorm", True, 1, *IMAGENET),
    "dinov2_with_registers": VisionFamily("layernorm", True, 5, *IMAGENET),
    "clip_vision_model": VisionFamily("post_layernorm", False, 1, *CLIP),
    "siglip_vision_model": VisionFamily("post_layernorm", True, 0, *HALF),
}
TEXT = ("bert", "roberta", "xlm-roberta", "camembert")
# Families whose forward refuses another image size unless told to interpolate positions; the others always do.
_INTERPOLATES_ON_REQUEST = ("vit", "deit", "clip_vision_model", "siglip_vision_model")


def is_on_hub(name: str) -> bool:
    """Whether `name` is a hub name: no existing folder, nothing that looks like one, and not `packaged:`."""
    return not (name.startswith("packaged:") or _looks_local(name) or Path(name).expanduser().is_dir())


def locate(name: str, where: str) -> str:
    """Directory or hub name that `name` stands for; `packaged:` names are made ready. Where the hub cannot be
    reached, its cache alone is read from here on. Raises BadInput."""
    if name.startswith("packaged:"):
        return str(packaged.ensure(name.removeprefix("packaged:"), where))
    path = Path(name).expanduser()
    if _looks_local(name) and not path.is_dir():
        raise BadInput(
            f"{where}: no directory {name!r}. Give a directory with config.json, a hub name or packaged:NAME."
        )
    if path.is_dir():
        return str(path)
    network.ask_hub(name)
    return name


def load_config(name: str, where: str, kind: str) -> PretrainedConfig:
    """Configuration of the `vision` or `text` tower `name`; of a CLIP or SigLIP pair, its vision part.

    Raises:
        BadInput: if it cannot be read or its family does not fit.
    """
    try:
        config = AutoConfig.from_pretrained(locate(name, where), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"{where}: cannot read the configuration of {name!r} ({first_line(error)}). "
            "Give a directory with config.json, a hub name that is in the local cache, or packaged:NAME."
        ) from error
    if kind == "vision" and config.model_type in ("clip", "siglip"):
        config = config.vision_config
    known = TEXT if kind == "text" else tuple(VISION)
    if config.model_type not in known:
        raise BadInput(
            f"{where}: {name!r} is of family {config.model_type!r}, no {kind} tower. Known: {', '.join(known)}."
        )
    return config


def first_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """A copy of `config` with that many layers."""
    # Rebuilt, not edited: configurations of backbones derive stage names from the number of layers.
    derived = ("num_hidden_layers", "stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
    fields = {k: v for k, v in config.to_dict().items() if k not in derived}
    return AutoConfig.for_model(fields.pop("model_type"), num_hidden_layers=layers, **fields)


def load_tower(
    name: str, where: str, config: PretrainedConfig, may_miss: tuple[str, ...] = (), **kwargs: Any
) -> PreTrainedModel:
    """Pretrained tower with the layers that `config` asks for; weights it does not use are left on disk.

    Args:
        may_miss: beginnings of parameter names that the checkpoint need not have.
        kwargs: for `from_pretrained`: dtype, attn_implementation, add_pooling_layer, device_map; `quantise` of
            `pretrained`.

    Raises:
        BadInput: if there are no weights, or the checkpoint lacks some that the tower needs: they would be random.
    """
    choose = "Choose another checkpoint, or another `vision_feature` or `head_input`."
    return pretrained(AutoModel, name, where, config, may_miss, choose, **kwargs, trust_remote_code=False)


def pretrained(
    model_class: Any,
    name: str,
    where: str,
    config: PretrainedConfig,
    may_miss: tuple[str, ...] = (),
    choose: str = "Take a whole checkpoint.",
    quantise: str = "none",
    **kwargs: Any,
) -> PreTrainedModel:
    """`model_class.from_pretrained` of the checkpoint `name`, all weights read.

    Args:
        may_miss: beginnings of parameter names that the checkpoint need not have.
        choose: how to mend it where it lacks others.
        quantise: form of the weights of its linear layers, which they get as they are read.

    Raises:
        BadInput: if there are no weights, some are missing, which would be random, or have other shapes.
    """
    refuse_quantised(name, where, config)
    try:
        with quiet_loading(), partitioned_loading.by_whole_shapes():
            # At ZeRO-3 weights of another shape are an error in any case, elsewhere they are named.
            model, info = model_class.from_pretrained(
                locate(name, where),
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=not is_deepspeed_zero3_enabled(),
                **quantised.reading(quantise, model_class, config),
                **kwargs,
            )
    except (OSError, SafetensorError) as error:
        raise BadInput(
            f"{where}: cannot load the weights of {name!r} ({first_line(error)}). Restore its files."
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ArithmeticError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not lines and is_deepspeed_zero3_enabled():
            # such as the starts of weights, or conversions of them, that transformers computes of partitioned ones
            raise BadInput(
                f"{where}: transformers cannot load {name!r} at ZeRO stage 3 ({first_line(error)}). Take stage 0 to 2."
            ) from error
        if not lines:
            raise
        raise BadInput(
            f"{where}: the weights of {name!r} do not fit its configuration ({lines[0]}) Take both of one checkpoint."
        ) from error
    if info["mismatched_keys"]:
        key, found, wanted = min(info["mismatched_keys"])
        raise BadInput(
            f"{where}: the weights of {name!r} do not fit its configuration: {key} has the shape {tuple(found)}, and "
            f"{tuple(wanted)} by config.json. Take both of one checkpoint."
        )
    missing = sorted(k for k in info["missing_keys"] if not k.startswith(may_miss or ("\0",)))
    if missing:
        some = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise BadInput(f"{where}: {name!r} has no weights for {some}, which would be random. {choose}")
    return model


def refuse_quantised(name: str, where: str, config: PretrainedConfig) -> None:
    """Refuse a checkpoint whose weights are quantised already. Raises BadInput."""
    parts = (config, *(getattr(config, key, None) for key in config.sub_configs))
    said = next((q for part in parts if (q := getattr(part, "quantization_config", None))), None)
    if said is not None:
        kind = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
        raise BadInput(
            f"{where}: the weights of {name!r} are quantised already (quantization_config of config.json: {kind}). "
            "Take the checkpoint that it was made of; backbone.quantise quantises that as it is read."
        )


def placed(device: torch.device | None) -> dict[str, Any]:
    """Keyword of `from_pretrained` that reads weights straight to `device`; none for the host."""
    return {} if device is None or device.type == "cpu" else {"device_map": {"": device}}


def empty_tower(config: PretrainedConfig, kind: str, pooler: bool) -> PreTrainedModel:
    """Tower with fresh weights from its configuration (on the device of the context, so also on meta)."""
    return AutoModel.from_config(config, **pooler_argument(config, kind, pooler), trust_remote_code=False)


def pooler_argument(config: PretrainedConfig, kind: str, pooler: bool) -> dict[str, bool]:
    """Keyword that keeps an unused pooler from being built, where the family has one."""
    return {"add_pooling_layer": pooler} if kind == "text" or config.model_type in ("vit", "deit") else {}


def vision_features(
    tower: PreTrainedModel, pixels: Tensor, feature: str, final_norm: bool, with_tokens: bool
) -> Tensor:
    """One vector per image, and on request all tokens of the last layer after it.

    Args:
        pixels: normalised, (I, 3, H, W), in the dtype of the tower.
        feature: `pooler` (what the family pools: a dense of CLS, CLS, or attention), `cls`, or `mean` over patches.
        final_norm: apply the LayerNorm after the last layer; a pooler always does.

    Returns:
        (I, 1, d), or (I, 1 + n, d) with the n tokens of the last layer (CLS first where there is one).
    """
    family = VISION[tower.config.model_type]
    extra = {}
    if tower.config.model_type in _INTERPOLATES_ON_REQUEST and pixels.shape[-1] != _side(tower.config.image_size):
        extra["interpolate_pos_encoding"] = True
    raw_needed = not final_norm and (feature != "pooler" or with_tokens)
    out = tower(pixel_values=pixels, output_hidden_states=raw_needed or None, **extra)
    # hidden_states holds the output of the last layer as it leaves it, before the final LayerNorm
    tokens = out.hidden_states[-1] if raw_needed else out.last_hidden_state
    if final_norm and not family.normed_output and (feature != "pooler" or with_tokens):
        tokens = getattr(tower, family.final_norm)(tokens)
    if feature == "pooler":
        pooled = out.pooler_output
    elif feature == "cls":
        pooled = tokens[:, 0]
    else:
        pooled = tokens[:, family.summary_tokens :].mean(1)
    pooled = pooled.unsqueeze(1)
    return torch.cat([pooled, tokens], 1) if with_tokens else pooled


def image_processor(name: str, config: PretrainedConfig, where: str) -> dict[str, Any]:
    """`mean`, `std` and `resample` (PIL number) that the checkpoint was trained with, or its family's.

    Towers of other families (BLIP's) were trained with CLIP's.
    """
    family = VISION.get(config.model_type)
    mean, std = CLIP if family is None else (family.mean, family.std)
    given: dict[str, Any] = {}
    path = find_file(locate(name, where), "preprocessor_config.json")
    if path:
        given = json.loads(Path(path).read_text())
    return {
        "mean": list(given.get("image_mean") or mean),
        "std": list(given.get("image_std") or std),
        "resample": given.get("resample", 3 if config.model_type != "vit" else 2),
    }


def interpolation(option: str, pixels: dict[str, Any]) -> str:
    """The interpolation that `option` names; for `auto` that of `pixels`, which `image_processor` gave."""
    return {2: "bilinear", 3: "bicubic"}.get(pixels["resample"], "bicubic") if option == "auto" else option


def weights_hash(name: str, where: str) -> str:
    """SHA-256 over the weight files of a tower, in the order of their names.

    Raises:
        BadInput: if there are none.
    """
    place = locate(name, where)
    if os.path.isdir(place):
        files = sorted(Path(place).glob("*.safetensors")) or sorted(Path(place).glob("pytorch_model*.bin"))
    else:
        single = find_file(place, "model.safetensors") or find_file(place, "pytorch_model.bin")
        index = find_file(place, "model.safetensors.index.json")
        parts = set(json.loads(Path(index).read_text())["weight_map"].values()) if index and not single else set()
        files = [Path(single)] if single else [Path(f) for p in sorted(parts) if (f := find_file(place, p))]
    if not files:
        raise BadInput(f"{where}: {name!r} has no weight files (*.safetensors).")
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def choose_attention(wanted: str, dtype: torch.dtype) -> str:
    """`wanted`, or for `auto`: flash-attn where it is installed, on CUDA, with a half precision base; else SDPA."""
    if wanted != "auto":
        return wanted
    half = dtype in (torch.bfloat16, torch.float16)
    return "flash_attention_2" if half and is_flash_attn_2_available() else "sdpa"


def first_line(error: Exception) -> str:
    """The beginning of an error message of a library, for one of ours."""
    return next(iter(str(error).strip().splitlines()), "")[:200]


def find_file(place: str, file: str) -> str | None:
    """Path of a file of a local directory or of the hub cache, None if it has none."""
    try:
        return cached_file(
            place, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
    except OSError:
        return None


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _side(image_size: Any) -> int:
    return image_size if isinstance(image_size, int) else int(image_size[-1])


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from listing the weights of unused layers, and from a bar for them on every rank; what is
    missing is checked by the caller."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    bars = set_tqdm_hook(_without_loading_bar)
    try:
        yield
    finally:
        logger.setLevel(before)
        set_tqdm_hook(bars)


def _without_loading_bar(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A bar of transformers; downloads keep theirs."""
    return factory(*args, **{**kwargs, "disable": True} if kwargs.get("desc") == "Loading weights" else kwargs)
