"""Layer files of p-Adapter: tiny layers of transformers, `get_peft_model`, weights of the file."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BlipTextConfig, BlipTextModel, DynamicCache, EncoderDecoderCache

from mmpeft_ds import PAdapterConfig
from mmpeft_ds.methods.p_adapter.layer import AttentionLayer, FFNInput, FFNLayer
from mmpeft_ds.ops.p_laplacian import _weights, _weights_without_eps, differences, self_loops
from mmpeft_ds.sites.observe import Observation, observing
from tests.helpers.goldens import Golden, checks

FORWARD, GRADIENT = 1e-12, 1e-8
KERNELS = ("dense", "stream")
OPTIONS = {"learnable_p": True, "clamp_p": False, "decode_graph": "released"}


# --------------------------------------------------------------------------------------------------------- models


def blip(width: int, heads: int, memory: int | None = None, hidden: int = 8) -> nn.Module:
    """A BLIP text tower of one layer, with cross-attention to states of width `memory`."""
    config = BlipTextConfig(
        vocab_size=8,
        hidden_size=width,
        encoder_hidden_size=memory or width,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=heads,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        is_decoder=True,
    )
    return BlipTextModel(config, add_pooling_layer=False).double().eval()


def bert(implementation: str) -> Callable[..., nn.Module]:
    def build(width: int, heads: int, hidden: int = 8) -> nn.Module:
        config = BertConfig(
            vocab_size=8,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=1,
            num_attention_heads=heads,
            layer_norm_eps=1e-12,
            attn_implementation=implementation,
        )
        return BertModel(config, add_pooling_layer=False).double().eval()

    return build


def attach(model: nn.Module, **options: object) -> nn.Module:
    """The only layer of `model`, wrapped."""
    return peft.get_peft_model(model, PAdapterConfig(**OPTIONS | options)).get_base_model().encoder.layer[0]


def reduction(golden: Golden, down: str = "W_down") -> int:
    narrow, wide = golden.array(down).shape
    return wide // narrow


# -------------------------------------------------------------------------------------------------------- weights


def attention_weights(block: nn.Module, prefix: str = "") -> dict[str, nn.Parameter]:
    """Frozen and trained parameters of an attention block under the names of the file."""
    core, output = block.self, block.output
    frozen = {"q": core.query, "k": core.key, "v": core.value, "o": output.dense}
    found = {f"W_{k}": m.weight for k, m in frozen.items()} | {f"b_{k}": m.bias for k, m in frozen.items()}
    found |= {"ln_weight": output.LayerNorm.weight, "ln_bias": output.LayerNorm.bias}
    return {prefix + k: p for k, p in (found | branch_weights(output.dropout)).items()}


def branch_weights(layer: AttentionLayer) -> dict[str, nn.Parameter]:
    branch = layer.p_adapter["default"]
    linears = {"down": branch.down, "gate": branch.gate, "up": branch.up}
    found = {f"W_{k}": m.weight for k, m in linears.items()} | {f"b_{k}": m.bias for k, m in linears.items()}
    graph = branch.graph
    return found | {"mu_param": graph.m} | ({} if graph.p is None else {"p_param": graph.p})


def ffn_weights(layer: nn.Module, ln: str = "ln_") -> dict[str, nn.Parameter]:
    branch = layer.output.dropout.p_adapter["default"]
    linears = {"ffn2": layer.output.dense, "fdown": branch.down, "fup": branch.up}
    found = {f"W_{k}": m.weight for k, m in linears.items()} | {f"b_{k}": m.bias for k, m in linears.items()}
    return found | {f"{ln}weight": layer.output.LayerNorm.weight, f"{ln}bias": layer.output.LayerNorm.bias}


def fill(golden: Golden, parameters: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for key, parameter in parameters.items():
            if key in golden:
                parameter.copy_(golden.tensor(key).view_as(parameter))
            else:
                # The adapter alone is checked without the projections before it; nothing that trains may be missing.
                assert not parameter.requires_grad, f"{golden.name}: no array for {key}"


# ----------------------------------------------------------------------------------------------------- comparison


@dataclasses.dataclass
class Step:
    """What went in and out of the message passing of one branch."""

    seen: Observation
    f: Tensor
    g: Tensor
    square: bool
    out: Tensor


def watch(layer: AttentionLayer) -> list[Step]:
    """Steps of the branch of `layer`, filled as it runs, with gradients kept."""
    steps = []

    def hook(graph: nn.Module, args: tuple, out: Tensor) -> None:
        seen, f, g, square = args
        for tensor in (f, g, out):
            tensor.retain_grad()
        steps.append(Step(dataclasses.replace(seen), f, g, square, out))

    layer.p_adapter["default"].graph.register_forward_hook(hook)
    return steps


def compare(golden: Golden, out: Tensor, leaves: dict[str, Tensor], steps: list[Step] = ()) -> None:
    """Output, loss, all gradients; what has no array must have none."""
    loss = (out * golden.tensor("loss_cotangent")).sum()
    loss.backward()
    golden.same("out", out, FORWARD)
    golden.same("loss", loss, FORWARD, relative=abs(golden.number("loss")) > 1)
    for key, leaf in leaves.items():
        if f"grad_{key}" in golden:
            golden.same(f"grad_{key}", leaf.grad, GRADIENT, relative=True)
        else:
            assert leaf.grad is None, f"{golden.name}: {key} has a gradient"
    for step in steps:
        golden.same("agg", step.out, FORWARD)
        golden.same("grad_agg", step.out.grad, GRADIENT, relative=True)


def compare_step(golden: Golden, layer: AttentionLayer, step: Step) -> None:
    """What the file says of the inside of one step: attention, nodes, weights, normalisers, constants."""
    graph = layer.p_adapter["default"].graph
    p, mu = graph.exponent, graph.pull
    mu_cfg = graph.mu
    golden.same("p", torch.as_tensor(p, dtype=torch.float64).reshape(()), FORWARD)
    golden.same("mu_eff", mu.reshape(()), FORWARD)
    golden.same("mu_cfg", torch.tensor(mu_cfg, dtype=torch.float64), FORWARD)
    A = graph.attention(step.seen)
    golden.same("attn", A, FORWARD)
    nodes = step.g if step.square else torch.cat([step.f, step.g], 2)
    golden.same("nodes", nodes, FORWARD)
    if graph.groups is not None:
        A = torch.nn.functional.adaptive_avg_pool2d(A, (A.shape[2], graph.groups))
    own = self_loops(*A.shape[-2:], None, A.device) if step.square else None
    weight = _weights(A, differences(step.f, step.g, own), torch.as_tensor(p), 1e-8, own)
    c = 2 * mu / p
    alpha = 1 / (weight.sum(-1) + c)
    if "edge_w" in golden:
        golden.same("edge_w", weight, FORWARD, relative=True)
    golden.same("alpha", alpha, FORWARD, relative=True)
    golden.same("M", alpha.unsqueeze(-1) * weight, FORWARD, relative=True)
    for key in ("beta", "beta_unused"):
        if key in golden:
            golden.same(key, c * alpha, FORWARD, relative=True)
    if "grad_nodes" in golden:
        grad = step.g.grad if step.square else torch.cat([step.f.grad, step.g.grad], 2)
        golden.same("grad_nodes", grad, GRADIENT, relative=True)


# ----------------------------------------------------------------------------------------------------- sublayers


def common(golden: Golden) -> dict[str, object]:
    """Options that the file decides."""
    return {
        "r": reduction(golden),
        "mu": golden.number("mu_cfg"),
        "p": golden.number("p"),
        "learnable_p": "p_param" in golden,
    }


def mask(golden: Golden) -> Tensor | None:
    return golden.tensor("add_mask") if "add_mask" in golden else None


def run_attention(golden: Golden, block: nn.Module, x: Tensor, others: dict[str, Tensor], **arguments: object) -> None:
    """Fill, run and compare one attention block with its Add&LN.

    Args:
        x: its hidden states.
        others: further leaves of the file.
        arguments: of the block's forward.
    """
    weights = attention_weights(block)
    fill(golden, weights)
    steps = watch(block.output.dropout)
    out = block(x, **arguments)[0]
    compare(golden, out, {"x": x, **others} | {k: p for k, p in weights.items() if p.requires_grad}, steps)
    (step,) = steps
    compare_step(golden, block.output.dropout, step)


def heads_of(golden: Golden) -> tuple[int, int]:
    """Width and number of heads."""
    return golden.array("W_o").shape[0], golden.array("attn").shape[1]


@checks("padapter/self_*")
def self_attention(golden: Golden) -> None:
    for build, kernel in itertools.product(self_builders(), KERNELS):
        layer = attach(build(*heads_of(golden)), sublayers=["self"], kernel=kernel, **common(golden))
        run_attention(golden, layer.attention, golden.tensor("x", True), {}, attention_mask=mask(golden))


@checks("padapter/self_cached_*")
def self_attention_with_past(golden: Golden) -> None:
    for build, kernel in itertools.product(self_builders(), KERNELS):
        layer = attach(build(*heads_of(golden)), sublayers=["self"], kernel=kernel, **common(golden))
        past = {k: golden.tensor(k, True) for k in ("past_k", "past_v")}
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        cache.self_attention_cache.update(*past.values(), 0)
        x = golden.tensor("x", True)
        run_attention(golden, layer.attention, x, past, attention_mask=mask(golden), past_key_values=cache)


def self_builders() -> Iterator[Callable[..., nn.Module]]:
    yield blip
    yield bert("eager")
    yield bert("sdpa")


@checks("padapter/cross_*")
def cross_attention(golden: Golden) -> None:
    memory, groups = golden.array("W_k").shape[1], golden.array("M").shape[-1]
    for kernel in KERNELS:
        model = blip(*heads_of(golden), memory)
        layer = attach(model, sublayers=["cross"], groups=groups, kernel=kernel, **common(golden))
        give_memory_mask(layer, mask(golden))
        x, y = golden.tensor("x", True), golden.tensor("y", True)
        run_attention(golden, layer.crossattention, x, {"y": y}, encoder_hidden_states=y)


def give_memory_mask(layer: nn.Module, memory_mask: Tensor | None) -> None:
    """BLIP of transformers 5.23 has no way for this mask from outside of `.self`."""
    layer.crossattention.self.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"encoder_attention_mask": memory_mask}), with_kwargs=True
    )


@checks("padapter/core_*")
def adapter_alone(golden: Golden) -> None:
    square = "square" in golden.name
    options = {"sublayers": ["self" if square else "cross"], "groups": None, **common(golden)}
    layer = attach(blip(*heads_of(golden)), **options)
    block = layer.attention if square else layer.crossattention
    weights = attention_weights(block)
    fill(golden, weights)
    inputs = {k: golden.tensor(k, True) for k in ("context", "attn", "values")}
    rows, heads = inputs["attn"].shape[2], inputs["attn"].shape[1]
    tokens = inputs["values"]
    seen = Observation(
        q=tokens[:, :rows],
        value=(tokens if square else tokens[:, rows:]).unflatten(-1, (heads, -1)).transpose(1, 2),
        probabilities=inputs["attn"],
        project=block.output.dense,
    )
    steps = watch(block.output.dropout)
    with observing(block.output.dropout, seen):
        out = block.output(inputs["context"], golden.tensor("residual"))
    # These files hold the gradients of p and m alone among the weights.
    leaves = {k: weights[k] for k in ("p_param", "mu_param") if k in weights}
    compare(golden, out, inputs | leaves, steps)
    compare_step(golden, block.output.dropout, steps[0])


@checks("padapter/ffn_adapter*")
def feed_forward(golden: Golden) -> None:
    width, hidden = golden.array("W_ffn2").shape
    layer = attach(blip(width, 1, hidden=hidden), sublayers=["ffn"], r2=reduction(golden, "W_fdown"))
    weights = ffn_weights(layer)
    fill(golden, weights)
    inputs = {k: golden.tensor(k, True) for k in ("ffn_hidden", "ffn_input")}
    assert isinstance(layer.output.dropout, FFNLayer)
    with observing(layer.output.dropout, FFNInput(inputs["ffn_input"])):
        out = layer.output(inputs["ffn_hidden"], inputs["ffn_input"])
    compare(golden, out, inputs | {k: p for k, p in weights.items() if p.requires_grad})


@checks("padapter/decoder_layer*")
def decoder_layer(golden: Golden) -> None:
    width, memory = golden.array("ca_W_k").shape
    hidden, channels = golden.array("W_ffn1").shape[0], golden.array("sa_W_down").shape[0]
    options = {
        "r": width // channels,
        "r2": reduction(golden, "W_fdown"),
        "mu": golden.number("mu_cfg"),
        "p": golden.number("sa_p_param"),
        "p_cross": golden.number("ca_p_param"),
        "groups": 4,  # fixed by the README of the files, as the number of heads
    }
    layer = attach(blip(width, 4, memory, hidden), **options)
    weights = attention_weights(layer.attention, "sa_") | attention_weights(layer.crossattention, "ca_")
    first = {"W_ffn1": layer.intermediate.dense.weight, "b_ffn1": layer.intermediate.dense.bias}
    weights |= ffn_weights(layer, "ffn_ln_") | first
    fill(golden, weights)
    inputs = {k: golden.tensor(k, True) for k in ("x", "y")}
    out = layer(inputs["x"], inputs["y"], attention_mask=golden.tensor("add_mask"))
    compare(golden, out, inputs | {k: p for k, p in weights.items() if p.requires_grad})


@checks("padapter/derived_paper_*")
def published(golden: Golden) -> None:
    width, narrow = golden.array("W_down").shape
    options = {"r": width // narrow, "mu": golden.number("mu"), "p": golden.number("p"), "sublayers": ["self"]}
    model = bert("eager")(width, 1)
    block = attach(model, mode="published", **options).attention
    layer: AttentionLayer = block.output.dropout
    branch = layer.p_adapter["default"]
    trained = {"W_down": branch.down.weight, "W_up": branch.up.weight}
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(golden.tensor(key).T)
        # The nodes of the file are projected already.
        block.output.dense.weight.copy_(torch.eye(width))
        block.output.dense.bias.zero_()
    inputs = {k: golden.tensor(k, True) for k in ("q_proj", "v_proj", "scores")}
    A = inputs["scores"].softmax(-1).unsqueeze(1)
    q, v = inputs["q_proj"], inputs["v_proj"]
    seen = Observation(q=q, value=v.unsqueeze(1), probabilities=A, project=block.output.dense)
    steps = watch(layer)
    with observing(layer, seen):
        out = layer(torch.zeros_like(q))
    loss = (out * golden.tensor("loss_cotangent")).sum()
    loss.backward()
    golden.same("out", out, FORWARD)
    golden.same("loss", loss, FORWARD, relative=abs(golden.number("loss")) > 1)
    golden.same("agg", steps[0].out[:, 0], FORWARD)
    for key, leaf in inputs.items():
        golden.same(f"grad_{key}", leaf.grad, GRADIENT, relative=True)
    for key, parameter in trained.items():
        golden.same(f"grad_{key}", parameter.grad.T, GRADIENT, relative=True)
    compare_published(golden, A, q, v, branch.graph)


def compare_published(golden: Golden, A: Tensor, q: Tensor, v: Tensor, graph: nn.Module) -> None:
    golden.same("attn", A[:, 0], FORWARD)
    golden.same("p", torch.as_tensor(graph.exponent, dtype=torch.float64).reshape(()), FORWARD)
    golden.same("mu", torch.as_tensor(graph.pull, dtype=torch.float64), FORWARD)
    degree = A.sum(-2)
    golden.same("col_degree", degree[:, 0], FORWARD)
    apart = differences(q.unsqueeze(1), v.unsqueeze(1) * degree.rsqrt().unsqueeze(-1), None)
    weight = _weights_without_eps(A, apart, torch.as_tensor(graph.exponent), 1e-8, None)
    golden.same("edge_w", weight[:, 0], FORWARD, relative=True)
    golden.same("alpha", 1 / (weight.sum(-1) + 2 * graph.pull / graph.exponent)[:, 0], FORWARD, relative=True)
