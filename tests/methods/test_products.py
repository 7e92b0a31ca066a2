"""Adapters multiply in bfloat16 over a bfloat16 base where `engine.adapter_matmul` says so, and train in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft_ds import recipe as recipes
from mmpeft_ds.engine.assembly import resolve as resolving
from mmpeft_ds.engine.assembly.checks import check_values
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.products import Multiplies, multiply_in
from tests.helpers.runs import tiny_pairs

ON = {"aurora": "blip_vqa", "graph_lora": "blip", "uni_adapter": "mllm"}
METHODS = {
    "adapter": {"r": 3},
    "uni_adapter": {"r": 3},
    "routed_lora": {"r": 3, "route": "mul"},
    "routed_adapter": {"r": 3, "route": "matmul1"},
    "graph_lora": {"r": 3},
    "p_adapter": {"r": 2},
    "aurora": {"r": 3},
    "tens_lora": {"r": 3},
    "deep_prompt": {"style": "prefix", "reparameterize": 3},
    "lora": {"r": 3, "init_lora_weights": False},
    "lora_dora": {"r": 3, "init_lora_weights": False, "use_dora": True},
    "lora_pissa": {"r": 3, "init_lora_weights": "pissa"},
}
MATRICES = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.linear}


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    folder = tmp_path_factory.mktemp("products")
    return tiny_pairs.write_backbones(folder, {"mllm", *ON.values()}), folder


class Traced(TorchDispatchMode):
    """Dtypes of the products of matrices that belong to an adapter: one matrix has the shape of one that trains, or is
    3 long as the ranks and bottlenecks of `METHODS`, and nothing of the models."""

    def __init__(self, model):
        super().__init__()
        shapes = {tuple(p.shape) for p in model.parameters() if p.requires_grad and p.dim() == 2}
        shapes |= {(rank * 2, width) for rank, width in shapes}  # a factor joined with its start, of `pissa`
        self.shapes = shapes | {shape[::-1] for shape in shapes}
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in MATRICES:
            sides = [a for a in (*args, out) if isinstance(a, torch.Tensor) and a.dim() >= 2]
            if any(tuple(a.shape) in self.shapes or 3 in a.shape[-2:] for a in sides):
                self.dtypes.append(sides[-1].dtype)
        return out


def trained(sections, method: str, products: str, checkpointing: bool = False):
    """Loss, gradients and dtypes of the adapter's products in one forward and backward pass in bfloat16."""
    written, folder = sections
    name = method.split("_dora")[0].split("_pissa")[0]
    case = {"backbone": ON.get(method, "mllm"), "method": {"name": name, **METHODS[method]}}
    case |= {"dtype": "bfloat16", "adapter_matmul": products}
    parts = tiny_pairs.resolved(case, written, folder)
    torch.manual_seed(0)
    base = parts.backbone.build()
    model = resolving.attach(parts, base).eval()
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))
    batch = tiny_pairs.packed(tiny_pairs.slots_of(0, parts.backbone), parts.backbone, parts.train[0].task)
    with Traced(model) as traced:
        loss = parts.train[0].task.loss(forward(model, parts.backbone, batch, scores=True), batch)
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients, traced.dtypes, model


@pytest.mark.parametrize("method", METHODS)
def test_products_are_bfloat16_and_gradients_float32(sections, method):
    loss, gradients, dtypes, _ = trained(sections, method, "bfloat16")
    other, expected, before, _ = trained(sections, method, "float32")
    assert torch.float32 in before, "control: without it they are float32"
    assert set(dtypes) == {torch.bfloat16}
    torch.testing.assert_close(loss, other, rtol=0.02, atol=0)
    for name, gradient in gradients.items():
        assert gradient is None or gradient.dtype == torch.float32, name
    norms = [torch.stack([g.norm() for g in gs.values() if g is not None]).norm() for gs in (gradients, expected)]
    torch.testing.assert_close(*norms, rtol=0.1, atol=0)


def test_recomputed_blocks_multiply_in_the_same_dtype(sections):
    for method in ("lora", "routed_lora"):
        plain = trained(sections, method, "bfloat16")
        again = trained(sections, method, "bfloat16", checkpointing=True)
        assert set(again[2]) == {torch.bfloat16} and len(again[2]) > len(plain[2])
        for name, gradient in plain[1].items():
            torch.testing.assert_close(again[1][name], gradient, atol=1e-6, rtol=1e-2, msg=name)


def test_weights_and_names_are_those_of_float32_products(sections):
    """So checkpoints and adapters of both settings go with both."""
    half, full = (trained(sections, "lora", dtype)[3] for dtype in ("bfloat16", "float32"))
    assert {n: p.dtype for n, p in half.named_parameters()} == {n: p.dtype for n, p in full.named_parameters()}
    assert half.peft_config["default"].to_dict() == full.peft_config["default"].to_dict()
    full.load_state_dict(half.state_dict())


def test_an_error_inside_a_layer_leaves_no_autocast_behind(sections):
    model = trained(sections, "lora", "bfloat16")[3]
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 1, dtype=torch.bfloat16))
    assert not torch.is_autocast_enabled("cpu")


def test_a_copy_of_a_model_multiplies_as_the_model(sections):
    model = copy.deepcopy(trained(sections, "lora", "bfloat16")[3])
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    with Traced(model) as traced:
        layer(torch.ones(2, layer.in_features, dtype=torch.bfloat16))
    assert traced.dtypes and set(traced.dtypes) == {torch.bfloat16}


def test_every_module_that_multiplies_is_reached():
    class Two(torch.nn.Module, Multiplies):
        pass

    model = torch.nn.Sequential(Two(), torch.nn.Sequential(Two()))
    multiply_in(model, torch.bfloat16)
    assert [m.products for m in model.modules() if isinstance(m, Multiplies)] == [torch.bfloat16] * 2


def test_a_float32_base_is_refused_in_one_line():
    recipe = recipes.Recipe(run_dir="runs/x", backbone={"name": "mllm"}, method={"name": "lora"})
    recipe.engine.adapter_matmul = "bfloat16"
    with pytest.raises(BadInput, match=r"engine.adapter_matmul: needs engine.dtype: bfloat16.* float32") as refused:
        check_values(recipe)
    assert "\n" not in str(refused.value)
    recipe.engine.dtype = "bfloat16"
    check_values(recipe)
