"""Ranks of test_aurora_ranks.py: trains a tiny BLIP with Aurora under ZeRO-3 with every parameter partitioned.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.aurora CASES.json OUT

Each case is {name, leaves, recompute}; rank 0 writes OUT/NAME.pt with losses and trained weights.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BlipForImageTextRetrieval

from mmpeft_ds.backbones.common.model_hooks import ModelHooks
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.condition import enable_checkpointing
from tests.helpers import engine_state
from tests.helpers.models.tiny_aurora import attach, blip, fill

STEPS, ROWS = 3, 4
ADAM = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.0}  # a large eps: Adam would turn rounding into whole steps
ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000}


class Step(nn.Module):
    """Vision once, text three times: alone, with images, and with images of other texts, as in retrieval."""

    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        base = self.wrapped.get_base_model()
        states = base.vision_model(pixels).last_hidden_state
        passes = (base.text_encoder(ids), base.text_encoder(ids, encoder_hidden_states=states),
                  base.text_encoder(ids.flip(0), encoder_hidden_states=states))  # fmt: skip
        ramp = 10 * torch.sin(torch.arange(passes[0].last_hidden_state[0].numel()))
        return sum((i + 1) * (p.last_hidden_state.flatten(1) @ ramp).mean() for i, p in enumerate(passes))


class RunsAgain(ModelHooks, BlipForImageTextRetrieval):
    runs_again = ("text_encoder",)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    pixels = torch.randn(ROWS, 3, 8, 8, generator=generator)
    return pixels, torch.randint(3, 20, (ROWS, 5), generator=generator)


def adapted(recompute: bool = False) -> nn.Module:
    wrapped = fill(attach(blip(RunsAgain), filled=False), scale=0.1)
    if recompute:
        enable_checkpointing(wrapped.get_base_model())
        wrapped.train()
    return wrapped


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def run_case(case: dict, rank: int) -> dict:
    import deepspeed

    from mmpeft_ds.engine.zero import stage3

    wrapped = adapted(case["recompute"])
    if case["leaves"]:
        stage3.mark_leaves(wrapped, find_sites(wrapped.get_base_model()))
    own = trainables(wrapped)
    config = {"train_micro_batch_size_per_gpu": ROWS // 2, "zero_optimization": ZERO, "gradient_clipping": 0.0,
              "zero_allow_untested_optimizer": True}  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=Step(wrapped), optimizer=torch.optim.AdamW(own.values(), **ADAM), config=config
    )
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    with torch.no_grad():  # around the engine, before it has seen any forward
        before = wrapped.get_base_model().vision_model(batch(0)[0]).last_hidden_state
    for step in range(STEPS):
        pixels, ids = batch(step)
        loss = engine(pixels[half], ids[half])
        engine.backward(loss)
        engine.step()
    weights = {n: engine_state.read_weight(p) for n, p in own.items()}
    engine.destroy()
    return {"before": before, "weights": weights}


def main() -> None:
    import deepspeed

    cases, out = sys.argv[-2:]
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    for case in json.loads(Path(cases).read_text()):
        result = run_case(case, rank)
        if rank == 0:
            torch.save(result, Path(out) / f"{case['name']}.pt")


if __name__ == "__main__":
    main()
