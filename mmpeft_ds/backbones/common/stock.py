"""Whole models of transformers as frozen bases: reading, loading, and publishing a condition.

A class made by `publishing` is the stock class with a mixin in front: parameters keep their names, so an adapter
trained here also loads on the stock model, and the other way round.
"""

# I images, T texts, d width

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from mmpeft_ds.backbones.common import quantised, text_attention, tower_loading
from mmpeft_ds.backbones.common.model_hooks import ModelHooks
from mmpeft_ds.backbones.common.recomputing import RecomputesUnderCondition
from mmpeft_ds.backbones.common.scalars import ScalarsAsBuffers
from mmpeft_ds.backbones.common.slots import images_per_slot
from mmpeft_ds.errors import BadInput

# Weights of a random base: the same on every rank and at every ZeRO stage.
RANDOM_SEED = 0
# Of a configuration, what says nothing of how its model computes.
_ABOUT = ("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype", "id2label",
          "label2id", "use_cache", "quantization_config")  # fmt: skip


def read_config(name: str, where: str, families: tuple[str, ...]) -> PretrainedConfig:
    """Configuration of the model `name`, which must be of one of `families` (its `model_type`), if there are any.

    Raises:
        BadInput: if it cannot be read or is of another family.
    """
    try:
        config = AutoConfig.from_pretrained(tower_loading.locate(name, where), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"{where}: cannot read the configuration of {name!r} ({tower_loading.first_line(error)}). "
            "Give a directory with config.json, or a hub name that is in the local cache."
        ) from error
    if families and config.model_type not in families:
        raise BadInput(f"{where}: {name!r} is of family {config.model_type!r}. Known: {', '.join(families)}.")
    return config


def arithmetic(config: PretrainedConfig, but: PretrainedConfig | None = None) -> dict[str, Any]:
    """All that a configuration says of how its model computes, such as activations and numbers of heads, for a key.

    Args:
        but: a part of it that is left out.
    """
    parts = {name: getattr(config, name, None) for name in config.to_dict() if name not in _ABOUT}
    parts = {name: part for name, part in parts.items() if but is None or part is not but}
    return {n: arithmetic(p, but) if isinstance(p, PretrainedConfig) else p for n, p in parts.items()}


def read_tokenizer(name: str, where: str) -> Any:
    """Tokenizer of `name`. Raises BadInput."""
    try:
        return AutoTokenizer.from_pretrained(tower_loading.locate(name, where), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{where}: cannot load the tokenizer of {name!r} ({tower_loading.first_line(error)})."
        ) from error


def load(
    model_class: type[PreTrainedModel],
    name: str,
    where: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str,
    random_weights: bool = False,
    on_meta: bool = False,
    device: torch.device | None = None,
    quantise: str = "none",
) -> PreTrainedModel:
    """The frozen model, in train mode.

    Args:
        attention: as the recipe gives it, `auto` included.
        random_weights: from the configuration alone, with a fixed seed.
        on_meta: allocate nothing.
        device: where pretrained weights are put as they are read; None: on the host.
        quantise: form of the weights of its linear layers, see `quantised`.

    Raises:
        BadInput: if there are no weights, or the checkpoint lacks some: they would be random.
    """
    parts = text_attention.of_parts(tower_loading.choose_attention(attention, dtype), config)
    kwargs = {"dtype": dtype, "attn_implementation": parts}
    if on_meta:
        with torch.device("meta"):
            model = model_class._from_config(config, **kwargs)
    elif random_weights:
        with torch.random.fork_rng():
            torch.manual_seed(RANDOM_SEED)
            model = model_class._from_config(config, **kwargs)
    else:
        kwargs |= tower_loading.placed(device) | {"quantise": quantise}
        model = tower_loading.pretrained(model_class, name, where, config, **kwargs)
    return quantised.quantise(model.requires_grad_(False).train(), quantise, dtype)


class Publishing(ModelHooks, RecomputesUnderCondition, ScalarsAsBuffers):
    """Mixin before a stock model, which then publishes a condition and may have hooks for the engine."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: its parameters are those of the stock class, for which transformers renames older checkpoints."""
        return False


@functools.cache
def publishing(mixin: type[Publishing], stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The stock class with `mixin` in front, under the name of the stock class: a saved model bears that name.

    The signature of its forward has the arguments of both: `generate` prepares inputs by their names.
    """

    @functools.wraps(mixin.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    theirs, own = (inspect.signature(c.forward).parameters for c in (stock, mixin))
    added = [p.replace(kind=p.KEYWORD_ONLY) for n, p in own.items() if n not in theirs and p.kind != p.VAR_KEYWORD]
    forward.__signature__ = inspect.Signature(sorted([*theirs.values(), *added], key=lambda p: p.kind))
    return type(stock.__name__, (mixin, stock), {"__module__": mixin.__module__, "forward": forward})


def untrained(model: nn.Module, towers: dict[str, str]) -> list[str]:
    """Paths of frozen prefixes: each tower without a trainable, or else its embedding, if that has none.

    Args:
        towers: path of each tower and, below it, of its embedding.
    """
    frozen = []
    for tower, embedding in towers.items():
        for path in (tower, f"{tower}.{embedding}"):
            if not any(p.requires_grad for p in model.get_submodule(path).parameters()):
                frozen.append(path)
                break
    return frozen


def mean_per_text(vectors_Id: Tensor, image_owner: Tensor, text_owner: Tensor, slots: int) -> Tensor:
    """(T, d) mean over the images of the slot that owns each text; zeros where it has none."""
    sums = vectors_Id.new_zeros(slots, vectors_Id.shape[1]).index_add(0, image_owner, vectors_Id)
    count = images_per_slot(image_owner, slots).clamp(min=1).to(sums.dtype)
    return (sums / count[:, None])[text_owner]


def short_hash(values: Any) -> str:
    """Hash of something json-able, 16 hexadecimal digits; equal for equal contents."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def tower_key(choice: Any, *configs: PretrainedConfig) -> str:
    """Key of what towers give: the hash of `choice` and, after a dash, that of how their configurations compute."""
    return f"{short_hash(choice)}-{short_hash([arithmetic(config) for config in configs])}"
