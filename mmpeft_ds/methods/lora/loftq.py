"""LoRA over a quantised base that starts from what quantisation has lost: LoftQ (arXiv 2310.08659), one iteration.

The low-rank term begins as the best approximation of W - Q(W), W being the weight in the files of the base and Q(W)
the quantised one, which stays as it is. So it is a plain LoRA that loads onto the same quantised base.
"""

# r rank, I width of the input, O width of the output

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor

from mmpeft_ds.distributed.collectives import on_rank0
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import StartData
from mmpeft_ds.methods.common.tuner import is_quantised
from mmpeft_ds.methods.lora import start


def check(model: PeftModel) -> None:
    """Raise BadInput where a layer has no quantised weight to start from."""
    for path, layer in start.layers(model):
        base = layer.get_base_layer()
        if not is_quantised(base):
            raise BadInput(
                f"init_lora_weights: loftq starts from what quantised weights have lost, and those of {path} are not "
                "quantised. Set backbone.quantise, choose target_modules in its blocks, or use another start."
            )
        start.check_numbers(layer, path, model.active_adapter, "loftq")


@torch.no_grad()
def begin(model: PeftModel, data: StartData) -> None:
    """Give every LoRA layer of `model` its start, computed on rank 0. Collective."""
    name = model.active_adapter
    layers = dict(start.layers(model))
    lost: dict[str, Tensor] = {}
    on_rank0(lambda: lost.update(data.lost(list(layers))))
    for path, layer in layers.items():
        down, up = on_rank0(lambda p=path: _factors(layers[p], name, lost[p]))
        layer.lora_A[name].weight.copy_(down)
        layer.lora_B[name].weight.copy_(up)


def _factors(layer: lora.LoraLayer, name: str, lost: Tensor) -> list[Tensor]:
    """`down` (r, I) and `up` (O, r) on the CPU."""
    u, s, v = torch.linalg.svd(lost, full_matrices=False)
    r, root = layer.r[name], s.sqrt()
    # peft leaves the scale out, so that there only lora_alpha: r gives back what was lost.
    return [(root[:r, None] * v[:r]).cpu(), (u[:, :r] * root[:r] / layer.scaling[name]).cpu()]
