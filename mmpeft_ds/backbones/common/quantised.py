"""Quantised bases: the frozen linear layers of the transformer blocks hold their weights in 4 or 8 bits.

nf4    bitsandbytes, as in QLoRA (arXiv 2305.14314): 4 bits a weight, and a float32 maximum for each 64 of them
int8   torchao, symmetric, with a float32 scale for each row
fp8    torchao, float8 e4m3, likewise

Weights alone are quantised: a layer multiplies by its dequantised weights in the dtype of the base, so outputs and
gradients are those of a base with these weights. Embeddings, norms, biases, projectors and heads stay as they are.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModel, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D

from mmpeft_ds.sites import find_sites

# A layer of ours keeps the class that it replaces here, under transformers' own name for it.
SOURCE = "source_cls"


def reading(form: str, model_class: Any, config: PretrainedConfig) -> dict[str, Any]:
    """Keyword of `from_pretrained` that quantises each weight as it is read; none for the form `none`.

    What transformers would leave out or take in by itself does not count: exactly its `linear_layers` are quantised.
    A model without input embeddings, such as CLIP's, is read whole, and then quantised: transformers asks for them at
    every weight that torchao quantises, and cannot load it where there are none.
    """
    if form == "none":
        return {}
    with torch.device("meta"):
        make = AutoModel.from_config if model_class is AutoModel else model_class._from_config
        model = make(copy.deepcopy(config))
        if form != "nf4" and not _has_input_embeddings(model):
            return {}
        layers = linear_layers(model)
        wanted = [path for path, layer in layers if form == "nf4" or type(layer) is nn.Linear]
    # A pattern for names that are not wanted: transformers takes those of layers, and with torchao of weights.
    others = [rf"(?!(?:{'|'.join(map(re.escape, wanted))})(?:\.weight)?$).*"] if wanted else [".*"]
    if form == "nf4":
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=others)
    else:
        how = TorchAoConfig(_of_torchao(form), modules_to_not_convert=others)
    return {"quantization_config": how}


@torch.no_grad()
def quantise(model: PreTrainedModel, form: str, dtype: torch.dtype) -> PreTrainedModel:
    """`model` with all its `linear_layers` quantised, also those that were so when they were read.

    Args:
        model: frozen; on the meta device it stays there, in the shapes of quantised weights.
        form: `none` leaves it as it is.
        dtype: of the base, in which layers multiply.
    """
    if form == "none":
        return model
    for path, layer in list(linear_layers(model)):
        made = _quantised(layer, form, dtype)
        setattr(made, SOURCE, type(layer))
        for part in (made, *made.parameters()):
            part._is_hf_initialized = True  # or a model composed of towers would draw them again
        model.set_submodule(path, made.train(layer.training))
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            _forget(part)
        if "support_avx512bf16_for_cpu" in vars(part):
            # bitsandbytes would pack the weights again in evaluation, and the frozen base would be another one.
            part.support_avx512bf16_for_cpu = False
            part.compute_dtype, part.compute_type_is_set = dtype, True
    model.is_loaded_in_4bit = form == "nf4"  # by which peft chooses its layers
    return model


@torch.no_grad()
def dequantise(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with plain layers in place of quantised ones, whose weights are what these multiply by."""
    for path, layer in list(model.named_modules()):
        if not is_quantised(layer):
            continue
        weight, in_by_out = weight_of(layer), vars(layer).get(SOURCE) is Conv1D
        with torch.device("meta"):
            made = Conv1D(layer.out_features, layer.in_features) if in_by_out else None
            made = made or nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        made.weight = nn.Parameter(weight.T.contiguous() if in_by_out else weight, requires_grad=False)
        made.bias = layer.bias
        model.set_submodule(path, made.train(layer.training))
    _forget(model)
    return model


def as_quantised(model: nn.Module, form: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that holds the weights of `linear_layers` once they are quantised, one layer at a time.

    The names are those of the parameters, with a dot and the part's name. The model stays as it is.
    """
    for path, layer in linear_layers(model):
        for part, tensor in stored(_quantised(layer, form, dtype).weight).items():
            yield f"{path}.weight.{part}", tensor


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer of what is quantised: Linear and Conv1D inside the transformer blocks of all towers, not those
    that are quantised already."""
    sites = find_sites(model)
    blocks = tuple({f"{site.block}." for site in (*sites.attention, *sites.ffn) if site.block})
    for path, module in model.named_modules():
        # The exact types: others read their weights themselves, as the output projection of nn.MultiheadAttention.
        if type(module) in (nn.Linear, Conv1D) and path.startswith(blocks) and not is_quantised(module):
            yield path, module


def is_quantised(layer: nn.Module) -> bool:
    """Whether a module is a layer with quantised weights."""
    weight = vars(layer).get("_parameters", {}).get("weight")
    return weight is not None and list(stored(weight)) != [""]


def weight_of(layer: nn.Module) -> Tensor:
    """(out, in) dequantised weights of a quantised layer, in the dtype of the base."""
    weight = layer.weight
    if is_traceable_wrapper_subclass(weight):
        return weight.dequantize()
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


def stored(tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that hold a parameter: itself under an empty name, or the parts of quantised weights.

    The part of quantised weights that ZeRO splits as a parameter, if any, has the name `packed`.
    """
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return {name: getattr(tensor, name) for name in names}
    state = vars(tensor).get("quant_state")
    if state is None:
        return {"": tensor}
    return {"packed": tensor, "absmax": state.absmax, "code": state.code}


def nbytes(tensor: Tensor) -> int:
    """Bytes of a parameter as it is stored, scales included."""
    return sum(part.numel() * part.element_size() for part in stored(tensor).values())


def numel(tensor: Tensor) -> int:
    """Weights of a parameter, also where two of them share a byte."""
    state = vars(tensor).get("quant_state")
    return tensor.numel() if state is None else math.prod(state.shape)


def _has_input_embeddings(model: PreTrainedModel) -> bool:
    try:
        return model.get_input_embeddings() is not None
    except NotImplementedError:
        return False


def _forget(model: PreTrainedModel) -> None:
    """Take transformers' marks off a model: its configuration is that of the base, and the recipe names the form."""
    vars(model.config).pop("quantization_config", None)
    for mark in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit"):
        vars(model).pop(mark, None)


def _quantised(layer: nn.Module, form: str, dtype: torch.dtype) -> nn.Module:
    weight = layer.weight.T.contiguous() if type(layer) is Conv1D else layer.weight
    out_width, in_width = weight.shape
    if form == "nf4":
        import bitsandbytes

        with torch.device("meta"):
            made = bitsandbytes.nn.Linear4bit(
                in_width, out_width, layer.bias is not None, dtype, compress_statistics=False, quant_type="nf4"
            )
        made.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=False, quant_type="nf4", module=made
        )
        made.weight._quantize(weight.device)  # not by `to`, which does nothing on the meta device
        made.bias = layer.bias
        return made
    from torchao.quantization import quantize_

    with torch.device("meta"):
        made = nn.Linear(in_width, out_width, layer.bias is not None)
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    quantize_(made, _of_torchao(form))
    return made


def _of_torchao(form: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[form]()
