#!/usr/bin/env bash
# DeepSpeed: behind a frozen embedding, adapters in blocks under deepspeed.checkpointing never learn, and nothing is said.
#
# A good guess: checkpointed blocks train as they do without checkpointing; where they cannot, there is a warning, as torch's reentrant
#   checkpoint gives it ("None of the inputs have requires_grad=True. Gradients will be None").
# What happens: a block whose inputs need no gradient is given an output that needs none, although the block holds parameters that
#   train; so the next block's input needs none either, and so on to the head. The head trains, the loss falls, every adapter keeps
#   its first value (or shrinks by weight decay). Nothing warns. With non_reentrant_checkpoint of the
#   same module, or with inputs that require gradients, every adapter trains.
# Source: deepspeed.runtime.activation_checkpointing.checkpointing.CheckpointFunction, an autograd function of the inputs alone.
# Who is hurt: adapters in every block of a frozen encoder with a new head on top, the common shape of such tuning.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import warnings
import torch, deepspeed
from torch.utils.checkpoint import checkpoint as torch_checkpoint

deepspeed.init_distributed("gloo", verbose=False)
deepspeed.checkpointing.configure(None)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.Linear(8, 8).requires_grad_(False)
        self.adapter = torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.frozen(x) + self.adapter(x))


class Model(torch.nn.Module):
    def __init__(self, way, inputs_need_gradients=False):
        super().__init__()
        self.way, self.inputs_need_gradients = way, inputs_need_gradients
        self.embedding = torch.nn.Embedding(10, 8).requires_grad_(False)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.head = torch.nn.Linear(8, 2)

    def forward(self, ids, labels):
        x = self.embedding(ids)
        if self.inputs_need_gradients:
            x = x.requires_grad_()
        for block in self.blocks:
            x = self.way(block, x)
        return torch.nn.functional.cross_entropy(self.head(x), labels)


def train(way, **options):
    torch.manual_seed(0)
    model = Model(way, **options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = {"train_micro_batch_size_per_gpu": 10, "zero_optimization": {"stage": 2}}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=torch.optim.AdamW(trained, 0.01, weight_decay=0), config=config)
    ids, losses = torch.arange(10), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            loss = engine(ids, ids % 2)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
    changed = sorted({name.rsplit(".", 1)[0] for name, parameter in engine.module.named_parameters()
                      if not torch.equal(parameter, first[name])})
    return changed, losses[-1] < losses[0], any("Gradients will be None" in str(warning.message) for warning in caught)


def reentrant(block, x):
    return torch_checkpoint(block, x, use_reentrant=True)


every = ["blocks.0.adapter", "blocks.1.adapter", "blocks.2.adapter", "head"]
ways = {"no checkpointing": (lambda block, x: block(x), every, False),
        "torch, reentrant": (reentrant, ["head"], True),
        "deepspeed.checkpointing.checkpoint": (deepspeed.checkpointing.checkpoint, ["head"], False),
        "deepspeed.checkpointing.non_reentrant_checkpoint": (deepspeed.checkpointing.non_reentrant_checkpoint, every, False)}
for name, (way, expected, warns) in ways.items():
    changed, falls, warned = train(way)
    print(f"{name}: trained {changed}, loss falls: {falls}, torch's warning: {warned}")
    assert changed == expected and falls and warned == warns
changed, *_ = train(deepspeed.checkpointing.checkpoint, inputs_need_gradients=True)
print("deepspeed.checkpointing.checkpoint, inputs that require gradients: trained", changed)
assert changed == every
PY
